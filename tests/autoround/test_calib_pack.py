# SPDX-License-Identifier: Apache-2.0
"""The bundled texts: intact, large and mixed enough, and truly apart."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from importlib import resources
from types import SimpleNamespace

import pytest

from autoround.calib import pack


def test_rows_are_the_file_and_the_file_has_the_recorded_hash() -> None:
    packed = resources.files("autoround.calib.pack").joinpath("heldout.jsonl.xz").read_bytes()
    raw = lzma.decompress(packed)
    assert hashlib.sha256(raw).hexdigest() == pack.HELDOUT_SHA256
    assert pack.heldout() == [json.loads(line)["text"] for line in raw.decode().split("\n") if line]


@pytest.mark.parametrize("damage", ["other text", "cut short", "missing"])
def test_a_damaged_pack_is_refused(damage: str, tmp_path, monkeypatch) -> None:
    content = lzma.compress(b'{"source": "x", "text": "other"}\n')
    if damage != "missing":
        path = tmp_path / "calibration.jsonl.xz"
        path.write_bytes(content if damage == "other text" else content[:20])
    monkeypatch.setattr(pack, "resources", SimpleNamespace(files=lambda _: tmp_path))
    with pytest.raises(RuntimeError, match="reinstall"):
        pack.rows("calibration")


def test_sizes() -> None:
    calibration = sum(len(text) for text in pack.calibration())
    heldout = sum(len(text) for text in pack.heldout())
    assert calibration > 8_000_000  # 128 x 2048 tokens even at 30 characters a token
    assert 200_000 < heldout < 500_000
    packed = resources.files("autoround.calib.pack").joinpath("calibration.jsonl.xz")
    assert len(packed.read_bytes()) < 3_000_000


def test_every_stretch_of_the_calibration_pack_mixes_the_sources() -> None:
    rows = pack.rows("calibration")
    shares = Counter(row.source for row in rows)
    assert len(shares) > 15
    for start in (0, len(rows) // 2, len(rows) - 100):
        assert len({row.source for row in rows[start : start + 100]}) >= 15
    texts = Counter()
    for row in rows:
        texts[row.source] += len(row.text)
    assert max(texts.values()) < 0.15 * sum(texts.values())


def _word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return set(zip(*(words[shift:] for shift in range(length)), strict=False))


def test_heldout_shares_no_run_of_thirteen_words_with_calibration() -> None:
    heldout = set[tuple[str, ...]]().union(*(_word_runs(t, 13) for t in pack.heldout()))
    assert len(heldout) > 30_000
    shared = [run for text in pack.calibration() for run in heldout & _word_runs(text, 13)]
    # The builder counts "_" as part of a word and this test does not, hence "nearly none".
    assert len(shared) < len(heldout) / 5_000, shared[:5]


def test_heldout_shares_no_long_line_with_calibration() -> None:
    def lines(texts: list[str]) -> set[str]:
        return {line.strip() for text in texts for line in text.splitlines()}

    shared = {line for line in lines(pack.heldout()) & lines(pack.calibration()) if len(line) >= 60}
    assert not shared

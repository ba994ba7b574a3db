# SPDX-License-Identifier: Apache-2.0
"""Where calibration rows come from: Python objects, files, and the hub (with a stand-in)."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from autoround.calib import TokenSet, hub, load_tokens
from autoround.errors import InputError

ROWS = [[10 * n + k for k in range(4)] for n in range(1, 7)]


def load(dataset: Any, n: int = 6, seed: int = 0) -> TokenSet:
    return load_tokens(dataset, None, nsamples=n, seqlen=4, seed=seed)


class _Codes:
    """A tokenizer of one id per character, with the few members the loader uses."""

    eos_token_id = None
    chat_template = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def load_text(dataset: Any, n: int, seqlen: int = 4) -> list[str]:
    found = load_tokens(dataset, _Codes(), nsamples=n, seqlen=seqlen, seed=0)  # type: ignore[arg-type]
    return sorted("".join(map(chr, row)) for row in found.ids.tolist())


# --- Python objects -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        tuple(ROWS),
        torch.tensor(ROWS),
        [torch.tensor(row) for row in ROWS],
        [torch.tensor([row]) for row in ROWS],
        {"input_ids": ROWS},
        DataLoader(TensorDataset(torch.tensor(ROWS)), batch_size=4),
        DataLoader([{"input_ids": torch.tensor(row)} for row in ROWS], batch_size=5),
        DataLoader(TensorDataset(torch.tensor(ROWS), torch.ones(6, 4)), batch_size=4),
        DataLoader([torch.tensor(row) for row in ROWS], batch_size=4, collate_fn=list),  # type: ignore[arg-type]
        TensorDataset(torch.tensor(ROWS)),
        np.array(ROWS),
        [list(row) for row in np.array(ROWS)],
        ({"input_ids": row} for row in ROWS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_python_objects(dataset: Any) -> None:
    assert sorted(load(dataset).ids.tolist()) == ROWS


def test_a_dataloader_of_strings() -> None:
    loader = DataLoader(["abcd", "efgh", "ijkl"], batch_size=2)  # type: ignore[arg-type]
    assert load_text(loader, 3) == ["abcd", "efgh", "ijkl"]


def test_a_dataloader_of_texts_with_labels() -> None:
    loader = DataLoader([("abcd", 7), ("efgh", 8)], batch_size=2)  # type: ignore[arg-type]
    assert load_text(loader, 2) == ["abcd", "efgh"]


def test_an_endless_stream_is_read_only_as_far_as_needed() -> None:
    read = 0

    def rows() -> Iterator[list[int]]:
        nonlocal read
        while True:
            read += 1
            yield [read, read + 1, read + 2, read + 3]

    assert load(rows(), n=5).ids.shape == (5, 4)
    assert read < 100


def test_something_that_is_no_dataset() -> None:
    with pytest.raises(InputError, match="dataset of type int cannot be iterated"):
        load(3)


# --- files --------------------------------------------------------------------------------------


def test_jsonl_of_texts_with_blank_lines_and_unicode_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab\u2028d"}\n\n"efgh"\n', encoding="utf-8")
    assert load_text(str(path), 2) == ["ab\u2028d", "efgh"]
    assert load_text(path, 2) == ["ab\u2028d", "efgh"]  # a Path is a path


@pytest.mark.parametrize(
    "content",
    [
        ["abcd", "efgh"],
        [{"text": "abcd"}, {"text": "efgh"}],
        {"data": [{"text": "abcd"}, {"text": "efgh"}]},
        {"one": "abcd", "two": {"text": "efgh"}},
        {"text": ["abcd", "efgh"]},
        [{"anything": "abcd"}, {"whatever": "efgh"}],
    ],
)
def test_json(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert load_text(str(path), 2) == ["abcd", "efgh"]


def test_txt_is_one_document_cut_into_windows(tmp_path: Path) -> None:
    path = tmp_path / "a book.txt"
    path.write_text("abcdefghijkl")
    assert load_text(str(path), 3) == ["abcd", "efgh", "ijkl"]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = arrow.table({"text": ["abcd", "efgh", None], "other": [1, 2, 3]})
    parquet.write_table(table.slice(0, 2), path)
    assert load_text(str(path), 2) == ["abcd", "efgh"]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="not readable Parquet"):
        load_text(str(path), 1)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load_text(str(path), 1)


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("gone.jsonl", None, "does not exist"),
        ("a.csv", b"x", "ending in .jsonl, .json, .txt, .parquet"),
        ("a.jsonl", b'{"text": "ab"}\n{oops}\n', "line 2, is not readable JSON"),
        ("a.json", b'{"text": "ab"}\n{"text": "cd"}\n', "rename it to .jsonl"),
        ("a.json", b"3", "one bare value"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: bytes | None, fragment: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_text(str(path), 9)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_and_a_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give one file"):
        load_text(str(tmp_path), 1)
    with pytest.raises(InputError, match="has no splits"):
        load_text("bundled:split=train", 1)


# --- the hub ------------------------------------------------------------------------------------


class _FakeSplit(list[dict[str, Any]]):
    def shuffle(self, seed: int, buffer_size: int = 0) -> _FakeSplit:
        return _FakeSplit(reversed(self)) if seed % 2 else self


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A ``datasets`` module that records what was asked of it."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> _FakeSplit:
        calls.append((repo, config, split, streaming))
        if "absent" in repo:
            raise ConnectionError(f"Couldn't reach '{repo}' on the Hub\nlong story")
        rows = [{"text": f"{split}{n}", "code": f"c{n}", "list": [1]} for n in range(3)]
        return _FakeSplit(rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return calls


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pile-10k", ("NeelNanda/pile-10k", None, "train", False)),
        ("NeelNanda/pile-10k", ("NeelNanda/pile-10k", None, "train", False)),
        ("fineweb-edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)),
        ("owner/thing:split=odd", ("owner/thing", None, "odd", False)),
        ("opencode-instruct", ("nvidia/OpenCodeInstruct", None, "train", True)),
    ],
)
def test_hub_names(name: str, call: tuple[Any, ...], fake_datasets: list[Any]) -> None:
    if "code" in name:
        with pytest.raises(InputError):  # the stand-in has none of its columns, hence no text
            load_text(name, 1)
    else:
        assert load_text(name, 1, seqlen=3) != []
    assert fake_datasets == [call]


def test_mbpp_joins_its_columns_and_its_three_splits(fake_datasets: list[Any]) -> None:
    assert len(load_text("mbpp", 9, seqlen=8)) == 9
    assert [call[2] for call in fake_datasets] == ["train", "validation", "test"]


def test_a_dataset_that_is_not_there_is_not_replaced(fake_datasets: list[Any]) -> None:
    with pytest.raises(
        InputError, match=r"'owner/absent' .* cannot be loaded: Couldn't reach"
    ) as e:
        load_text("owner/absent", 1)
    assert "\n" not in str(e.value)


def test_unknown_bare_names_are_refused_without_asking_anybody(fake_datasets: list[Any]) -> None:
    with pytest.raises(InputError, match="neither a file nor a dataset known by that name"):
        load_text("pile10k", 1)
    assert fake_datasets == []


def test_every_name_is_checked_before_anything_is_loaded(fake_datasets: list[Any]) -> None:
    with pytest.raises(InputError, match=r"'gone\.txt' does not exist"):
        load_text("pile-10k, gone.txt", 4)
    assert fake_datasets == []


def test_hub_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install datasets"):
        load_text("pile-10k", 1)


def test_an_unreachable_hub_is_reported_quickly(
    fake_datasets: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be reached .* HF_HUB_OFFLINE=1"):
        load_text("pile-10k", 1)
    assert time.monotonic() - began < 8
    assert fake_datasets == []

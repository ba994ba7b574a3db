# SPDX-License-Identifier: Apache-2.0
"""`autoround plan`: what it says is what a run does."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from autoround import pipeline
from autoround.cli import run as command
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.outlook import outlook
from autoround.recipe import Recipe

Saved = Callable[..., Path]


def wanted(**changes: Any) -> Recipe:
    return build_recipe("rtn", {"group_size": 32, **changes})


CASES: list[tuple[str, dict[str, Any]]] = [
    (name, changes)
    for name in ("llama", "qwen3_moe")
    for changes in (
        {},
        {"format": "auto_gptq:v2,mlx,fake", "sym": False},
        {"max_shard_size": "1MB", "format": "llm_compressor"},
        {"layer_config": {"down_proj": {"bits": 8}}, "ignore_layers": ("layers.1.self_attn",)},
    )
] + [("gpt2", {"format": "auto_gptq:v2,fake:float32"})]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_files_are_as_large_as_planned(
    name: str, changes: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    source = pipeline.Source(saved(name), torch.device("cpu"))
    found = outlook(wanted(**changes), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pipeline.quantize(wanted(**changes), source, tmp_path / "out")
    files = {
        directory: {f.name: f.stat().st_size for f in directory.glob("*.safetensors")}
        for directory in found.files
    }
    assert files == found.files
    first = next(d for d in found.files if d.name != "canonical")
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little")
                  for f in first.glob("*.safetensors"))  # fmt: skip
    assert sum(kind.nbytes for kind in found.kinds) == sum(files[first].values()) - headers
    assert sum(kind.count for kind in found.kinds) == len(found.plan.fates)


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pipeline.Source(saved("llama"), torch.device("cpu"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"0.00 GB free, the run writes .*choose another -o"):
        outlook(wanted(), source, tmp_path / "out")


def test_the_command_takes_the_options_of_quantize(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "plan",
        str(saved("llama")),
        "--recipe",
        "rtn",
        "--bits",
        "3",
        "-o",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit) as end:
        command([*words, "--group-size", "32", "--ignore-layers", "down_proj"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert "3 bits" in out
    assert "asked for" in out
    assert "qgemm" in out
    assert not (tmp_path / "o").exists()

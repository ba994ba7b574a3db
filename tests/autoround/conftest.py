# SPDX-License-Identifier: Apache-2.0
"""Saved models that several test files read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo

SHARDED = {"llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saved zoo models, each written once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            shard = "60KB" if name in SHARDED else "5GB"
            path = tmp_path_factory.mktemp(name)
            made[name, dtype] = zoo.save(name, path, shard, dtype=dtype)
        return made[name, dtype]

    return get


@pytest.fixture
def llama(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama directory of several shards that a test may damage."""
    shutil.copytree(saved("llama"), tmp_path / "llama")
    return tmp_path / "llama"

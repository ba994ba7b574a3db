# SPDX-License-Identifier: Apache-2.0
"""Where hidden states lie: nothing is written over that someone still holds."""

import errno
import os
from pathlib import Path

import pytest
import torch

from autoround.errors import InputError
from autoround.models import Pool, Store
from autoround.models.store import available_bytes

CPU = torch.device("cpu")


def rows(n: int = 3) -> list[torch.Tensor]:
    return [torch.full((1, 5, 7), float(i), dtype=torch.bfloat16) for i in range(n)]


@pytest.mark.parametrize("in_file", [False, True])
def test_rows_keep_their_values(in_file: bool, tmp_path: Path) -> None:
    given = rows()
    store = Store(3, given[0], tmp_path if in_file else None, CPU)
    held = [store.put(i, row) for i, row in enumerate(given)]
    if in_file:
        store.rest()  # its pages come back when they are read
    assert all(torch.equal(row, value) for row, value in zip(held, given, strict=True))
    assert all(row.data_ptr() % 64 == 0 for row in held)
    assert not list(tmp_path.iterdir())  # the file has no name


@pytest.mark.parametrize("spill", [False, True])
def test_a_store_is_used_again_only_when_no_row_is_held(spill: bool, tmp_path: Path) -> None:
    pool, given = Pool(tmp_path, spill, CPU), rows()
    first = pool.take(3, given[0])
    assert first.in_file is spill
    held = [first.put(i, row).view(5, 7) for i, row in enumerate(given)]  # a view holds its row
    assert pool.take(3, given[0]) is not first
    del held[1:]
    assert pool.take(3, given[0]) is not first
    held.clear()
    assert pool.take(3, given[0]) is first
    assert pool.take(3, given[0].float()) is not first


def test_other_shapes_lie_elsewhere(tmp_path: Path) -> None:
    given = rows()
    store = Store(3, given[0], None, CPU)
    wide = torch.ones(1, 9, 7, dtype=torch.bfloat16)
    put = store.put(0, wide)
    assert torch.equal(put, wide)
    assert put.data_ptr() != wide.data_ptr()
    assert not store.held


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="no room for 0 MB of hidden states beside the output"):
        Pool(tmp_path, spill=True, device=CPU).take(3, rows()[0])
    assert not list(tmp_path.iterdir())


def test_more_than_half_of_memory_goes_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2**20 < available_bytes() < 2**50
    row = rows()[0]
    monkeypatch.setattr("autoround.models.store.available_bytes", lambda: 2 * 4 * 3 * 70)
    assert not Pool(tmp_path, spill=False, device=CPU).take(3, row).in_file
    monkeypatch.setattr("autoround.models.store.available_bytes", lambda: 2 * 4 * 3 * 70 - 2)
    assert Pool(tmp_path, spill=False, device=CPU).take(3, row).in_file

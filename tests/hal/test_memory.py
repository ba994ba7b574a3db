# SPDX-License-Identifier: Apache-2.0
"""Memory of large results: whole, aligned to pages, and given back with its tensor."""

import os
import sys

import pytest
import torch

from hal import memory


@pytest.mark.parametrize("nbytes", [0, 3, memory.LARGE - 2, memory.LARGE, memory.LARGE + 4098])
def test_every_byte_is_there(nbytes: int) -> None:
    t = memory.host((nbytes // 2, 2), torch.uint8)
    assert t.shape == (nbytes // 2, 2)
    assert t.is_contiguous()
    assert bool((t.fill_(165) == 165).all())
    if nbytes >= memory.LARGE:
        assert t.data_ptr() % memory.PAGE == 0


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_it_goes_with_its_last_view() -> None:
    before = resident()
    view = memory.host((memory.LARGE * 2,), torch.uint8).fill_(1)[5:].view(-1)
    assert resident() - before > memory.LARGE
    del view
    assert resident() - before < memory.LARGE // 2

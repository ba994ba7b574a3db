# SPDX-License-Identifier: Apache-2.0
"""Digests of tensors' bytes, to know them again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from hal import digest

PIECE = 1 << 22  # bytes; a tensor's digest is that of its pieces of this size


def examine(pieces: Iterable[Tensor]) -> tuple[str, bool]:
    """The digest of a tensor that comes in flat pieces of PIECE bytes, the last one shorter, and
    whether all of it is finite."""
    content, finite = hashlib.sha256(), True
    for piece in pieces:
        data = piece.contiguous()
        sums, sound = digest.sums(data)
        finite = finite and sound
        content.update(data.nbytes.to_bytes(8, "little"))
        content.update(memoryview(sums.numpy()))  # type: ignore[arg-type]
    return content.hexdigest()[:32], finite


def pieces(x: Tensor) -> Iterable[Tensor]:
    """The flat pieces of a tensor in the host's memory."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    size = PIECE // flat.element_size()
    return [flat[at : at + size] for at in range(0, len(flat), size)]


def of_tensor(x: Tensor) -> str:
    """The digest of the bytes of a tensor, wherever it is; not of its shape."""
    return examine(pieces(x))[0]


def of_file(path: Path) -> str:
    """sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]

# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors shards whose every byte is placed before the first tensor exists.

All names, dtypes and shapes are known from the plan, so the headers are written and the disk space
is claimed up front (a full disk fails before hours of tuning), and each tensor goes straight to its
place: memory never holds more than one.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from autoround.errors import InputError
from autoround.formats.contents import Stored

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.uint32: "U32", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
#: Dtypes of weights that a format may write in another.
FLOATS = ("F16", "BF16", "F32", "F64")
TORCH = {name: dtype for dtype, name in DTYPES.items()}
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    offset: int
    stored: Stored


class ShardSink:
    """``put`` every planned tensor once, in any order; leaving the context finishes the files.

    Until then they carry the suffix ``.partial``; an exception removes them. ``durable``: finished
    files are on the disk, not in the system's memory alone. ``metadata``: the ``format`` that the
    headers name. ``checksums``: CRC-32 of every tensor put whole.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[Stored],
        max_shard: int,
        *,
        durable: bool = True,
        metadata: str = "pt",
    ) -> None:
        self.directory, self._durable, self._metadata = directory, durable, metadata
        self._shards = _split(tensors, max_shard)
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []
        self._missing: dict[str, set[int]] = {}
        self.checksums: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """File names of the finished shards."""
        return _names(len(self._shards))

    def __enter__(self) -> Self:
        try:
            for index, shard in enumerate(self._shards):
                self._open(index, shard)
        except BaseException:
            self._discard()
            raise
        self._missing = {n: {*range(p.stored.pieces)} for n, p in self._places.items()}
        return self

    def _open(self, index: int, shard: list[Stored]) -> None:
        header = _header(shard, self._metadata)
        start, size = len(header), len(header) + sum(stored.nbytes for stored in shard)
        path = self.directory / (self.names[index] + PARTIAL)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._files.append(file)
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            raise InputError(
                f"{self.directory} cannot hold {size / 1e9:.2f} GB ({error.strerror}); "
                "free some space or choose another -o"
            ) from error
        os.pwrite(file, header, 0)
        for stored in shard:
            self._places[stored.name] = _Place(index, start, stored)
            start += stored.nbytes

    def put(self, name: str, tensor: Tensor, index: int = 0) -> None:
        """Write one tensor to its place; dtype and shape must be the planned ones.

        ``index``: which of the planned tensor's pieces (rows of its first dimension) it is.
        """
        planned = self._places[name].stored
        shape = planned.shape if planned.pieces == 1 else planned.shape[1:]
        if DTYPES.get(tensor.dtype) != planned.dtype or tuple(tensor.shape) != shape:
            raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not {planned}")
        self.put_bytes(name, tensor.detach().cpu().contiguous(), index)

    def put_bytes(self, name: str, raw: Tensor, index: int = 0) -> None:
        """Write one tensor's raw bytes, whatever its dtype (for exact copies)."""
        place = self._places[name]
        data = memoryview(raw.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        size = place.stored.nbytes // place.stored.pieces
        if len(data) != size or index not in self._missing[name]:
            raise AssertionError(f"{name}: {len(data)} bytes, planned {place.stored}, or put twice")
        if place.stored.pieces == 1:
            self.checksums[name] = zlib.crc32(data)
        file, offset = self._files[place.shard], place.offset + index * size
        while data:
            written = os.pwrite(file, data[: 1 << 28], offset)
            data, offset = data[written:], offset + written
        self._missing[name].discard(index)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        if missing := sorted(name for name, pieces in self._missing.items() if pieces):
            self._discard()
            raise AssertionError(f"never written: {missing[:5]}")
        self._finish()

    def _finish(self) -> None:
        for file in self._files:
            if self._durable:
                os.fsync(file)
            os.close(file)
        self._files = []
        for name in self.names:
            os.replace(self.directory / (name + PARTIAL), self.directory / name)
        if len(self._shards) > 1:
            self._write_index()

    def _write_index(self) -> None:
        names = self.names
        total = sum(p.stored.nbytes for p in self._places.values())
        weight_map = {name: names[p.shard] for name, p in sorted(self._places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = self.directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _discard(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []
        for name in self.names:
            (self.directory / (name + PARTIAL)).unlink(missing_ok=True)


def file_sizes(tensors: Sequence[Stored], max_shard: int, metadata: str) -> dict[str, int]:
    """Name and bytes of every file that a `ShardSink` writes for these tensors."""
    shards = _split(tensors, max_shard)
    sizes = [len(_header(shard, metadata)) + sum(t.nbytes for t in shard) for shard in shards]
    return dict(zip(_names(len(shards)), sizes, strict=True))


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _header(shard: Sequence[Stored], metadata: str) -> bytes:
    """The first bytes of a file: length, then names, dtypes, shapes and places, padded to 8."""
    header: dict[str, object] = {"__metadata__": {"format": metadata}}
    offset = 0
    for stored in shard:
        end = offset + stored.nbytes
        header[stored.name] = {
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _split(tensors: Sequence[Stored], max_shard: int) -> list[list[Stored]]:
    """Consecutive shards of at most ``max_shard`` bytes (a larger tensor has one of its own)."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        if shards[-1] and size + stored.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.nbytes
    return shards

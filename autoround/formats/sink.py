# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors shards whose every byte is placed before the first tensor exists.

All names, dtypes and shapes are known from the plan, so the headers are written and the disk space
is claimed up front (a full disk fails before hours of tuning), and each tensor goes straight to its
place: memory never holds more than one.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from autoround.errors import InputError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of the output: safetensors dtype name, shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    offset: int
    stored: Stored


class ShardSink:
    """``put`` every planned tensor once, in any order; leaving the context finishes the files.

    Until then they carry the suffix ``.partial``; an exception removes them. ``durable``: finished
    files are on the disk, not in the system's memory alone.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[Stored],
        max_shard: int,
        *,
        durable: bool = True,
    ) -> None:
        self.directory, self._durable = directory, durable
        self._shards = _split(tensors, max_shard)
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []
        self._missing: set[str] = set()

    @property
    def names(self) -> list[str]:
        """File names of the finished shards."""
        if len(self._shards) == 1:
            return ["model.safetensors"]
        count = len(self._shards)
        return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]

    def __enter__(self) -> Self:
        try:
            for index, shard in enumerate(self._shards):
                self._open(index, shard)
        except BaseException:
            self._discard()
            raise
        self._missing = set(self._places)
        return self

    def _open(self, index: int, shard: list[Stored]) -> None:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for stored in shard:
            end = offset + stored.nbytes
            row = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, end]}
            header[stored.name] = row  # type: ignore[assignment]
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start, size = 8 + len(text), 8 + len(text) + offset
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
        os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
        for stored in shard:
            self._places[stored.name] = _Place(index, start, stored)
            start += stored.nbytes

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; dtype and shape must be the planned ones."""
        planned = self._places[name].stored
        if DTYPES.get(tensor.dtype) != planned.dtype or tuple(tensor.shape) != planned.shape:
            raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not {planned}")
        self.put_bytes(name, tensor.detach().cpu().contiguous())

    def put_bytes(self, name: str, raw: Tensor) -> None:
        """Write one tensor's raw bytes, whatever its dtype (for exact copies)."""
        place = self._places[name]
        data = memoryview(raw.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if len(data) != place.stored.nbytes or name not in self._missing:
            raise AssertionError(f"{name}: {len(data)} bytes, planned {place.stored}, or put twice")
        file, offset = self._files[place.shard], place.offset
        while data:
            written = os.pwrite(file, data[: 1 << 28], offset)
            data, offset = data[written:], offset + written
        self._missing.discard(name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        if self._missing:
            self._discard()
            raise AssertionError(f"never written: {sorted(self._missing)[:5]}")
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

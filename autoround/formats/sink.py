# SPDX-License-Identifier: Apache-2.0
"""Writes safetensors shards whose every byte is placed before the first tensor exists.

All names, dtypes and shapes are known from the plan, so the headers are written and the disk space
is claimed up front (a full disk fails before hours of tuning), and each tensor goes straight to its
place: memory never holds more than one.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from autoround.errors import InputError
from autoround.formats.contents import Stored
from hal.digest import crc32

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
PIECE = 1 << 28  # bytes written or read at a time
AGAIN = "check the disk, then start over with --fresh"


@dataclass(frozen=True, slots=True)
class _Place:
    shard: int
    offset: int
    stored: Stored


class ShardSink:
    """``put`` every planned tensor once (or again, as it is), in any order; leaving the context
    finishes the files.

    Until then they carry the suffix ``.partial``; an exception removes them, unless something in
    them is `settle`d. ``durable``: finished files are on the disk, not in the system's memory
    alone. ``metadata``: the ``format`` that the headers name. ``crcs``: tensor -> CRC-32 of each of
    its pieces, None = not written yet. Given ``settled``, an earlier ``crcs`` of the same files,
    they are opened again, and what it has is proven to be there.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[Stored],
        max_shard: int,
        *,
        durable: bool = True,
        metadata: str = "pt",
        settled: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        self.directory, self._durable, self._metadata = directory, durable, metadata
        self._shards = _split(tensors, max_shard)
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []
        self._settled = settled
        self.crcs: dict[str, list[int | None]] = {t.name: [None] * t.pieces for t in tensors}

    @property
    def names(self) -> list[str]:
        """File names of the finished shards."""
        return _names(len(self._shards))

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of every tensor written whole, by its name."""
        return {n: c[0] for n, c in self.crcs.items() if len(c) == 1 and c[0] is not None}

    def __enter__(self) -> Self:
        try:
            for index, shard in enumerate(self._shards):
                header = _header(shard, self._metadata)
                if self._settled is None:
                    self._create(index, shard, header)
                else:
                    self._reopen(index, header)
                start = len(header)
                for stored in shard:
                    self._places[stored.name] = _Place(index, start, stored)
                    start += stored.nbytes
            self._prove()
        except BaseException:
            self._leave()
            raise
        return self

    def _create(self, index: int, shard: list[Stored], header: bytes) -> None:
        size = len(header) + sum(stored.nbytes for stored in shard)
        path = self.directory / (self.names[index] + PARTIAL)
        path.unlink(missing_ok=True)  # it may be a link, or a pipe
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

    def _reopen(self, index: int, header: bytes) -> None:
        name = self.names[index]
        found = [self.directory / n for n in (name + PARTIAL, name)]
        path = next((p for p in found if p.is_file()), found[0])
        try:
            self._files.append(os.open(path, os.O_RDWR))
            begun = os.pread(self._files[-1], len(header), 0)
            held = os.fstat(self._files[-1]).st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; {AGAIN}") from error
        size = len(header) + sum(stored.nbytes for stored in self._shards[index])
        if begun != header or held != size:
            raise InputError(f"{path} is not the file that the run began; {AGAIN}")

    def _prove(self) -> None:
        """What is settled must be there, byte for byte."""
        for name, crcs in (self._settled or {}).items():
            for index, crc in enumerate(crcs):
                if crc is not None and zlib.crc32(self.read_bytes(name, index)) != crc:
                    raise InputError(
                        f"{self.directory}: {name} is not what was written there; {AGAIN}"
                    )
            self.crcs[name] = [*crcs]

    def settle(self) -> None:
        """Have all that is written on the disk; from now on an exception leaves the files."""
        for file in self._files:
            os.fsync(file)
        self._settled = self._settled or {}

    def read_bytes(self, name: str, index: int = 0) -> bytes:
        """One tensor, or one of its pieces, as the files have it."""
        place = self._places[name]
        size = place.stored.nbytes // place.stored.pieces
        data, offset = bytearray(), place.offset + index * size
        while len(data) < size:
            piece = os.pread(self._files[place.shard], min(size - len(data), PIECE), offset)
            if not piece:
                raise InputError(f"{self.directory}: {name} is cut short; {AGAIN}")
            data += piece
            offset += len(piece)
        return bytes(data)

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
        flat = raw.reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        size = place.stored.nbytes // place.stored.pieces
        crc, before = crc32(flat), self.crcs[name][index]
        if len(data) != size or before not in (None, crc):
            raise AssertionError(f"{name}: {len(data)} bytes, planned {place.stored}, or put twice")
        file, offset = self._files[place.shard], place.offset + index * size
        while data:
            written = os.pwrite(file, data[:PIECE], offset)
            data, offset = data[written:], offset + written
        self.crcs[name][index] = crc

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._leave()
            return
        if missing := sorted(name for name, crcs in self.crcs.items() if None in crcs):
            self._leave()
            raise AssertionError(f"never written: {missing[:5]}")
        self._finish()

    def _finish(self) -> None:
        for file in self._files:
            if self._durable:
                os.fsync(file)
            os.close(file)
        self._files = []
        for name in self.names:
            partial = self.directory / (name + PARTIAL)
            if partial.exists() or self._settled is None:  # a run that was cut off here
                os.replace(partial, self.directory / name)
        if len(self._shards) > 1:
            self._write_index()

    def _write_index(self) -> None:
        names = self.names
        total = sum(p.stored.nbytes for p in self._places.values())
        weight_map = {name: names[p.shard] for name, p in sorted(self._places.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        path = self.directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")

    def _leave(self) -> None:
        """Close the files; remove them, unless they hold what is settled."""
        for file in self._files:
            os.close(file)
        self._files = []
        if self._settled is not None:
            return
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

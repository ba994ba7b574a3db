# SPDX-License-Identifier: Apache-2.0
"""One model in one format: planned to the byte, then written weight by weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hal
from autoround.errors import InputError
from autoround.formats.contents import Contents, Module, Stored
from autoround.formats.row import Format, Packing, Parts, furthest, in_order
from autoround.formats.sink import DTYPES, TORCH, ShardSink
from autoround.formats.table import choose
from autoround.header import BITS
from hal import QTensor
from hal.digest import crc32


@dataclass(frozen=True, slots=True)
class Target:
    """What a format makes of the contents: packing, and every tensor of the files."""

    format: Format
    packing: Packing
    contents: Contents
    stored: tuple[Stored, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.stored)

    @property
    def exact(self) -> bool:
        """Whether the files give back every code, scale and zero level as it was found."""
        return self.packing.read is not None

    def config(self) -> dict[str, Any]:
        """What config.json gets beside the source's own keys."""
        return self.format.config(self.contents, self.packing)


#: Pieces of one output tensor: index of the piece -> safetensors dtype and shape.
Pieces = dict[int | None, tuple[str, tuple[int, ...]]]
#: Tensors of the files, each with the piece of it.
Written = list[tuple[str, int]]


def target(format: Format, contents: Contents) -> Target:
    """Plan one directory. Raises InputError where the format cannot hold the contents."""
    packing = choose(format, list(contents.modules.values()))
    if reason := format.refuse(contents):
        raise InputError(f"format {format.name}: {reason}; use --format auto_round")
    pieces: dict[str, Pieces] = {}
    for key, tensor in contents.tensors.items():
        if module := contents.modules.get(key):
            place = format.place(module.name)
            for suffix, (dtype, shape) in packing.stored(module, contents).items():
                own = pieces.setdefault(f"{place.name}.{suffix}", {})
                own[place.index] = (DTYPES[dtype], shape)
        else:
            place = format.place(key)
            own = pieces.setdefault(place.name, {})
            own[place.index] = (format.cast(tensor.dtype, contents), tensor.shape)
    stored = (_stored(format, name, own) for name, own in pieces.items())
    return Target(format, packing, contents, tuple(stored))


def _stored(format: Format, name: str, pieces: Pieces) -> Stored:
    """One tensor of the files. Raises InputError where its pieces do not make one."""
    dtype, shape = next(iter(pieces.values()))
    count = len(pieces)
    if None in pieces:
        return Stored(name, dtype, shape, math.prod(shape) * BITS[dtype] // 8)
    if {*pieces} != {*range(count)} or len({*pieces.values()}) > 1:
        raise InputError(
            f"format {format.name} stores the experts of a layer as one tensor, {name}: "
            "give all of them one scheme"
        )
    size = count * math.prod(shape) * BITS[dtype] // 8
    return Stored(name, dtype, (count, *shape), size, count)


class Export:
    """Writes a target: `put` every module, `keep` every other tensor, once, in any order, while
    ``sink`` is open.

    ``errors``: module or tensor -> largest difference between what was given and what a reader
    makes of the files; empty = exact. ``numbers``, of an exact target: module -> `fingerprint`.
    """

    def __init__(
        self,
        target: Target,
        directory: Path,
        max_shard: int,
        *,
        durable: bool = True,
        settled: Mapping[str, Sequence[int | None]] | None = None,
    ) -> None:
        """``settled``: what an earlier process wrote to the same files, see `ShardSink`."""
        self.target, self.directory = target, directory
        self.errors: dict[str, float] = {}
        self.numbers: dict[str, str] = {}
        self.sink = ShardSink(
            directory, target.stored, max_shard,
            durable=durable, metadata=target.format.metadata, settled=settled,
        )  # fmt: skip

    @property
    def checksums(self) -> Mapping[str, int]:
        """CRC-32 of every tensor written whole, by its name in the files."""
        return self.sink.checksums

    def put(self, module: Module, q: QTensor) -> Written:
        """Pack and write one module's weight, plain or a stream; what it became."""
        target = self.target
        place = target.format.place(module.name)
        parts: Parts = target.packing.pack(q, module, target.contents)
        if target.packing.loss is not None:
            self._lost(module.name, target.packing.loss(q, parts))
        if target.exact:
            self.numbers[module.name] = fingerprint(q)
        written: Written = []
        for suffix, tensor in parts.items():
            written.append((f"{place.name}.{suffix}", place.index or 0))
            self.sink.put(written[-1][0], tensor, written[-1][1])
        return written

    def keep(self, key: str, raw: Tensor) -> Written:
        """Write one tensor that stays, in the dtype the format wants; what it became."""
        place, dtype = self.target.format.place(key), self.target.contents.tensors[key].dtype
        wanted = self.target.format.cast(dtype, self.target.contents)
        if wanted != dtype:
            given, raw = raw, raw.to(TORCH[wanted])
            self._lost(key, furthest(raw, given))
        self.sink.put_bytes(place.name, raw.contiguous(), place.index or 0)
        return [(place.name, place.index or 0)]

    def read(self, module: Module) -> QTensor:
        """One module's plain weight, from what is written of it by an exact target."""
        place, packing, parts = self.target.format.place(module.name), self.target.packing, {}
        assert packing.read is not None
        for suffix, (dtype, shape) in packing.stored(module, self.target.contents).items():
            raw = bytearray(self.sink.read_bytes(f"{place.name}.{suffix}", place.index or 0))
            parts[suffix] = torch.frombuffer(raw, dtype=dtype).view(shape)
        return packing.read(module, parts)

    def _lost(self, name: str, error: float) -> None:
        if not math.isfinite(error):
            raise InputError(
                f"{self.target.contents.home}: {name} leaves the range of format "
                f"{self.target.format.name}; use another format"
            )
        if error:
            self.errors[name] = error


def fingerprint(q: QTensor) -> str:
    """What `verify` knows a weight by: CRC-32 of its codes, scales, zero levels and groups.

    Codes as a stream along K in the matrix's own order (formats.md 0.4), i32 [N, K bits / 32];
    scales as stored [N, G]; zero levels u8 [N, G], symmetric ones too; groups of columns, i32 [K].
    """
    natural, groups = in_order(q)
    codes, scale = hal.pack(natural, "stream").parts["qweight"], q.parts["scale"]
    zero = q.parts.get("zero")
    if zero is None:
        zero = torch.full(scale.shape, q.spec.half, dtype=torch.uint8)
    parts = (codes, scale, zero, groups)
    return " ".join(f"{crc32(part.detach().cpu().contiguous()):08x}" for part in parts)

# SPDX-License-Identifier: Apache-2.0
"""What a run writes: weights to all formats at once, and what stands beside them."""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from autoround.checkpoint import companions
from autoround.formats import CANONICAL, RECORD, Contents, Export, Module, Target
from autoround.formats.canonical import to_json
from autoround.formats.export import Written
from autoround.header import read_header
from autoround.run.journal import settle
from autoround.run.ledger import Ledger
from hal import QTensor

#: The fate of a tensor that stays in its dtype and was tuned.
TUNED = "tuned"
#: Bytes of tensors that wait to be written while the next is made.
AHEAD = 32 << 20
#: What a journal holds of the files: fates of tensors, and for every directory the tensor and piece
#: that each became, with its CRC-32.
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Handed:
    """A tensor that the writers have, one for each directory."""

    key: str
    fate: str
    nbytes: int
    writing: list[Future[Written]]


class Artefact(ExitStack):
    """A run's directory: every format in it; weights go to all at once.

    With one format its files lie in ``output`` itself, with several each has a directory of its
    name there, our own ``output/canonical``. One at least is exact: from it every other format can
    be made later (`autoround.export`), and weights are read again here. ``ledger``: what became of
    every tensor, once it is written.
    ``rows``: what `settle` gave to an earlier process for the same files; they are opened again.
    Leaving the context finishes the files of weights; without `describe` no reader takes a
    directory for a model.
    """

    def __init__(
        self, contents: Contents, targets: Sequence[Target], output: Path, max_shard: int,
        *, durable: bool = True, rows: Sequence[Row] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.contents, self._durable = contents, durable
        settled = [_settled(target, n, rows) if rows else None for n, target in enumerate(targets)]
        self.exports = tuple(
            Export(target, place, max_shard, durable=durable, settled=held)
            for target, place, held in zip(targets, places(targets, output), settled, strict=True)
        )
        self.ledger = Ledger(places=tuple({} for _ in self.exports))
        for row in rows:
            self._recall(row)
        self._threads: list[ThreadPoolExecutor] = []
        self._writing: deque[_Handed] = deque()
        self._told = len(self.ledger.fates)

    def _recall(self, row: Row) -> None:
        self._forget(_rewritten(row, self.contents))
        for key, fate in row["fates"].items():
            written = [[(n, i) for n, i, _ in own["places"][key]] for own in row["exports"]]
            self.ledger.enter(key, fate, written)
        for export, own in zip(self.exports, row["exports"], strict=True):
            export.errors.update(own["errors"])
            export.numbers.update(own["numbers"])

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for export in self.exports:
                export.directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(export.sink)
            # Packing, checksums and writing go on while the next weight is tuned.
            threads = (torch.set_num_threads, (torch.get_num_threads(),))
            self._threads = [
                stack.enter_context(ThreadPoolExecutor(1, f"write {n}", *threads))
                for n in range(len(self.exports))
            ]
            stack.push(self._stop)
            self.push(stack.pop_all())
        return self

    def put(self, module: Module, q: QTensor) -> None:
        """Write one module's weight, plain or a stream; its tensors must not change afterwards."""
        fate = f"quantized {q.spec}"
        self._hand(module.key, fate, q.nbytes, lambda export: export.put(module, q))

    def keep(self, key: str, raw: Tensor, because: str | None) -> None:
        """Write one tensor that stays."""
        fate = f"copied: {because}" if because else "copied"
        self._hand(key, fate, raw.nbytes, lambda export: export.keep(key, raw))

    def tune(self, key: str, raw: Tensor) -> None:
        """Write one tensor that stays in its dtype, with values of its own."""
        self._hand(key, TUNED, raw.nbytes, lambda export: export.keep(key, raw))

    def leave(self, key: str, fate: str) -> None:
        """Write nothing of one tensor."""
        self._wait()
        self.ledger.enter(key, fate, [[] for _ in self.exports])

    def _hand(self, key: str, fate: str, nbytes: int, write: Callable[[Export], Written]) -> None:
        self._wait(AHEAD)
        pairs = zip(self._threads, self.exports, strict=True)
        writing = [thread.submit(write, export) for thread, export in pairs]
        self._writing.append(_Handed(key, fate, nbytes, writing))

    def _wait(self, ahead: int = -1) -> None:
        """Until so many bytes at most are still to be written; without, until nothing is. Raises
        what the writers raised."""
        while self._writing and sum(handed.nbytes for handed in self._writing) > ahead:
            handed = self._writing.popleft()
            written = [future.result() for future in handed.writing]
            self.ledger.enter(handed.key, handed.fate, written)

    def settle(self) -> Row:
        """Have all that was put on the disk; what was, since the last time."""
        self._wait()
        pairs = zip(self._threads, self.exports, strict=True)
        for future in [thread.submit(export.sink.settle) for thread, export in pairs]:
            future.result()
        new = dict(islice(self.ledger.fates.items(), self._told, None))
        self._told = len(self.ledger.fates)
        modules = [self.contents.modules[key].name for key in new if key in self.contents.modules]
        exports = [
            {
                "places": {
                    key: [(name, i, export.sink.crcs[name][i]) for name, i in own[key]]
                    for key in new
                },
                "errors": export.errors,
                "numbers": {
                    name: export.numbers[name] for name in modules if name in export.numbers
                },
            }
            for export, own in zip(self.exports, self.ledger.places, strict=True)
        ]
        return {"fates": new, "exports": exports}

    def withdraw(self, tuned: Collection[str]) -> None:
        """What is written of weights, and of other ``tuned`` tensors of the source, counts as not
        written; codes and zero levels in exact files stay, `put` must give them as they are."""
        self._wait()
        keys = [*self.contents.modules, *tuned]
        for export, places in zip(self.exports, self.ledger.places, strict=True):
            for key in keys:
                for name, index in places.get(key, ()):
                    if _moves(export.target, key, name):
                        export.sink.crcs[name][index] = None
        self._forget(keys)

    def _forget(self, keys: Sequence[str]) -> None:
        """What the ledger and the exports know of tensors."""
        self.ledger.withdraw(keys)
        self._told = len(self.ledger.fates)
        for export in self.exports:
            for key in keys:
                module = self.contents.modules.get(key)
                export.errors.pop(module.name if module else key, None)
                export.numbers.pop(module.name if module else key, None)

    def _stop(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._wait()

    def read(self, module: Module) -> QTensor:
        """One module's weight, from what is written of it."""
        return next(export for export in self.exports if export.target.exact).read(module)

    def describe(self, run: Mapping[str, Any]) -> None:
        """Everything beside the weights; ``run``: what the run knows of itself.

        config.json comes last: without it no reader takes a directory for a finished model.
        """
        for export in self.exports:
            write_companions(self.contents.home, export.directory)
            record = {**run, **_own_record(export)}
            (export.directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            _write_config(export)
            if self._durable:
                _settle_beside(export.directory, export.sink.names)

    def balance(self, source: Collection[str], planned: Mapping[str, str]) -> None:
        """`Ledger.balance`, against the finished files."""
        outputs = []
        for export in self.exports:
            pieces = {stored.name: stored.pieces for stored in export.target.stored}
            found = [n for file in export.sink.names for n in read_header(export.directory / file)]
            outputs.append({name: pieces.get(name, 1) for name in found})
        self.ledger.balance(source, planned, outputs)


def _settled(target: Target, n: int, rows: Sequence[Row]) -> dict[str, list[int | None]]:
    """What rows say of the files of the n-th target: CRC-32 of every piece of every tensor."""
    crcs: dict[str, list[int | None]] = {t.name: [None] * t.pieces for t in target.stored}
    moving: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        for key in _rewritten(row, target.contents):
            for name, index in moving.get(key, ()):
                crcs[name][index] = None
        for key, places in row["exports"][n]["places"].items():
            for name, index, crc in places:
                crcs[name][index] = crc
            moving[key] = [(name, i) for name, i, _ in places if _moves(target, key, name)]
    return crcs


def _rewritten(row: Row, contents: Contents) -> list[str]:
    """Tensors that were to be written anew after this row (`autoround.run.whole`)."""
    found = row.get("scales")
    return [*contents.modules, *found["tuned"]] if found and found["file"] else []


def _moves(target: Target, key: str, name: str) -> bool:
    """Whether a tensor is another once ``key`` is tuned; codes in exact files are not."""
    weight = target.exact and key in target.contents.modules
    return not weight or name.rpartition(".")[2] == target.packing.scales


def _settle_beside(directory: Path, shards: Collection[str]) -> None:
    """Have on the disk what stands beside the weights, and every name."""
    for path in directory.iterdir():
        if path.is_file() and path.name not in shards:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    settle(directory)


def places(targets: Sequence[Target], output: Path) -> list[Path]:
    """The directory of every target below ``output``."""
    named = [t for t in targets if t.format is not CANONICAL]
    return [
        output / CANONICAL.name
        if t.format is CANONICAL
        else output / t.format.name.replace(":", "-")
        if len(named) > 1
        else output
        for t in targets
    ]


def _own_record(export: Export) -> dict[str, Any]:
    """What is true of one directory: its format, what it lost, its bytes, its contents.

    ``numbers`` and ``contents``, of exact files only, make them a run's own: proven without others
    (`verify`), and what other formats are made from.
    """
    target = export.target
    own: dict[str, Any] = {
        "format": target.format.name,
        "packing": target.packing.name,
        "largest_error": max(export.errors.values(), default=0.0),
        "checksums": {name: f"{crc:08x}" for name, crc in sorted(export.checksums.items())},
    }
    if target.exact:
        own["numbers"] = dict(sorted(export.numbers.items()))
        own["contents"] = to_json(target.contents)
    return own


def write_companions(home: Path, output: Path) -> None:
    """Tokenizer and every other file that travels with the model."""
    for path in companions(home):
        target = output / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(home / path, target)


def _write_config(export: Export) -> None:
    own = export.target.config()
    for name in export.target.format.files:
        text = json.dumps(own["quantization_config"], indent=2) + "\n"
        (export.directory / name).write_text(text)
    dtype = own.pop("torch_dtype", None)
    config = {**export.target.contents.config, **own}
    partial = export.directory / "config.json.partial"
    text = json.dumps(_in_dtype(config, dtype) if dtype else config, indent=2, ensure_ascii=False)
    partial.write_text(text + "\n")
    partial.replace(export.directory / "config.json")


def _in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config of a model whose floats are written in another dtype, at every level."""
    named: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {
        "dtype": dtype
    }
    inner = {
        key: _in_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict) and "dtype" in str(value.keys())
    }
    return {**config, **named, **inner}

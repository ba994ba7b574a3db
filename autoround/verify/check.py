# SPDX-License-Identifier: Apache-2.0
"""`verify`: a directory held against the run it came from, tensor by tensor.

Exact files carry what the run knew of them (checksums of every tensor, fingerprints of the weights
before they were packed, the contents): they are proven alone. Others are held against exact ones.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from autoround.checkpoint import INDEX, Checkpoint
from autoround.errors import InputError
from autoround.files import read_json
from autoround.formats import (
    FORMATS,
    RECORD,
    UNREADABLE,
    Contents,
    Format,
    Module,
    Quantized,
    own_files,
    record_of,
    run_of,
)
from autoround.formats.row import Place, furthest
from autoround.verify import decode
from autoround.verify.claims import RULES, Claim
from autoround.verify.compare import apart, foreign, same_bytes, unlike, unsound
from autoround.verify.decode import Numbers
from autoround.verify.verdict import Verdict
from hal.digest import crc32

Task = Callable[[], None]
#: Bytes of a tensor that are compared at one time.
PIECE = 32 << 20
#: Where readers look for the quantization beside config.json.
COPIES = ("quantization_config.json", "quantize_config.json")


def verify(
    directory: str | Path, against: str | Path | None = None, *, trusted: bool = False
) -> Verdict:
    """Compare a finished directory with the run it came from.

    ``against``: the run, or any quantized directory; None = the record in ``directory`` if that is
    exact, else a run in or beside it. ``trusted``: the run's own checksums were compared a moment
    ago. Every difference is in the verdict. Raises InputError only where there is nothing to read.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json; give the directory of a finished model")
    given = None if against is None else _given(Path(against))
    verdict = Verdict(path, "?")
    try:
        run = run_of(path) if given is None else given
        verdict.against = None if run is None or run.resolve() == path.resolve() else run
        _Check(path, verdict.against, verdict).all(trusted=trusted)
    except InputError as error:
        verdict.differences.append(str(error))
    except UNREADABLE as error:
        verdict.differences.append(f"{path / RECORD} or config.json cannot be read: {error!r:.200}")
    return verdict


def prove(directories: Iterable[Path], against: str | Path | None = None) -> list[Verdict]:
    """`verify` for several exports of one run, whose own checksums are compared once."""
    verdicts: list[Verdict] = []
    for directory in directories:
        verdicts.append(verify(directory, against, trusted=bool(verdicts)))
    return verdicts


def _given(run: Path) -> Path:
    found = own_files(run)
    if found is None and not (run / "config.json").is_file():
        raise InputError(f"{run} is no run and no model: it has no config.json")
    return found or run


class _Check:
    """One comparison. Differences are collected, never raised."""

    def __init__(self, path: Path, run: Path | None, verdict: Verdict) -> None:
        self.path, self.verdict, self._lock = path, verdict, Lock()
        self.checkpoint = Checkpoint(path, quantized=True)
        own = self.checkpoint.config.get("quantization_config")
        dense = not own and "quantization" not in self.checkpoint.config
        self.files = None if dense else Quantized(path)
        self.record = record_of(path)
        self.run = Quantized(run) if run else None
        own = self.run or self.files
        self.contents: Contents | None = None
        if own is not None and own.own:
            self.contents = own.recorded_contents()
        elif self.run is not None:
            self.contents = self.run.contents()
        verdict.format = str(self.record.get("format") or (self.files and self.files.dialect.name))

    def all(self, *, trusted: bool) -> None:
        self._index()
        self._copies()
        tasks: list[Task] = []
        if self.run is None:
            tasks += self._checksums(self.checkpoint, self.record, "")
            self.verdict.checksums = len(tasks)
            if self.files is not None and self.contents is not None:
                self.verdict.recorded = True
                tasks += self._packed(self.contents, self.files, self._as_recorded)
                self._all_kept(self.contents)
            elif self.files is not None:
                tasks += self._alone(self.files)
        else:
            assert self.contents is not None
            if not trusted:
                tasks += self._checksums(self.run.checkpoint, self.run.record, "the run's ")
            if self.files is None:
                tasks += self._dense(self.contents, self.run)
            else:
                tasks += self._packed(self.contents, self.files, partial(self._as_there, self.run))
            tasks += self._kept(self.contents, self.run)
        _side_by_side(partial(self._guarded, task) for task in tasks)
        self.verdict.differences.sort()

    def _guarded(self, task: Task) -> None:
        """What lies about its shape can fail anywhere: a difference like any other."""
        try:
            task()
        except UNREADABLE as error:
            self._differs(f"{_subject(task)} cannot be compared: {error!r:.200}")

    def _differs(self, text: str) -> None:
        with self._lock:
            if text not in self.verdict.differences:
                self.verdict.differences.append(text)

    def _all_differ(self, name: str, texts: Iterable[str]) -> None:
        for text in texts:
            self._differs(f"{name}: {text}")

    def _index(self) -> None:
        """The index, where there is one: as many bytes as there are, no tensor left out."""
        if not (self.path / INDEX).is_file():
            return
        index = read_json(self.path / INDEX)
        total = index.get("metadata", {}).get("total_size")
        if total is not None and total != (held := self.checkpoint.total_bytes):
            self._differs(f"{INDEX} says {total} bytes, the tensors have {held}")
        for name in self.checkpoint.entries.keys() - index["weight_map"].keys():
            self._differs(f"{name} is in a file and not in {INDEX}")

    def _copies(self) -> None:
        """Some readers look for ``quantization_config`` in a file of its own."""
        own = self.checkpoint.config.get("quantization_config")
        for name in COPIES:
            if (self.path / name).is_file() and read_json(self.path / name) != own:
                self._differs(f"{name} is not what config.json says")

    def _checksums(
        self, checkpoint: Checkpoint, record: dict[str, Any], whose: str
    ) -> Iterator[Task]:
        """Every tensor's bytes against the checksum taken when it was written."""
        for name, crc in (record.get("checksums") or {}).items():
            if name not in checkpoint.entries:
                self._differs(f"{whose}{name} is missing")
            else:
                yield partial(self._checksum, checkpoint, name, crc, whose)

    def _checksum(self, checkpoint: Checkpoint, name: str, crc: str, whose: str) -> None:
        found = 0
        for rows in _pieces(checkpoint, name):
            found = crc32(checkpoint.get(name, rows), found)
        if f"{found:08x}" != crc:
            self._differs(f"{whose}{name} is not what was written: its checksum differs")

    def _alone(self, files: Quantized) -> Iterator[Task]:
        """Without a run: every module decodes, and is what the config says."""
        self.verdict.modules = len(files.modules)

        def look(name: str) -> None:
            if (numbers := self._numbers(files, name)) is not None:
                self._all_differ(name, unsound(numbers))
                self._claimed(name, numbers, _inside(name))

        for name in files.modules:
            yield partial(look, name)

    def _packed(
        self, contents: Contents, files: Quantized, compare: Callable[[Module, Numbers], None]
    ) -> Iterator[Task]:
        """Packed modules: the same ones, with the same numbers, as the config says."""
        names = {module.name for module in contents.modules.values()}
        for name in sorted(names - {*files.modules}):
            self._differs(f"{name} is quantized in the run and has no codes here")
        for name in sorted({*files.modules} - names):
            self._differs(f"{name} has codes here and is not quantized in the run")
        here = [module for module in contents.modules.values() if module.name in files.homes]

        def look(module: Module) -> None:
            found = self._numbers(files, module.name)
            if found is not None:
                self._all_differ(module.name, unsound(found))
                compare(module, found)
                self._claimed(module.name, found, contents.inside(module.name))

        self.verdict.modules = len(here)
        self._unclaimed(contents, files)
        for module in here:
            yield partial(look, module)

    def _as_there(self, run: Quantized, module: Module, found: Numbers) -> None:
        """Against the run's files."""
        expected = self._numbers(run, module.name)
        if expected is not None:
            self._all_differ(module.name, unlike(found, expected))
            self._lost(apart(found, expected))

    def _as_recorded(self, module: Module, found: Numbers) -> None:
        """Against what the run knew of the weight."""
        told = (self.record.get("numbers") or {}).get(module.name)
        self._all_differ(module.name, foreign(found, told))

    def _numbers(self, files: Quantized, name: str) -> Numbers | None:
        try:
            return _decoded(files, name)
        except UNREADABLE as error:
            self._differs(f"{name} cannot be decoded: {error}")
            return None

    def _claimed(self, name: str, numbers: Numbers, inside: bool) -> None:
        """The config must say of the module what its tensors show."""
        try:
            claim = self._claim(name, inside)
        except UNREADABLE as error:
            self._differs(f"config.json does not say what {name} is: {error!r:.200}")
            return
        if claim is None:
            self._differs(f"{name} has codes, but config.json says it is not quantized")
            return
        k, count = numbers.shape[1], numbers.scale.shape[1]
        groups = 1 if claim.group_size <= 0 else -(-k // claim.group_size)
        if claim.bits != numbers.bits:
            self._differs(f"{name} has {numbers.bits} bits, config.json says {claim.bits}")
        elif groups != count:
            self._differs(
                f"{name} has {count} groups in {k} columns, config.json says group "
                f"{claim.group_size}"
            )
        elif claim.sym and not numbers.symmetric:
            self._differs(f"{name} has zero levels, config.json says symmetric")

    def _claim(self, name: str, inside: bool) -> Claim | None:
        config = self.checkpoint.config
        own = config.get("quantization") or config["quantization_config"]
        rule = "mlx" if "quantization" in config else own.get("quant_method", "mlx")
        home = name if self.files is None else self.files.homes.get(name, (name, None))[0]
        return RULES[rule](own, home if rule == "mlx" else name, inside)

    def _unclaimed(self, contents: Contents, files: Quantized) -> None:
        """What stays must not be said to be quantized."""
        kept = [name for name, scheme in contents.schemes.items() if scheme.spec is None]
        if files.dialect.name == "mlx":
            return  # its readers look for tensors, not claims
        for name in kept:
            try:
                claim = self._claim(name, contents.inside(name))
            except UNREADABLE:
                continue  # said of the quantized ones
            if claim is not None:
                self._differs(f"{name} stays in 16 bits, but config.json says it is quantized")

    def _dense(self, contents: Contents, run: Quantized) -> Iterator[Task]:
        """Dequantized modules: the run's numbers, rounded once to the dtype of the file."""

        def compare(module: Module) -> None:
            numbers = self._numbers(run, module.name)
            if module.key not in self.checkpoint.entries:
                self._differs(f"{module.key} is missing")
            elif numbers is not None:
                exact, found = numbers.weight(), self.checkpoint.get(module.key)
                found = found.t() if module.transposed else found
                if found.shape != exact.shape or not torch.equal(found, exact.to(found.dtype)):
                    self._differs(f"{module.key} is not the run's weight in {found.dtype}")
                else:
                    self._lost(furthest(found, exact))

        self.verdict.modules = len(contents.modules)
        for module in contents.modules.values():
            yield partial(compare, module)

    def _kept(self, contents: Contents, run: Quantized) -> Iterator[Task]:
        """Other tensors: the same bytes, or the same after a cast."""
        for name, place in self._all_kept(contents):
            yield partial(self._same_kept, run, name, place)

    def _all_kept(self, contents: Contents) -> list[tuple[str, Place]]:
        """Other tensors: all there, and nothing else; where each is."""
        format = _format(self.verdict.format)
        owned = self.files.owned if self.files else {*contents.modules}
        left = {name for name in self.checkpoint.entries if name not in owned}
        found = [(stored.name, format.place(stored.name)) for stored in contents.kept]
        here = [(name, place) for name, place in found if place.name in self.checkpoint.entries]
        for name, place in found:
            if place.name not in self.checkpoint.entries:
                self._differs(f"{name} is missing")
        for name in sorted(left - {place.name for _, place in here}):
            self._differs(f"{name} is here and not in the run")
        self.verdict.kept = len(here)
        return here

    def _same_kept(self, run: Quantized, name: str, place: Place) -> None:
        index = place.index
        piecewise = index is None and name.removesuffix(".weight") not in run.tables
        if (
            piecewise
            and self.checkpoint.entry(place.name).shape != run.checkpoint.entry(name).shape
        ):
            self._differs(f"{name} is not what the run has")
            return
        for rows in _pieces(run.checkpoint, name) if piecewise else [slice(None)]:
            want = run.checkpoint.get(name, rows) if piecewise else run.kept(name)
            own = rows if index is None else slice(index, index + 1)
            have = self.checkpoint.get(place.name, own)
            have = have if index is None else have[0]
            if not same_bytes(have, want.to(have.dtype)):
                self._differs(f"{name} is not what the run has")
                return
            if have.dtype != want.dtype:
                self._lost(furthest(have, want))

    def _lost(self, error: float) -> None:
        with self._lock:
            self.verdict.largest_error = max(self.verdict.largest_error, error)


def _decoded(files: Quantized, name: str) -> Numbers:
    """One module by the formula of its format."""
    parts, dialect = files.parts(name), files.dialect.name
    if dialect in ("gptq", "gptq_v2"):
        return decode.gptq(parts, minus_one=dialect == "gptq")
    if dialect == "awq":
        return decode.awq(parts)
    if dialect == "canonical":
        module: Module = files.recorded[name]
        return decode.canonical(parts, module.spec.bits, module.shape[1])
    if dialect == "mlx":
        return decode.mlx(parts, files.said_group(name))
    return decode.compressed(parts)


def _side_by_side(tasks: Iterable[Task]) -> None:
    """Everything once, on all cores, each on one: decoding is too fine for torch's threads."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(os.cpu_count(), "verify", torch.set_num_threads, (1,)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    torch.set_num_threads(threads)  # new threads start with what was set last, anywhere


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[slice]:
    """Rows of a tensor, PIECE bytes at most together: what is mapped at one time is that small."""
    entry = checkpoint.entry(name)
    if not entry.shape or not entry.nbytes:
        yield slice(None)
        return
    step = max(1, PIECE * entry.shape[0] // entry.nbytes)
    for start in range(0, entry.shape[0], step):
        yield slice(start, min(start + step, entry.shape[0]))


def _format(name: str) -> Format:
    return FORMATS.get(name, FORMATS["auto_round"])


def _subject(task: Task) -> str:
    """The tensor or module that a task is about."""
    names = [a for a in getattr(task, "args", ()) if isinstance(a, str | Module)]
    return next((a.name if isinstance(a, Module) else a for a in names), "something")


def _inside(name: str) -> bool:
    """Whether a module lies in a numbered list, as far as a name tells."""
    return any(step.isdigit() for step in name.split("."))

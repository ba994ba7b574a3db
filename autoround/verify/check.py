# SPDX-License-Identifier: Apache-2.0
"""`verify`: a directory held against the run it came from, tensor by tensor."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoround.checkpoint import INDEX, Checkpoint, read_json
from autoround.errors import InputError
from autoround.formats import FORMATS, RECORD, Contents, Format, Module, Quantized
from autoround.verify import decode
from autoround.verify.claims import RULES, Claim
from autoround.verify.decode import Numbers

#: Below a run's directory: our own files.
CANONICAL = "canonical"


@dataclass(slots=True)
class Verdict:
    """What was compared, and every difference found; none = verified.

    ``largest_error``: of a dequantized weight or a kept tensor against the run, as the format's
    readers see it; 0 = exact.
    """

    directory: Path
    format: str
    modules: int = 0
    kept: int = 0
    checksums: int = 0
    against: Path | None = None
    largest_error: float = 0.0
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if not self.ok:
            return f"NOT VERIFIED {self.directory}: {len(self.differences)} differences"
        if self.against is None:
            return (
                f"VERIFIED {self.directory}: {self.checksums} checksums, {self.modules} modules as "
                "the config says; no run to compare with (--against RUN)"
            )
        loss = f"largest error {self.largest_error:.3g}" if self.largest_error else "exact"
        return (
            f"VERIFIED {self.directory} ({self.format}, {loss}): codes, scales and zero levels of "
            f"{self.modules} modules and {self.kept} other tensors, bit for bit"
        )


def verify(directory: str | Path, against: str | Path | None = None) -> Verdict:
    """Compare a finished directory with the run it came from.

    ``against``: the run, its canonical directory, or any quantized directory; None = looked for in
    and beside ``directory``. Every difference is in the verdict. Raises InputError only where there
    is nothing to read.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json; give the directory of a finished model")
    run = _run_of(path, against)
    verdict = Verdict(path, "?", against=run)
    try:
        _Check(path, run, verdict).all()
    except InputError as error:
        verdict.differences.append(str(error))
    return verdict


def _run_of(path: Path, against: str | Path | None) -> Path | None:
    if against is not None:
        given = Path(against)
        found = next((p for p in (given / CANONICAL, given) if (p / "config.json").is_file()), None)
        if found is None:
            raise InputError(f"{given} is no run: it has no config.json, nor canonical/config.json")
        return None if found.resolve() == path.resolve() else found
    if path.name == CANONICAL:
        return None
    beside = (path / CANONICAL, path.parent / CANONICAL)
    return next((p for p in beside if (p / "config.json").is_file()), None)


class _Check:
    """One comparison. Differences are collected, never raised."""

    def __init__(self, path: Path, run: Path | None, verdict: Verdict) -> None:
        self.path, self.verdict = path, verdict
        self.checkpoint = Checkpoint(path, quantized=True)
        own = self.checkpoint.config.get("quantization_config")
        dense = not own and "quantization" not in self.checkpoint.config
        self.files = None if dense else Quantized(path)
        self.record = _record(path)
        self.run = Quantized(run) if run else None
        if self.run is not None:
            self.contents: Contents | None = self.run.contents()
        elif self.files is not None and self.files.dialect.name == CANONICAL:
            self.contents = self.files.contents()
        else:
            self.contents = None
        verdict.format = str(self.record.get("format") or (self.files and self.files.dialect.name))

    def all(self) -> None:
        self._checksums()
        self._index()
        if self.run is None or self.contents is None:
            self._alone()
            return
        _checksums_of(self.run.checkpoint, _record(self.run.path), self._differs, "the run's ")
        if self.files is None:
            self._dense(self.contents, self.run)
        else:
            self._packed(self.contents, self.run, self.files)
        self._kept(self.contents, self.run)

    def _differs(self, text: str) -> None:
        self.verdict.differences.append(text)

    def _checksums(self) -> None:
        self.verdict.checksums = _checksums_of(self.checkpoint, self.record, self._differs, "")

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

    def _alone(self) -> None:
        """Without a run: every module decodes, and is what the config says."""
        if self.files is None:
            return
        for name in self.files.modules:
            numbers = self._numbers(self.files, name)
            if numbers is not None:
                self.verdict.modules += 1
                self._sane(name, numbers)
                self._claimed(name, numbers, _inside(self.files, name))

    def _packed(self, contents: Contents, run: Quantized, files: Quantized) -> None:
        names = {module.name for module in contents.modules.values()}
        for name in sorted(names - {*files.modules}):
            self._differs(f"{name} is quantized in the run and has no codes here")
        for name in sorted({*files.modules} - names):
            self._differs(f"{name} has codes here and is not quantized in the run")
        for module in contents.modules.values():
            if module.name not in files.homes:
                continue
            expected, found = self._numbers(run, module.name), self._numbers(files, module.name)
            if expected is None or found is None:
                continue
            self.verdict.modules += 1
            self._sane(module.name, found)
            self._same(module.name, found, expected)
            self._claimed(module.name, found, contents.inside(module.name))
        self._unclaimed(contents, files)

    def _numbers(self, files: Quantized, name: str) -> Numbers | None:
        try:
            return _decoded(files, name)
        except (InputError, RuntimeError, ValueError, KeyError, ZeroDivisionError) as error:
            self._differs(f"{name} cannot be decoded: {error}")
            return None

    def _sane(self, name: str, numbers: Numbers) -> None:
        scale = numbers.scale
        if not bool(torch.isfinite(scale).all()):
            self._differs(f"{name} has scales that are NaN or infinite")
        elif bool((scale == 0).any()):
            self._differs(f"{name} has scales of zero")
        if bool((numbers.zero >= 1 << numbers.bits).any()) or bool((numbers.zero < 0).any()):
            self._differs(f"{name} has zero levels outside its {numbers.bits} bits")

    def _same(self, name: str, found: Numbers, expected: Numbers) -> None:
        if found.bits != expected.bits or found.codes.shape != expected.codes.shape:
            self._differs(
                f"{name} is {found.bits} bits {list(found.codes.shape)}, "
                f"the run has {expected.bits} bits {list(expected.codes.shape)}"
            )
            return
        if found.scale.shape != expected.scale.shape or not torch.equal(
            found.groups, expected.groups
        ):
            self._differs(f"{name}: columns belong to other groups than in the run")
            return
        pairs = {
            "code": (found.codes, expected.codes),
            "scale": (found.scale, expected.scale.to(found.scale.dtype)),
            "zero level": (found.zero, expected.zero),
        }
        if found.biases is not None:
            offset = -expected.scale.float() * expected.zero
            pairs["bias"] = (found.biases, offset.to(found.biases.dtype))
            self._lost(float((found.weight() - expected.weight()).abs().max()))
        for what, (have, want) in pairs.items():
            if not torch.equal(have, want):
                wrong = (have != want).nonzero()
                row, column = wrong[0].tolist()
                self._differs(
                    f"{name}: {len(wrong)} {what}s differ, first [{row}, {column}]: "
                    f"{have[row, column].item():.6g}, the run has {want[row, column].item():.6g}"
                )

    def _claimed(self, name: str, numbers: Numbers, inside: bool) -> None:
        """The config must say of the module what its tensors show."""
        claim = self._claim(name, inside)
        if claim is None:
            self._differs(f"{name} has codes, but config.json says it is not quantized")
            return
        k, count = numbers.codes.shape[1], numbers.scale.shape[1]
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
            if self._claim(name, contents.inside(name)) is not None:
                self._differs(f"{name} stays in 16 bits, but config.json says it is quantized")

    def _dense(self, contents: Contents, run: Quantized) -> None:
        for key, module in contents.modules.items():
            entry = self.checkpoint.entries.get(key)
            numbers = self._numbers(run, module.name)
            if entry is None:
                self._differs(f"{key} is missing")
            elif numbers is not None:
                self.verdict.modules += 1
                exact, found = numbers.weight(), self.checkpoint.get(key)
                found = found.t() if module.transposed else found
                if found.shape != exact.shape or not torch.equal(found, exact.to(found.dtype)):
                    self._differs(f"{key} is not the run's weight in {found.dtype}")
                    continue
                self._lost(float((found.float() - exact).abs().max()))

    def _kept(self, contents: Contents, run: Quantized) -> None:
        """Other tensors: all there, nothing else, the same bytes (or the same after a cast)."""
        format = _format(self.verdict.format)
        owned = self.files.owned if self.files else {*contents.modules}
        left = {name for name in self.checkpoint.entries if name not in owned}
        for stored in contents.kept:
            place = format.place(stored.name)
            if place.name not in self.checkpoint.entries:
                self._differs(f"{stored.name} is missing")
                continue
            left.discard(place.name)
            found = self.checkpoint.slice(place.name)
            have = found[...] if place.index is None else found[place.index]
            want = run.checkpoint.get(stored.name)
            cast = want.to(have.dtype)
            self.verdict.kept += 1
            if not _same_bytes(have, cast):
                self._differs(f"{stored.name} is not what the run has")
            elif have.dtype != want.dtype:
                self._lost(float((have.double() - want.double()).abs().max()))
        for name in sorted(left):
            self._differs(f"{name} is here and not in the run")

    def _lost(self, error: float) -> None:
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
        settings: dict[str, Any] = files.config.get("quantization") or {}
        own = settings.get(files.homes[name][0])
        row = own if isinstance(own, dict) else settings
        return decode.mlx(parts, int(row["group_size"]))
    return decode.compressed(parts)


def _record(path: Path) -> dict[str, Any]:
    return read_json(path / RECORD) if (path / RECORD).is_file() else {}


def _checksums_of(
    checkpoint: Checkpoint, record: dict[str, Any], differs: Callable[[str], None], whose: str
) -> int:
    """Compare every tensor's bytes with the checksum that was taken when it was written."""
    noted: dict[str, str] = record.get("checksums") or {}
    for name, crc in noted.items():
        if name not in checkpoint.entries:
            differs(f"{whose}{name} is missing")
            continue
        raw = checkpoint.get(name).reshape(-1).view(torch.uint8).numpy()
        if f"{zlib.crc32(memoryview(raw)):08x}" != crc:  # type: ignore[arg-type]
            differs(f"{whose}{name} is not what was written: its checksum differs")
    return len(noted)


def _format(name: str) -> Format:
    return FORMATS.get(name, FORMATS["auto_round"])


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)


def _inside(files: Quantized, name: str) -> bool:
    """Whether a module lies in a numbered list, as far as a name tells."""
    return any(step.isdigit() for step in name.split("."))

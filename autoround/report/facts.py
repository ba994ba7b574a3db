# SPDX-License-Identifier: Apache-2.0
"""Everything a report says, measured on the files or taken from what the run wrote down."""

import math
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hal
from autoround.checkpoint import Checkpoint, resolve
from autoround.errors import InputError
from autoround.evaluate import Evaluation, Pair, Positions
from autoround.files import read_json
from autoround.formats import CANONICAL, RECORD, Quantized, run_of
from autoround.options import device_by_name
from autoround.report.layers import Layer, measure
from autoround.report.log import Log, read_log
from autoround.verify import verify
from autoround.version import VERSION

#: Whose versions a record names.
PROGRAMS = ("autoround", "torch", "transformers")
#: Points of a curve of percentiles, and of one along a sample.
PERCENTILES, PLACES = 100, 32


@dataclass(frozen=True, slots=True)
class Choices:
    """``against``: the float model; None = the one the run's log names. The rest: `evaluate`."""

    against: str | None = None
    dataset: str | None = None
    nsamples: int = 32
    seqlen: int = 512
    device_map: str | None = None


@dataclass(frozen=True, slots=True)
class Directory:
    """One format of the run: bytes of its files of weights, and what reading them back gave."""

    name: str
    format: str
    nbytes: int
    verified: bool
    proof: str


@dataclass(frozen=True, slots=True)
class Block:
    """Error of a block's output as a share of it, squares of both, rounded to nearest and in the
    end (None: no data reached it), and what it took, where the run's log is there."""

    name: str
    loss_rtn: float | None
    loss: float | None
    sparse_experts: int
    seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Kernels:
    """What multiplies weights of one shape on this machine: a row of activations, and many."""

    shape: tuple[int, int]
    scheme: str
    count: int
    one: str
    many: str


@dataclass(frozen=True, slots=True)
class Curves:
    """KL in nats: its percentiles 0 .. 100, and its mean along a sample, with where each stretch
    ends; each also of the noise (empty: not measured)."""

    percentiles: list[float]
    noise_percentiles: list[float]
    along: list[float]
    noise_along: list[float]
    ends: list[int]


@dataclass(frozen=True, slots=True)
class Report:
    """``card``: fields of the source's own model card. ``command``, ``seconds``: of the log."""

    autoround: str
    model: str
    base_model: str
    card: dict[str, str]
    evaluation: Evaluation
    curves: Curves | None
    directories: list[Directory]
    layers: list[Layer]
    blocks: list[Block]
    kernels: list[Kernels]
    fates: dict[str, int]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    command: str | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def gather(run: str, choices: Choices) -> Report:
    """Measure a finished directory. Raises InputError where that is impossible."""
    path = resolve(run)
    places = _places(path)
    first = places[0]
    record, log = _record(first), read_log(path, first.parent)
    against = choices.against or _source(log)
    pair = Pair(str(first), against, choices.device_map, "exact")
    evaluation, curves = _evaluated(pair, choices)
    held = _quantized(path, places)
    layers = (
        measure(held, pair, None if pair.encoder else _text(pair, choices).ids[:1]) if held else []
    )
    return Report(
        VERSION,
        path.name,
        _hub_name(against, pair.source),
        _source_card(pair.source),
        evaluation,
        curves,
        [_directory(place, path) for place in places],
        layers,
        _blocks(record, first, log),
        _kernels(held, pair, choices.device_map) if held else [],
        _fates(record),
        _mapping(record, "recipe"),
        _mapping(record, "calibration"),
        {name: str(record[name]) for name in PROGRAMS if name in record},
        _machine(choices.device_map),
        log.command,
        log.seconds,
    )  # fmt: skip


def _places(path: Path) -> list[Path]:
    """The directories of a run that programs can load; our own files where there are no others."""
    inside = sorted(place.parent for place in path.glob(f"*/{RECORD}"))
    found = [place for place in (path, *inside) if (place / "config.json").is_file()]
    if not found:
        raise InputError(f"{path} has no config.json; give the directory of a finished run")
    return [place for place in found if place.name != CANONICAL.name] or found


def _quantized(path: Path, places: list[Path]) -> Quantized | None:
    """The files that show codes and scales: those of a format, else the run's own; None = dense."""
    for place in (*places, run_of(path)):
        if place and Checkpoint(place, quantized=True).quantization is not None:
            return Quantized(place)
    return None


def _source(log: Log) -> str:
    if log.model is None:
        raise InputError("name the float model with --against; the run has no log that says it")
    if Path(log.model).is_absolute() and not Path(log.model).is_dir():
        raise InputError(f"{log.model}, which the run came from, is gone; name it with --against")
    return log.model


def _text(pair: Pair, choices: Choices) -> Any:
    return pair.text(choices.dataset, choices.nsamples, choices.seqlen)


def _evaluated(pair: Pair, choices: Choices) -> tuple[Evaluation, Curves | None]:
    if pair.encoder:
        return pair.embeddings(choices.dataset, choices.nsamples), None
    text = _text(pair, choices)
    own, floor = pair.positions(text), pair.noise(text)
    curves = _curves(own, floor.positions if floor else None, text.ids.shape[1] - 1)
    return pair.evaluation(text, own, floor), curves


def _curves(own: Positions, noise: Positions | None, length: int) -> Curves:
    ends = sorted({round(length * (i + 1) / PLACES) for i in range(PLACES)} - {0})

    def percentiles(found: Positions | None) -> list[float]:
        if found is None:
            return []
        ordered, last = found.kl.sort().values, found.kl.numel() - 1
        return [float(ordered[round(last * i / PERCENTILES)]) for i in range(PERCENTILES + 1)]

    def along(found: Positions | None) -> list[float]:
        if found is None:
            return []
        rows = found.kl.reshape(-1, length)
        return [float(rows[:, a:b].mean()) for a, b in zip([0, *ends], ends, strict=False)]

    return Curves(percentiles(own), percentiles(noise), along(own), along(noise), ends)


def _directory(place: Path, run: Path) -> Directory:
    verdict = verify(place)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    name = "." if place == run else place.name
    return Directory(name, verdict.format, size, verdict.ok, str(verdict).replace(str(place), name))


# ---- what the run wrote down ------------------------------------------------------------------


def _record(place: Path) -> dict[str, Any]:
    return read_json(place / RECORD) if (place / RECORD).is_file() else {}


def _mapping(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return dict(found) if isinstance(found, Mapping) else {}


def _blocks(record: Mapping[str, Any], place: Path, log: Log) -> list[Block]:
    rows = record.get("blocks") or []
    try:
        found = {
            str(row["name"]): (_number(row.get("loss_rtn")), _number(row.get("loss")),
                               int(row.get("sparse_experts", 0)))
            for row in rows
        }  # fmt: skip
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{place / RECORD} does not describe its blocks ({error!r}); make the run anew"
        ) from None
    for name in log.blocks:
        found.setdefault(name, (None, None, 0))
    return [
        Block(name, *values, *log.blocks.get(name, (None, None))) for name, values in found.items()
    ]


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)


def _fates(record: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors met each fate; layers are alike but for their numbers."""
    said = _mapping(record, "tensors").values()
    return dict(Counter(re.sub(r"\.\d+(?=\.|$)", ".*", str(fate)) for fate in said).most_common())


def _kernels(files: Quantized, pair: Pair, device_map: str | None) -> list[Kernels]:
    device, dtype = device_by_name(device_map), pair.dtype
    shapes = Counter((q.shape, q.spec) for q in map(files.q, files.modules))
    return [
        Kernels(shape, str(spec), count, rows[0][1].name, rows[-1][1].name)
        for (shape, spec), count in shapes.items()
        if (rows := hal.plan_kernels(spec, shape, dtype, device))
    ]


def _machine(device_map: str | None) -> dict[str, str]:
    caps = hal.device.caps(device_by_name(device_map))
    return {
        "device": f"{caps.name} ({caps.arch})",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


# ---- the model it was made from ---------------------------------------------------------------


def _hub_name(given: str, source: Path) -> str:
    """``org/name`` where the path or the argument tells it, else the directory's name."""
    cached = re.search(r"models--([^/]+?)--([^/]+)/snapshots/", f"{source}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return source.name if Path(given).exists() else given


def _source_card(source: Path) -> dict[str, str]:
    """Plain fields of the front matter of the source's README.md that a card passes on."""
    file = source / "README.md"
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            lines = opened.read(1 << 16).splitlines()
    except OSError:
        return {}
    return dict(_front_matter(lines))


def _front_matter(lines: list[str]) -> Iterator[tuple[str, str]]:
    if not lines or lines[0].strip() != "---":
        return
    for line in lines[1:]:
        if line.strip() == "---":
            return
        match = re.fullmatch(
            r"(license|license_name|license_link|pipeline_tag): *([^\s#\[{][^#]*)", line
        )
        if match:
            yield match[1], match[2].strip().strip("'\"")

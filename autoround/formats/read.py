# SPDX-License-Identifier: Apache-2.0
"""Quantized directories of any format, read as they are: their tensors decide, not their claims."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hal
from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.files import AGAIN, read_json
from autoround.formats import awq, canonical, compressed, gptq, mlx
from autoround.formats.contents import Contents, Module, Stored
from autoround.formats.row import in_spec
from autoround.formats.settings import settings_of
from autoround.formats.sink import DTYPES
from autoround.formats.table import CANONICAL
from autoround.header import BITS
from autoround.patterns import compiled
from autoround.scheme import KEEP_BITS, KEPT, TABLES, Scheme
from hal import QTensor, Spec, Unsupported

#: File beside the weights that says how they were made. No times or paths: equal runs, equal bytes.
RECORD = "autoround.json"
#: Rows of it that belong to one directory and not to the run.
OF_FORMAT = ("format", "packing", "largest_error", "checksums", "numbers", "contents")
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
PACKED_PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)

#: What reading tensors that do not fit together, or settings that lie, may end in.
UNREADABLE = (
    ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    MemoryError, Unsupported,
)  # fmt: skip

Read = Callable[["Quantized", str, dict[str, Tensor]], QTensor]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of directory stores quantized weights.

    ``marker``: a module with this tensor is quantized. ``parts``: names its tensors may have; the
    first ``needed`` must be there.
    """

    name: str
    marker: str
    parts: tuple[str, ...]
    needed: int
    read: Read


def _gptq(minus_one: bool) -> Read:
    return lambda files, name, parts: gptq.read(parts, minus_one, files.said_group(name))


def _mlx(files: "Quantized", name: str, parts: dict[str, Tensor]) -> QTensor:
    mode = files.said(name).get("mode", "affine")
    if mode != "affine":
        raise ValueError(f"mode {mode} is no integer code")
    return mlx.read(parts, files.said_group(name))


DIALECTS: dict[str, Dialect] = {
    row.name: row
    for row in (
        Dialect("gptq", "qweight", GPTQ_PARTS, 3, _gptq(True)),
        Dialect("gptq_v2", "qweight", GPTQ_PARTS, 3, _gptq(False)),
        Dialect(
            "awq", "qweight", GPTQ_PARTS[:3], 3,
            lambda files, name, parts: awq.read(parts, files.said_group(name)),
        ),
        Dialect(
            "pack-quantized", "weight_packed", PACKED_PARTS, 3,
            lambda files, name, parts: compressed.read(parts),
        ),
        Dialect(
            "int-quantized", "weight_scale", ("weight", "weight_scale"), 2,
            lambda files, name, parts: compressed.read(parts),
        ),
        Dialect("mlx", "scales", ("weight", "scales", "biases"), 3, _mlx),
        Dialect(
            "canonical", "codes", ("codes", "scale", "zero", "perm"), 2,
            lambda files, name, parts: canonical.read(files.recorded[name], parts),
        ),
    )
}  # fmt: skip

#: ``packing_format`` of an auto-round config -> dialect.
AUTO_ROUND = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "mlx": "mlx",
    "autoround:canonical": "canonical",
}
COMPRESSED = ("pack-quantized", "int-quantized")


def dialect_of(config: Mapping[str, Any]) -> Dialect:
    """The dialect that a config.json names. Raises InputError for one that cannot be read."""
    own = settings_of(config)
    method, known = str(own.get("quant_method", "")), ", ".join(AUTO_ROUND)
    if method == "auto-round":
        packing = str(own.get("packing_format", "auto_round:gptq"))
        if packing not in AUTO_ROUND:
            raise InputError(f"packing_format {packing!r} cannot be read yet; known: {known}")
        return DIALECTS[AUTO_ROUND[packing]]
    if method == "gptq":
        version = own.get("checkpoint_format", own.get("format", "gptq"))
        if version not in ("gptq", "gptq_v2"):
            raise InputError(f"checkpoint_format {version!r} cannot be read; known: gptq, gptq_v2")
        return DIALECTS[version]
    if method == "awq":
        if own.get("version", "gemm").lower() != "gemm":
            raise InputError(f"awq version {own['version']!r} cannot be read; known: gemm")
        return DIALECTS["awq"]
    if method == "compressed-tensors":
        if own.get("format") not in COMPRESSED:
            raise InputError(
                f"compressed-tensors format {own.get('format')!r} cannot be read yet; "
                f"known: {', '.join(COMPRESSED)}"
            )
        return DIALECTS[own["format"]]
    if not method and "group_size" in own:
        return DIALECTS["mlx"]
    raise InputError(
        f"quant_method {method or 'none'!r} cannot be read; known: auto-round, gptq, awq, "
        "compressed-tensors, and MLX's own"
    )


@dataclass
class Quantized:
    """A quantized directory by its headers; weights are read one at a time.

    Raises InputError for files that are damaged, or in a format that cannot be read.
    """

    path: Path
    checkpoint: Checkpoint = field(init=False)
    dialect: Dialect = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = Checkpoint(self.path, quantized=True)
        try:
            self.dialect = dialect_of(self.config)
        except InputError as error:
            raise InputError(f"{self.path / 'config.json'}: {error}") from None

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @cached_property
    def record(self) -> dict[str, Any]:
        """What we wrote beside the weights; empty for a directory of another program."""
        return record_of(self.path)

    @cached_property
    def recorded(self) -> dict[str, Module]:
        """Modules by name, as a run records them in its own files."""
        try:
            rows = canonical.modules_from_json(self.record["contents"]["modules"])
        except UNREADABLE as error:
            raise InputError(
                f"{self.path / RECORD} does not describe the weights ({error!r}); make the run anew"
            ) from None
        return {module.name: module for module in rows.values()}

    def said(self, name: str) -> dict[str, Any]:
        """What the config says of a module: its defaults, and the module's own row over them."""
        own = self.config.get("quantization") or self.config["quantization_config"]
        row = own.get(self.homes[name][0])  # MLX
        row = (own.get("extra_config") or {}).get(name) or (row if isinstance(row, dict) else {})
        for key, changes in (own.get("dynamic") or {}).items():
            if compiled(key.removeprefix("+:")).match(name):
                row = changes
                break
        return {**own, **{key: value for key, value in row.items() if value is not None}}

    def said_group(self, name: str) -> int:
        """The group that the config gives a module; it decides where columns are no multiple."""
        return int(self.said(name).get("group_size") or -1)

    @cached_property
    def homes(self) -> dict[str, tuple[str, int | None]]:
        """Quantized module -> prefix of its tensors, and its index where experts are stacked."""
        found: dict[str, tuple[str, int | None]] = {}
        marker = "." + self.dialect.marker
        for key, entry in self.checkpoint.entries.items():
            if not key.endswith(marker):
                continue
            prefix = key.removesuffix(marker)
            if len(entry.shape) == 3 and entry.nbytes:
                kind = str(self.config.get("model_type", ""))
                names = mlx.expert_names(prefix, entry.shape[0], kind)
                found |= {name: (prefix, e) for e, name in enumerate(names)}
            else:
                found[prefix] = (prefix, None)
        if not found:
            raise InputError(
                f"{self.path} is said to be quantized, but no tensor is called *{marker}; {AGAIN}"
            )
        return found

    @property
    def modules(self) -> list[str]:
        """Names of the quantized linear layers."""
        return [name for name in self.homes if name not in self.tables]

    @cached_property
    def tables(self) -> set[str]:
        """Quantized embeddings and routers (MLX has them): dense in every format we write."""
        return {name for name in self.homes if KEPT.search(name) or TABLES.search(name)}

    def kept(self, key: str) -> Tensor:
        """A tensor that is no linear layer's; a quantized table in the dtype of its scales."""
        name = key.removesuffix(".weight")
        if name not in self.tables:
            return self.checkpoint.get(key)
        return hal.dequantize(self.q(name), dtype=self.parts(name)["scales"].dtype)

    @cached_property
    def owned(self) -> set[str]:
        """Keys of all tensors that belong to quantized modules."""
        parts = self.dialect.parts
        prefixes = {prefix for prefix, _ in self.homes.values()}
        return {
            key
            for key in self.checkpoint.entries
            if key.rpartition(".")[0] in prefixes and key.rpartition(".")[2] in parts
        }

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one module. Raises InputError where one is missing."""
        prefix, index = self.homes[name]
        keys = {part: f"{prefix}.{part}" for part in self.dialect.parts}
        for part in self.dialect.parts[: self.dialect.needed]:
            if keys[part] not in self.checkpoint.entries:
                raise InputError(f"{name} has no {part} in {self.path}; {AGAIN}")
        held = {part: key for part, key in keys.items() if key in self.owned}
        if index is None:
            return {part: self.checkpoint.get(key) for part, key in held.items()}
        row = slice(index, index + 1)
        return {part: self.checkpoint.get(key, row)[0] for part, key in held.items()}

    def q(self, name: str) -> QTensor:
        """One module's plain weight. Raises InputError where its tensors do not fit together."""
        return self._plain(name, _normal)

    def weight(self, module: Module) -> QTensor:
        """`q` in the module's spec. Raises InputError where that is another's."""
        return self._plain(module.name, lambda q: in_spec(q, module.spec))

    def _plain(self, name: str, settled: Callable[[QTensor], QTensor]) -> QTensor:
        parts = self.parts(name)
        try:
            q = settled(self.dialect.read(self, name, parts))
        except UNREADABLE as error:
            raise InputError(f"{self.path}: {name} cannot be read: {error}; {AGAIN}") from None
        if not bool(torch.isfinite(q.parts["scale"]).all()):
            raise InputError(f"{self.path}: {name} has scales that are NaN or infinite; {AGAIN}")
        return q

    @property
    def own(self) -> bool:
        """Whether a run recorded what it put here, so that nothing of it is guessed."""
        return "contents" in self.record

    def contents(self) -> Contents:
        """What the directory shows by its tensors, whoever made it; reads every module."""
        if self.dialect.name == "canonical":
            return self.run_contents()
        modules = {m.key: m for m in (Module.of(name, self.q(name)) for name in self.modules)}
        members: dict[str, list[str]] = {}
        for name, (prefix, _) in self.homes.items():
            members.setdefault(prefix, []).append(name)
        tensors: dict[str, Stored] = {}
        for key, entry in self.checkpoint.entries.items():
            if key not in self.owned:
                if ".switch_mlp." in key:
                    raise InputError(
                        f"{self.path}: {key}: experts that MLX keeps in 16 bits cannot be read yet"
                    )
                tensors[key] = Stored(key, entry.dtype, tuple(entry.shape), entry.nbytes)
                continue
            for name in members.pop(key.rpartition(".")[0], ()):
                weight = f"{name}.weight"
                if name in self.tables:
                    dense = self.kept(weight)
                    dtype, shape = DTYPES[dense.dtype], tuple(dense.shape)
                else:
                    dtype, shape = "F16", modules[weight].shape
                tensors[weight] = Stored(weight, dtype, shape, math.prod(shape) * 2)
        blocks = _blocks(self.modules)
        schemes = {module.name: module.scheme for module in modules.values()}
        for key, tensor in tensors.items():
            linear = key.endswith(".weight") and len(tensor.shape) == 2 and key not in modules
            if linear and key.startswith(blocks + "."):
                schemes[key.removesuffix(".weight")] = Scheme(KEEP_BITS)
        weights: dict[Scheme, int] = {}
        for module in modules.values():
            weights[module.scheme] = weights.get(module.scheme, 0) + math.prod(module.shape)
        base = max(weights, key=weights.__getitem__)
        config = float_config(self.config)
        return Contents(self.path, config, tensors, modules, schemes, base, blocks)

    def recorded_contents(self) -> Contents:
        """What a run put into the directory, by its record. Raises InputError for a damaged one."""
        record = self.record.get("contents") or {}
        try:
            tensors = {
                key: Stored(key, dtype, tuple(shape), math.prod(shape) * BITS[dtype] // 8)
                for key, (dtype, shape) in record["tensors"].items()
            }
            schemes = {name: Scheme(*row) for name, row in record["schemes"].items()}
            base, blocks = Scheme(*record["base"]), str(record["blocks"])
            stacked = tuple(map(str, record.get("stacks", ())))
        except UNREADABLE as error:
            raise InputError(
                f"{self.path / RECORD} does not describe the weights ({error!r}); make the run anew"
            ) from None
        modules = {module.key: module for module in self.recorded.values()}
        config = float_config(self.config)
        return Contents(self.path, config, tensors, modules, schemes, base, blocks, stacked)

    def run_contents(self) -> Contents:
        """`recorded_contents`, with the least zero level of every weight, not known when a run is
        planned: some formats have none for 0. Raises InputError where the tensors are others."""
        contents = self.recorded_contents()
        strange = {module.name for module in contents.modules.values()} ^ {*self.homes}
        strange |= {t.name for t in contents.kept} ^ ({*self.checkpoint.entries} - self.owned)
        for t in contents.kept:
            entry = self.checkpoint.entries.get(t.name)
            if entry and (entry.dtype, tuple(entry.shape)) != (t.dtype, t.shape):
                strange.add(t.name)
        if strange:
            raise InputError(
                f"{self.path / RECORD} does not describe the weights: {min(strange)} is another, "
                f"or not there; `autoround verify {self.path}` says more, {AGAIN}"
            )
        modules = {
            key: module
            if module.spec.symmetric
            else replace(module, least_zero=int(self.weight(module).parts["zero"].min()))
            for key, module in contents.modules.items()
        }
        return replace(contents, modules=modules)


def own_files(run: Path) -> Path | None:
    """Where a run has its numbers: ``canonical``, or the first directory of an exact format.

    Raises InputError for a record that cannot be read.
    """
    below = sorted(path for path in run.iterdir() if path.is_dir()) if run.is_dir() else []
    for place in dict.fromkeys((run / CANONICAL.name, run, *below)):
        if (place / "config.json").is_file() and (place / RECORD).is_file():
            record = read_json(place / RECORD)
            named = str(record.get("format")).replace(":", "-")
            if "contents" in record and (place == run or named == place.name):
                return place
    return None


def run_of(path: Path) -> Path | None:
    """The exact files of the run that a directory belongs to: itself, in it, beside or above it.

    Raises InputError for a record that cannot be read.
    """
    own = record_of(path)
    if "contents" in own:
        return path
    for place in (path, path.parent):
        if (found := own_files(place)) and _of_run(record_of(found)) == _of_run(own):
            return found
    return None


def record_of(path: Path) -> dict[str, Any]:
    """What we wrote beside the weights; empty for a directory of another program."""
    return read_json(path / RECORD) if (path / RECORD).is_file() else {}


def _of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OF_FORMAT}


def float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what a quantizer added."""
    own = ("quantization_config", "quantization")
    return {key: value for key, value in config.items() if key not in own}


def _blocks(names: Iterable[str]) -> str:
    """The commonest prefix before a number: the list of blocks."""
    found = Counter(match[1] for name in names if (match := re.match(r"(.*?)\.\d+\.", name)))
    return found.most_common(1)[0][0] if found else "model.layers"


def _normal(q: QTensor) -> QTensor:
    """The spec that the numbers show: no zero levels where all are the middle, scales in f16 where
    it holds them. Raises ValueError for a zero level that is none."""
    parts, spec = dict(q.parts), q.spec
    if not spec.symmetric and bool((parts["zero"] > spec.max_level).any()):
        raise ValueError(f"a zero level of {int(parts['zero'].max())} in {spec.bits} bits")
    f16 = parts["scale"].to(torch.float16)
    if torch.equal(f16.to(parts["scale"].dtype), parts["scale"]):
        parts["scale"], spec = f16, replace(spec, scale="f16")
    if not spec.symmetric and bool((parts["zero"] == spec.half).all()):
        spec = Spec(f"s{spec.bits}", spec.group, spec.scale)
        parts.pop("zero")
    return replace(q, spec=spec, parts=parts)

# SPDX-License-Identifier: Apache-2.0
"""What vLLM and SGLang take of each format, as rows; what they would refuse of a plan; a way out.

Engines build one layer of what a checkpoint stores as several (q, k and v; gate and up; all experts
of a block), so the parts must be alike, and their kernels ask for certain bits, groups and shapes.
A checkpoint that breaks a rule fails when it is loaded, or is read wrongly without a word. Read in
the sources of vLLM 0.32 and SGLang 0.5.23, for NVIDIA GPUs without tensor parallelism.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product

from autoround.errors import InputError
from autoround.scheme import KEEP_BITS, Scheme

KEPT = Scheme(KEEP_BITS)
#: A layer as engines build it -> the modules it replaces, by their last names, under one parent.
FUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    ("in_proj_ba", ("in_proj_b", "in_proj_a")),
)
_PARTS = {part: (name, parts) for name, parts in FUSED for part in parts}
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")

_SYM_4_8 = frozenset({(4, True), (8, True)})
_SYM = frozenset((bits, True) for bits in range(2, 9))
_FOUR = frozenset({(4, True), (4, False)})
_ANY = _SYM | {(bits, False) for bits in range(2, 9)}


@dataclass(frozen=True, slots=True)
class Reader:
    """What an engine takes of a format. ``takes``: (bits, sym) it has a kernel for.

    ``groups``: group sizes, -1 = a row. ``tile``: N and K of a layer as it is built are multiples
    of these. ``one_group``: the format's config has room for one group size. ``experts``: it has
    kernels for these, too. ``why``: for those it does not read at all.
    """

    engine: str
    formats: tuple[str, ...]
    takes: frozenset[tuple[int, bool]] = frozenset()
    groups: tuple[int, ...] = (-1, 32, 64, 128)
    tile: tuple[int, int] = (1, 1)
    one_group: bool = False
    experts: bool = True
    why: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer as engines build it: the scheme of each of its modules, and the ``[N, K]`` it has.

    Fused parts are one matrix, rows stacked; experts are as many shapes as they have.
    """

    name: str
    schemes: Mapping[str, Scheme]
    shapes: tuple[tuple[int, int], ...]
    experts: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of RULES: what must hold of a layer, and the check: None, or the reason it does not."""

    about: str
    check: Callable[[Reader, Layer], str | None]


@dataclass(frozen=True, slots=True)
class Violation:
    """What an engine would refuse. ``remedy``: schemes that it takes, by module, or None.

    The remedies of one call of ``violations`` go together: with all of them nothing is left.
    """

    modules: tuple[str, ...]
    reason: str
    remedy: Mapping[str, Scheme] | None


_RAW = "it knows the packings auto_round:auto_gptq and auto_round:auto_awq only"
_MLX = "it does not read MLX files on NVIDIA GPUs"
PLAIN = ("fake", "fake:float32")
# vLLM pads weights to Marlin's tiles, and installs humming for the widths Marlin lacks. SGLang does
# not pad, and has no other GPTQ kernel left.
_MARLIN = (64, 128)
READERS: tuple[Reader, ...] = (
    Reader("vllm", ("auto_round:auto_gptq",), _SYM),
    Reader("vllm", ("auto_round:auto_awq",), _FOUR),
    Reader("vllm", ("auto_gptq", "auto_gptq:v2"), _SYM_4_8),
    Reader("vllm", ("auto_awq",), _FOUR, one_group=True),
    Reader("vllm", ("llm_compressor",), _ANY),
    Reader("vllm", ("llm_compressor:int",), frozenset({(8, True)}), groups=(-1,)),
    Reader("sglang", ("auto_round:auto_gptq",), _SYM_4_8, tile=_MARLIN),
    Reader("sglang", ("auto_round:auto_awq",), _FOUR, tile=_MARLIN),
    Reader("sglang", ("auto_gptq", "auto_gptq:v2"), _SYM_4_8, tile=_MARLIN),
    Reader("sglang", ("auto_awq",), _FOUR, one_group=True),
    Reader("sglang", ("llm_compressor",), _SYM_4_8 | _FOUR, tile=_MARLIN),
    Reader("sglang", ("llm_compressor:int",), frozenset({(8, True)}), groups=(-1,), experts=False),
    *(
        Reader(engine, formats, why=why)
        for engine in ("vllm", "sglang")
        for formats, why in (
            (("auto_round:gptqmodel",), _RAW),
            (("mlx", "auto_round:mlx"), _MLX),
        )
    ),
)
ENGINES = tuple(dict.fromkeys(row.engine for row in READERS))


def layers(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The layers engines build of a checkpoint's modules: name there -> modules, in given order.

    Parts that are fused are under the fused layer's name, experts under the name of their list, and
    all others under their own.
    """
    given = list(dict.fromkeys(names))
    known, found = set(given), dict[str, list[str]]()
    for name in given:
        found.setdefault(_layer(name, known), []).append(name)
    return {name: tuple(modules) for name, modules in found.items()}


def as_built(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """Schemes by the checkpoint's names, and by the names of layers that engines build of several.

    A config that names only q_proj says nothing to an engine that looks for qkv_proj. Layers whose
    modules differ are left out: no engine can build them.
    """
    named = dict(schemes)
    for name, modules in layers(schemes).items():
        own = {schemes[module] for module in modules}
        if len(own) == 1:
            named[name] = own.pop()
    return named


def _layer(name: str, known: set[str]) -> str:
    if expert := _EXPERT.fullmatch(name):
        return expert[1]
    parent, _, last = name.rpartition(".")
    fused, parts = _PARTS.get(last, (last, ()))
    # A part without siblings (q_proj beside kv_a_proj_with_mqa) stays a layer of its own.
    together = sum(f"{parent}.{part}" in known for part in parts) > 1
    return f"{parent}.{fused}" if together else name


def _mixed(reader: Reader, layer: Layer) -> str | None:
    if len(set(layer.schemes.values())) == 1:
        return None
    said = ", ".join(sorted({_say(scheme) for scheme in layer.schemes.values()}))
    return f"{reader.engine} builds one layer {layer.name} of these and needs one scheme: {said}"


def _scheme(reader: Reader, layer: Layer) -> str | None:
    for scheme in _quantized(layer):
        kind = (scheme.bits, scheme.sym)
        if layer.experts and not reader.experts:
            return f"{reader.engine} has no kernel for experts in this format"
        if kind not in reader.takes:
            where = [r.formats[0] for r in READERS if r.engine == reader.engine and kind in r.takes]
            there = f"; it has in {', '.join(where)}" if where else ""
            return f"{reader.engine} has no kernel for {_say(scheme)} in this format{there}"
    return None


def _group(reader: Reader, layer: Layer) -> str | None:
    for scheme in _quantized(layer):
        if scheme.group_size not in reader.groups:
            takes = ", ".join(map(str, reader.groups))
            return f"{reader.engine} has kernels for group_size {takes}, not {scheme.group_size}"
        for _, k in layer.shapes:
            if scheme.group_size > 0 and k % scheme.group_size:
                return f"{k} columns are not a multiple of group_size {scheme.group_size}"
    return None


def _tile(reader: Reader, layer: Layer) -> str | None:
    # Experts that Marlin cannot tile have a Triton kernel.
    if layer.experts or not _quantized(layer):
        return None
    for n, k in layer.shapes:
        if n % reader.tile[0] or k % reader.tile[1]:
            of = " x ".join(map(str, reader.tile))
            return f"{reader.engine}'s kernel needs multiples of {of}; {layer.name} is [{n}, {k}]"
    return None


RULES: tuple[Rule, ...] = (
    Rule("bits and sym with a kernel", _scheme),
    Rule("parts of one layer alike", _mixed),
    Rule("group sizes with a kernel, that divide the columns", _group),
    Rule("shapes the kernel tiles", _tile),
)


def violations(
    engine: str,
    format: str,
    modules: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
) -> list[Violation]:
    """What ``engine`` would refuse of ``modules`` stored in ``format``, each with a remedy.

    ``modules``: every linear layer, kept ones (bits 16) too, by the checkpoint's names; ``shapes``:
    ``(N, K)`` of each. Raises InputError for an engine or a format that no row knows.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    quantized = tuple(name for name, scheme in modules.items() if scheme.bits != KEEP_BITS)
    if format in PLAIN or not quantized:
        return []
    reader = _reader(engine, format, [modules[name] for name in quantized])
    if reader.why:
        return [Violation(quantized, f"{engine} cannot load {format}: {reader.why}", None)]
    built = [_built(name, parts, modules, shapes) for name, parts in layers(modules).items()]
    found = [
        (layer, reason)
        for layer in built
        for rule in RULES
        if (reason := rule.check(reader, layer)) is not None
    ]
    settled = {layer.name: _settle(reader, layer) for layer in built}
    if reader.one_group:
        found += _regroup(reader, built, settled)
        found += _rename(reader, built, settled)
    return [
        Violation(tuple(layer.schemes), reason, dict.fromkeys(layer.schemes, settled[layer.name]))
        for layer, reason in found
    ]


def _reader(engine: str, format: str, schemes: Iterable[Scheme]) -> Reader:
    """The row of a format; of ``auto_round``, the row of the packing that engines can read."""
    if format == "auto_round":
        kinds = {(s.bits, s.sym) for s in schemes}
        awq = (4, False) in kinds and kinds <= _FOUR
        format = "auto_round:auto_awq" if awq else "auto_round:auto_gptq"
    for row in READERS:
        if row.engine == engine and format in row.formats:
            return row
    raise InputError(f"format {format!r} is not known to the rules of {engine}")


def _built(
    name: str,
    parts: tuple[str, ...],
    modules: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
) -> Layer:
    schemes = {part: modules[part] for part in parts}
    schemes = {part: KEPT if s.bits == KEEP_BITS else s for part, s in schemes.items()}
    own = [shapes[part] for part in parts]
    experts = _EXPERT.fullmatch(parts[0]) is not None
    if not experts:  # rows are stacked
        own = [(sum(n for n, _ in own), k) for k in {k for _, k in own}]
    return Layer(name, schemes, tuple(dict.fromkeys(own)), experts)


def _settle(reader: Reader, layer: Layer) -> Scheme:
    """The first scheme that breaks no rule, from the widest part's on upwards; else kept."""
    widest = max(layer.schemes.values(), key=lambda s: (s.bits, -_width(s)))
    bits = sorted({b for b, _ in reader.takes if b >= widest.bits})
    smaller = sorted((g for g in reader.groups if 0 < g < _width(widest)), reverse=True)
    for b, group, sym in product(bits, (widest.group_size, *smaller), (widest.sym, not widest.sym)):
        if _fits(reader, layer, Scheme(b, group, sym)):
            return Scheme(b, group, sym)
    return KEPT


def _fits(reader: Reader, layer: Layer, scheme: Scheme) -> bool:
    alike = replace(layer, schemes=dict.fromkeys(layer.schemes, scheme))
    return all(rule.check(reader, alike) is None for rule in RULES)


def _regroup(
    reader: Reader, built: list[Layer], settled: dict[str, Scheme]
) -> list[tuple[Layer, str]]:
    """Layers whose group is not that of most weights; settles them on it, or kept."""
    weights = Counter[int]()
    for layer in built:
        if settled[layer.name] != KEPT:
            size = sum(n * k for n, k in layer.shapes)
            weights[settled[layer.name].group_size] += size
    if len(weights) < 2:
        return []
    most, found = weights.most_common(1)[0][0], []
    for layer in built:
        scheme = settled[layer.name]
        if scheme != KEPT and scheme.group_size != most:
            same = replace(scheme, group_size=most)
            settled[layer.name] = same if _fits(reader, layer, same) else KEPT
            found.append((layer, f"the format has one group_size, {most} for most of this model"))
    return found


def _rename(
    reader: Reader, built: list[Layer], settled: dict[str, Scheme]
) -> list[tuple[Layer, str]]:
    """Quantized layers whose names hold a kept one's: AWQ's list of those is searched as text."""
    kept = [module for layer in built if settled[layer.name] == KEPT for module in layer.schemes]
    found: list[tuple[Layer, str]] = []
    for layer in sorted(built, key=lambda layer: len(layer.name)):  # who is contained comes first
        hit = next((name for name in kept if name in layer.name), None)
        if settled[layer.name] != KEPT and hit is not None:
            settled[layer.name] = KEPT
            kept += layer.schemes
            found.append((layer, f"{reader.engine} takes it for {hit}, which is kept, by its name"))
    return found


def _quantized(layer: Layer) -> list[Scheme]:
    return [s for s in dict.fromkeys(layer.schemes.values()) if s.bits != KEEP_BITS]


def _width(scheme: Scheme) -> int:
    return scheme.group_size if scheme.group_size > 0 else 1 << 30


def _say(scheme: Scheme) -> str:
    if scheme.bits == KEEP_BITS:
        return "16 bits"
    return f"{scheme.bits} bits g{scheme.group_size} {'sym' if scheme.sym else 'asym'}"

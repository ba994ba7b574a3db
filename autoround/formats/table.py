# SPDX-License-Identifier: Apache-2.0
"""Formats as rows, and what fits into them."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from autoround.errors import InputError
from autoround.formats import awq, canonical, compressed, dense, gptq, mlx
from autoround.formats.contents import Module
from autoround.formats.row import Format, Packing
from autoround.scheme import KEEP_BITS, Scheme

#: Tried in this order when a layer's columns are no multiple of its group.
SMALLER_GROUPS = (64, 32)
#: What a loader looks for beside config.json.
COPY = ("quantization_config.json",)

CANONICAL = Format(
    "canonical", "our own: what all others are made from", (canonical.CANONICAL,),
    gptq.auto_round_config,
)  # fmt: skip

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "auto_round", "picks the first packing below that fits",
            (gptq.SYMMETRIC, awq.AUTO_AWQ, gptq.RAW), gptq.auto_round_config, files=COPY,
        ),
        Format(
            "auto_round:auto_gptq", "GPTQ words, zeros minus one",
            (gptq.AUTO_GPTQ,), gptq.auto_round_config, files=COPY,
        ),
        Format(
            "auto_round:auto_awq", "4 bits, AWQ words",
            (awq.AUTO_AWQ,), gptq.auto_round_config, files=COPY,
        ),
        Format(
            "auto_round:gptqmodel", "GPTQ words and g_idx, zeros as they are",
            (gptq.GPTQMODEL,), gptq.auto_round_config, files=COPY,
        ),
        Format(
            "auto_gptq", "GPTQ version 1: zeros minus one, g_idx",
            (gptq.V1,), gptq.gptq_config, files=(*COPY, "quantize_config.json"),
        ),
        Format(
            "auto_gptq:v2", "GPTQ version 2: zeros as they are, g_idx",
            (gptq.V2,), gptq.gptq_config, files=(*COPY, "quantize_config.json"),
        ),
        Format(
            "auto_awq", "AWQ gemm, 4 bits, one scheme",
            (awq.GEMM,), awq.awq_config, uniform=True, files=COPY,
        ),
        Format(
            "llm_compressor", "compressed-tensors, pack-quantized",
            (compressed.PACKED,), compressed.compressed_config, files=COPY,
        ),
        Format(
            "llm_compressor:int", "int-quantized: W8A8, a scale per row and per token",
            (compressed.BYTES,), compressed.compressed_config, files=COPY,
        ),
        Format(
            "mlx", "MLX affine, experts stacked",
            (mlx.AFFINE,), mlx.mlx_config, place=mlx.place, cast=mlx.cast, metadata="mlx",
            refuse=mlx.refuse,
        ),
        Format(
            "auto_round:mlx", "the same, signed auto-round",
            (mlx.AFFINE,), mlx.auto_round_mlx_config, place=mlx.place, cast=mlx.cast,
            metadata="mlx", refuse=mlx.refuse,
        ),
        Format(
            "fake", "dequantized, in the model's dtype", (dense.OWN,), dense.no_config,
            refuse=dense.refuse,
        ),
        Format(
            "fake:float32", "dequantized, in f32: exact", (dense.F32,), dense.f32_config,
            cast=dense.f32, refuse=dense.refuse,
        ),
    )
}  # fmt: skip


def format_by_name(name: str) -> Format:
    """A row of FORMATS. Raises InputError listing them."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def formats_by_names(names: str) -> tuple[Format, ...]:
    """``a,b`` -> rows, each once. Raises InputError for an unknown one or none."""
    found = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    if not found:
        raise InputError(f"no format in {names!r}; choose of {', '.join(FORMATS)}")
    return tuple(format_by_name(name) for name in found)


def choose(format: Format, modules: Collection[Module]) -> Packing:
    """The packing that holds every module: the first whose rule admits all.

    Raises InputError with the modules and reasons where none does.
    """
    for packing in format.packings:
        if all(packing.refuse(module) is None for module in modules):
            break
    else:
        said = {m.name: r for m in modules if (r := format.packings[-1].refuse(m))}
        first = next(iter(said))
        reasons = "; ".join(sorted(set(said.values())))
        raise InputError(
            f"format {format.name} cannot hold {first}"
            + (f" and {len(said) - 1} more layers" if len(said) > 1 else "")
            + f": {reasons}; {_instead(format, modules)}"
        )
    schemes = {module.scheme for module in modules}
    if format.uniform and len(schemes) > 1:
        raise InputError(
            f"format {format.name} holds one scheme beside 16 bits, not {len(schemes)}; "
            f"{_instead(format, modules)}"
        )
    return packing


def _instead(format: Format, modules: Collection[Module]) -> str:
    """Which formats can hold these modules, for an error message."""
    rows = [row.name for row in FORMATS.values() if row is not format and holds(row, modules)]
    family = format.name.partition(":")[0]
    real = [name for name in rows if not name.startswith("fake")]
    real.sort(key=lambda name: name.partition(":")[0] != family)  # stable: own family first
    return f"use --format {' or '.join(real[:3])}" if real else "use another scheme"


def holds(format: Format, modules: Iterable[Module]) -> bool:
    """Whether a format has a packing for all of these."""
    rows = list(modules)
    one = not format.uniform or len({module.scheme for module in rows}) <= 1
    return one and any(
        all(packing.refuse(module) is None for module in rows) for packing in format.packings
    )


def fit(formats: Collection[Format], module: Module) -> tuple[Scheme, str | None]:
    """The scheme itself, a smaller group, or 16 bits: the first that every format can store.

    Returns (scheme, reason it is not the one asked for).
    """
    scheme, reason = module.scheme, _misfit(formats, module)
    if reason is None:
        return scheme, None
    if not any(format.uniform for format in formats):
        for group in SMALLER_GROUPS:
            smaller = replace(module, spec=replace(module.spec, group=group))
            if group < scheme.group_size and _misfit(formats, smaller) is None:
                return smaller.scheme, f"{reason}: group_size {group} instead"
    return Scheme(KEEP_BITS), f"{reason}: kept as it is"


def _misfit(formats: Collection[Format], module: Module) -> str | None:
    """Why one of the formats has no packing for a module, or None."""
    for format in formats:
        said = [packing.refuse(module) for packing in format.packings]
        if None not in said:
            return said[0]
    return None


def matrix() -> list[tuple[str, ...]]:
    """What every format holds, found by asking it: name, about, bits, groups, asymmetric, mixed."""
    rows: list[tuple[str, ...]] = []
    for format in FORMATS.values():
        bits = [
            b for b in range(2, 9) if _takes(format, Scheme(b)) or _takes(format, Scheme(b, -1))
        ]
        some = bits[-1] if bits else 4
        groups = [g for g in (16, 32, 64, 128, 256, -1) if _takes(format, Scheme(some, g))]
        asym = [b for b in bits if _takes(format, Scheme(b, 128, False))]
        rows.append(
            (
                format.name,
                format.about,
                _range(bits),
                " ".join("row" if g == -1 else str(g) for g in groups),
                _range(asym) or "-",
                "-" if format.uniform or len(bits) == 1 else "yes",
            )
        )
    return rows


def _takes(format: Format, scheme: Scheme) -> bool:
    module = in_any_shape(scheme)
    return module is not None and holds(format, [module])


def in_any_shape(scheme: Scheme) -> Module | None:
    """A module whose shape suits every format: what is refused then is the scheme. None = kept."""
    spec = scheme.spec
    if spec is None:
        return None
    return Module(f"a layer of {scheme}", "", spec, (1024, 32 * (spec.group or 32)))


def _range(values: list[int]) -> str:
    """``2-8`` for a run without gaps, else every value."""
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{values[0]}-{values[-1]}"
    return " ".join(map(str, values))

# SPDX-License-Identifier: Apache-2.0
"""Schemes by name, and which layer gets which: the table, the patterns, the overrides."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoround.errors import InputError
from autoround.patterns import Pattern, compiled
from hal import Spec

#: Bits of a weight that stays as it is in the checkpoint.
KEEP_BITS = 16

#: Small or sensitive projections that every serving engine keeps in 16 bits.
KEPT = re.compile(
    r"(^|\.)(router|gate|shared_expert_gate|weights_proj|modality_router|correction_coefs|x_proj|dt_proj"
    r"|in_proj_(a|b|ba))$"
)
#: Two-dimensional weights of a block that are tables or norms, whatever the architecture.
TABLES = re.compile(r"(^|[._])(embed\w*|embeddings?|wte|wpe|\w*norm\w*|ln_\w+|conv\w*)$")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one kind of layer is quantized. ``group`` -1 = one group per row; ``bits`` 16 = kept."""

    bits: int
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (*range(2, 9), KEEP_BITS):
            raise InputError(f"bits={self.bits}: choose 2 to 8, or 16 to keep a layer")
        if self.group_size != -1 and self.group_size < 16:
            raise InputError(
                f"group_size={self.group_size}: choose -1 (whole row) or a size of at least 16"
            )

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.bits} bits {group} {'sym' if self.sym else 'asym'}"

    @property
    def spec(self) -> Spec | None:
        """The codec's view of it; None = kept."""
        if self.bits == KEEP_BITS:
            return None
        group = max(self.group_size, 0)
        return (
            Spec(f"s{self.bits}", group) if self.sym else Spec(f"u{self.bits}", group, "f16", "int")
        )


SCHEMES: dict[str, Scheme] = {
    **{f"W{b}A16": Scheme(b) for b in range(2, 9)},
    **{f"W{b}A16G{g}": Scheme(b, g) for b in range(2, 9) for g in (32, 64)},
    "INT8": Scheme(8, -1),
    "BF16": Scheme(KEEP_BITS),
}

_FIELDS = ("bits", "group_size", "sym")
_ACT_FIELDS = {"act_bits": (None, KEEP_BITS), "data_type": (None, "int")}


def scheme_by_name(name: str) -> Scheme:
    """A row of SCHEMES, in any case. Raises InputError naming close rows."""
    found = SCHEMES.get(name.upper())
    if found is None:
        raise InputError(f"unknown scheme {name!r}; `autoround list schemes` shows {_near(name)}")
    return found


def _near(name: str) -> str:
    digits = re.search(r"\d", name)
    rows = [k for k in SCHEMES if digits and k.startswith(f"W{digits[0]}")] or list(SCHEMES)[:7]
    return ", ".join(rows) + ", ..."


def override(base: Scheme, changes: Mapping[str, Any] | str | Scheme, where: str) -> Scheme:
    """``base`` with a preset name, a Scheme or a dict of fields laid over it."""
    if isinstance(changes, Scheme):
        return changes
    if isinstance(changes, str):
        changes = {"scheme": changes}
    if not isinstance(changes, Mapping):
        raise InputError(f"{where}: {changes!r:.60} is neither the name of a scheme nor its fields")
    fields = {k: v for k, v in changes.items() if v is not None}
    if "scheme" in fields:
        try:
            base = scheme_by_name(str(fields.pop("scheme")))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    for name, allowed in _ACT_FIELDS.items():
        if fields.pop(name, None) not in allowed:
            raise InputError(f"{where}: {name}={changes[name]!r} is not supported by this version")
    if unknown := set(fields) - set(_FIELDS):
        raise InputError(f"{where}: unknown field {sorted(unknown)}; known: {', '.join(_FIELDS)}")
    kinds = {"bits": int, "group_size": int, "sym": bool}
    if wrong := [name for name, value in fields.items() if type(value) is not kinds[name]]:
        raise InputError(
            f"{where}: {wrong[0]}={fields[wrong[0]]!r:.60} is no {kinds[wrong[0]].__name__}"
        )
    try:
        return replace(base, **fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def pattern(key: str, names: Iterable[str]) -> list[str]:
    """Names that ``key`` means: an exact name or whole module, else a glob or a regular expression.

    A glob has ``*`` for anything, not after a dot alone (``*.q_proj``, ``model.layers.1*.mlp``),
    and is the whole name or a module's; expressions (``.*q_proj``) are searched. A key without
    metacharacters is a substring; a number at either end of it is a whole number, so ``layers.1``
    does not reach ``layers.10``. Raises InputError when nothing matches.
    """
    names = list(names)
    if exact := [n for n in names if n == key or n.startswith(key + ".")]:
        return exact
    own: re.Pattern[str] | Pattern
    if not re.search(r"[*^$|()\[\]?+\\]", key):
        own = re.compile(rf"(?<!\d(?=\d)){re.escape(key)}(?!(?<=\d)\d)")
    elif re.fullmatch(r"[\w.*-]+", key) and re.search(r"(?<!\.)\*", key):
        anything = ".*".join(map(re.escape, key.split("*")))
        own = compiled(rf"^{anything}(\..*)?$")
    else:
        own = compiled(key)
    found = [n for n in names if own.search(n)]
    if not found:
        example = names[0] if names else "none"
        raise InputError(f"layer pattern {key!r} matches no layer; layers look like {example!r}")
    return found


def assign(
    names: Iterable[str],
    scheme: Scheme,
    layer_config: Mapping[str, Mapping[str, Any] | str | Scheme],
    ignore: Iterable[str],
) -> dict[str, Scheme]:
    """Scheme of every layer: ignored layers stay, exact names beat patterns, later wins."""
    names = list(names)
    table = dict.fromkeys(names, scheme)
    exact = set(names) & set(layer_config)
    for key in sorted(layer_config, key=lambda k: k in exact):
        for name in pattern(key, names):
            table[name] = override(scheme, layer_config[key], f"layer_config[{key!r}]")
    for key in ignore:
        for name in pattern(key, names):
            if name not in exact:
                table[name] = Scheme(KEEP_BITS)
    return table

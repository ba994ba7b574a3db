# SPDX-License-Identifier: Apache-2.0
"""Our own files, from which every other format is made: codes in rows, scales, zero levels.

Nothing is rounded or shifted for a reader's sake, so that every export of a run, whenever it is
made, starts from the tuner's own numbers.
"""

from typing import Any

import torch

import hal
from autoround.formats.contents import Contents, Module
from autoround.formats.row import Packing, Parts, Shapes, check
from hal import QTensor, Spec


def _refuse(module: Module) -> str | None:
    return f"{module.shape[1]} columns are not a multiple of 32" if module.shape[1] % 32 else None


def _stored(module: Module, contents: Contents | None) -> Shapes:
    (n, k), spec = module.shape, module.spec
    shapes: Shapes = {
        "codes": (torch.int32, (n, k * spec.bits // 32)),
        "scale": (spec.scale_dtype, (n, spec.groups(k))),
    }
    if not spec.symmetric:
        shapes["zero"] = (torch.uint8, (n, spec.groups(k)))
    if module.act_order:
        shapes["perm"] = (torch.int32, (k,))
    return shapes


def _pack(q: QTensor, module: Module, contents: Contents) -> Parts:
    bare = QTensor(q.spec, q.shape, q.layout, q.parts)
    parts = dict(hal.pack(bare, "stream").parts)
    parts["codes"] = parts.pop("qweight")
    return parts if q.perm is None else {**parts, "perm": q.perm}


def read(module: Module, parts: Parts) -> QTensor:
    """The plain weight of a module's tensors. Raises ValueError where they do not fit together."""
    check(parts, _stored(module, None), module.shape)
    held = {name: t for name, t in parts.items() if name in ("scale", "zero")}
    held["qweight"] = parts["codes"]
    q = hal.pack(QTensor(module.spec, module.shape, "stream", held), "plain")
    q.perm = parts.get("perm")
    return q


CANONICAL = Packing("autoround:canonical", _refuse, _stored, _pack, read=read, scales="scale")


def to_json(contents: Contents) -> dict[str, Any]:
    """What `from_json` needs to know the contents again."""
    return {
        "blocks": contents.blocks,
        "base": _scheme(contents.base),
        "stacks": [*contents.stacks],
        "tensors": {key: [t.dtype, list(t.shape)] for key, t in contents.tensors.items()},
        "modules": {
            m.name: {
                "key": m.key,
                "spec": str(m.spec),
                "shape": list(m.shape),
                "transposed": m.transposed,
                "act_order": m.act_order,
                "least_zero": m.least_zero,
            }
            for m in contents.modules.values()
        },
        "schemes": {name: _scheme(scheme) for name, scheme in contents.schemes.items()},
    }


def _scheme(scheme: Any) -> list[Any]:
    return [scheme.bits, scheme.group_size, scheme.sym]


def modules_from_json(rows: dict[str, Any]) -> dict[str, Module]:
    """The modules of a record by source key. Raises KeyError or ValueError for a damaged one."""
    return {
        row["key"]: Module(
            name, row["key"], Spec.parse(row["spec"]), (row["shape"][0], row["shape"][1]),
            row["transposed"], row["act_order"], row["least_zero"],
        )
        for name, row in rows.items()
    }  # fmt: skip

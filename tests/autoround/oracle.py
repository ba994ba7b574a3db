# SPDX-License-Identifier: Apache-2.0
"""Independent truth for artefacts: bits read one by one, rounding in float64, no code of ours."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

#: Column of nibble i of an AWQ word.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


class Decoded(NamedTuple):
    """``codes [N, K]``, ``scale`` and ``zero [N, G]``, all float64, and columns of a group."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: int

    @property
    def weight(self) -> np.ndarray:
        """``[N, K]``; exact in float64 and in float32 (11 + 9 bits)."""
        at = np.arange(self.codes.shape[1]) // self.group
        return self.scale[:, at] * (self.codes - self.zero[:, at])


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                assert name not in found, name
                found[name] = tensors.get_tensor(name)
    return found


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def packed_modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))


def scheme_of(quantization: dict[str, Any], module: str) -> tuple[int, int, bool]:
    """(bits, group_size, sym) a reader finds for a module: exact name, else pattern, else base."""
    extra = quantization.get("extra_config", {})
    own = extra.get(module) or next(
        (v for key, v in extra.items() if re.search(r"[*^$|()\[\]?+\\]", key)
         and re.search(key, module)), {},
    )  # fmt: skip
    both = {**quantization, **own}
    return both["bits"], both["group_size"], both["sym"]


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    """``[R, W]`` i32 -> ``[R, W * 32 / bits]``: the row's bits in order, ``bits`` a value."""
    flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return flat.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits)).astype(np.float64)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """AWQ: ``[R, W]`` i32 -> ``[R, 8 W]``."""
    out = np.empty((*words.shape, 8))
    for i, column in enumerate(AWQ_COLUMNS):
        out[..., column] = (words.astype(np.int64) >> (4 * i)) & 15
    return out.reshape(words.shape[0], -1)


def decode(
    tensors: dict[str, torch.Tensor], module: str, bits: int, group: int, packing: str
) -> Decoded:
    """One packed module. ``packing``: the config's ``packing_format``."""
    qweight, qzeros, scales = (
        tensors[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")
    )
    assert (qweight.dtype, qzeros.dtype, scales.dtype) == (np.int32, np.int32, np.float16)
    if packing == "auto_round:auto_awq":
        assert bits == 4
        codes, zero = _nibbles(qweight).T, _nibbles(qzeros).T
    else:
        codes, zero = _stream(qweight.T, bits), _stream(qzeros, bits).T
        if packing in ("auto_round:auto_gptq", "auto_round:gptq"):
            zero = zero + 1
        else:
            assert packing in ("auto_round", "auto_round:gptqmodel")
    k = codes.shape[1]
    width = k if group in (-1, 0) or group > k else group
    assert zero.shape == scales.T.shape == (codes.shape[0], -(-k // width))
    return Decoded(codes, scales.T.astype(np.float64), zero, width)


def decode_all(path: Path) -> dict[str, Decoded]:
    """Every packed module of a directory by its config."""
    tensors, own = read(path), config(path)["quantization_config"]
    found = {}
    for module in packed_modules(tensors):
        bits, group, _ = scheme_of(own, module)
        assert bits in range(2, 9), (module, bits)
        found[module] = decode(tensors, module, bits, group, own["packing_format"])
    return found


def assert_nearest(d: Decoded, w: np.ndarray, bits: int, sym: bool) -> None:
    """The codes are round-to-nearest of ``w [N, K]`` by algorithms.md 1.2, shown in float64.

    The scale must be the fp16 nearest to the true one, each level the integer nearest to
    ``w / stored scale``; f32 rounding of the ratio may decide a tie, so a level may be off the
    nearest by what f32 cannot see.
    """
    n, k = w.shape
    g = w.astype(np.float64).reshape(n, k // d.group, d.group)
    low, high = -np.minimum(g.min(-1), 0), np.maximum(g.max(-1), 0)
    top = 2**bits - 1
    if sym:
        scale = np.where(high < low, 1.0, -1.0) * np.maximum(low, high) / 2 ** (bits - 1)
        assert (d.zero == 2 ** (bits - 1)).all()
    else:
        scale = (high + low) / top
        zero = low / d.scale
        assert (np.abs(d.zero - zero) <= 0.5 + np.abs(zero) * 2.0**-23).all()
    floor = float(np.float16(1e-5))
    stored = scale.astype(np.float16).astype(np.float64)
    small = np.abs(stored) < floor
    scale = np.where(small, np.where(stored < 0, -floor, floor), scale)
    ulp = np.spacing(np.abs(d.scale).astype(np.float16)).astype(np.float64)
    assert (np.abs(d.scale - scale) <= ulp / 2 * (1 + 2.0**-11)).all()
    ratio = g / d.scale[..., None]
    exact = ratio + d.zero[..., None]
    codes = d.codes.reshape(g.shape)
    off = np.abs(codes - np.clip(exact, 0, top))
    assert (off <= 0.5 + np.abs(ratio) * 2.0**-22).all()
    assert ((codes >= 0) & (codes <= top)).all()


#: End of a fused tensor of all experts -> names of the linear layers in one of them.
FUSED = {
    "input_linear.weight": ("w1", "w3"), "output_linear.weight": ("w2",),
    "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",),
}  # fmt: skip


def fused(key: str, decoded: dict[str, Decoded], old: torch.Tensor) -> torch.Tensor:
    """All experts of a layer as the one tensor that the float model has: Granite in rows, Llama 4
    in columns, gpt-oss in columns of gate and up in turns."""
    leaf = next(leaf for leaf in FUSED if key.endswith(leaf))
    where = key.removesuffix(leaf).removesuffix("experts.")
    experts = []
    for expert in range(len(old)):
        parts = [decoded[f"{where}experts.{expert}.{name}"].weight for name in FUSED[leaf]]
        taking_turns = len(parts) == 2 and ".mlp." in key
        rows = np.stack(parts, 1).reshape(-1, old.shape[1]) if taking_turns else np.vstack(parts)
        experts.append(rows if leaf.endswith(".weight") else rows.T)
    made = torch.from_numpy(np.stack(experts)).to(old.dtype).contiguous()
    assert made.shape == old.shape, key
    return made


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a float model with every expert's linear layers apart: the inverse of `fused`."""
    found = {}
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in FUSED if key.endswith(leaf)), "")
        if not leaf or tensor.ndim != 3:
            found[key] = tensor
            continue
        names, where = FUSED[leaf], key.removesuffix(leaf).removesuffix("experts.")
        for expert, own in enumerate(tensor):
            rows = own if leaf.endswith(".weight") else own.t()
            n = len(rows) // len(names)
            for at, name in enumerate(names):
                turn = len(names) == 2 and ".mlp." in key
                part = rows[at::2] if turn else rows[at * n : (at + 1) * n]
                found[f"{where}experts.{expert}.{name}.weight"] = part
    return found


def float_twin(source: Path, quantized: Path, target: Path, transposed: bool = False) -> Path:
    """A float checkpoint holding what the quantized one says, for transformers alone to load."""
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    decoded, stored, tensors = decode_all(quantized), read(quantized), {}
    for key, old in read(source).items():
        if (module := key.removesuffix(".weight")) in decoded:
            w = torch.from_numpy(decoded[module].weight)
            tensors[key] = (w.t() if transposed else w).to(old.dtype).contiguous()
            assert tensors[key].shape == old.shape, key
        elif key not in stored:
            tensors[key] = fused(key, decoded, old)
        else:
            tensors[key] = stored[key]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target

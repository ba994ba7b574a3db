# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: Marlin's product of 4 and 8 bits where another program has installed it: vLLM's and
SGLang's own libraries, or one that is loaded in this process already (Hugging Face ``kernels``).
Nothing is fetched or compiled for it, and no Python of theirs is imported. GPTQModel compiles its
own when it is first used, under other names: not offered.

After the kernels of ours that are built for the device (hal/backends/cuda.py), before those that
Triton compiles. The weight is rounded to the dtype of the activations on the way, as a dense model
holds it. Scales must be of that dtype: f16 ones rounded to bf16 miss the tolerance of the HAL
(4.3e-3 for 4e-3). Not run on hardware: tested with doubles of the operators.
"""

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hal.backends import reference
from hal.layout import AWQ_ORDER, Layout, Parts, pack_stream, unpack_stream
from hal.plan import Weight
from hal.registry import WRITTEN, Case, Kernel
from hal.spec import Spec

NAME = "marlin"
KINDS = {"cuda": WRITTEN}

#: Package -> its libraries of operators, by compute capability where that decides.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "vllm": ("_C_stable_libtorch.abi3.so", "_C.abi3.so"),
    "sgl_kernel": ("sm{arch}/common_ops.abi3.so", "sm100/common_ops.abi3.so"),
}
REPACK, PRODUCTS = "gptq_marlin_repack", ("marlin_gemm", "gptq_marlin_gemm")


@cache
def _operators() -> tuple[Any, Any] | str:
    """Repacking and product, or why there are none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    refused = []
    for package, libraries in LIBRARIES.items():
        if found := _registered():
            return found
        if reason := _load(package, libraries):
            refused.append(reason)
    return _registered() or f"no Marlin here: {'; '.join(refused)}"


def _load(package: str, libraries: tuple[str, ...]) -> str | None:
    """Load the first library that a package has; None, or why not."""
    spec = importlib.util.find_spec(package)
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    files = [place / name.format(arch=arch) for place in places for name in libraries]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        return f"{package} is not installed" if not spec else f"{package} has no library of it"
    try:
        torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
    except OSError as error:  # built for another torch
        return f"{file.name} of {package}: {str(error).splitlines()[0]}"
    return None


def _registered() -> tuple[Any, Any] | None:
    """The operators of this process that we know how to call."""
    names = torch._C._dispatch_get_all_op_names()
    spaces = sorted(n.partition("::")[0] for n in names if n.endswith(f"::{REPACK}"))
    for space in spaces:
        ops = getattr(torch.ops, space)
        for name in PRODUCTS:
            if f"{space}::{name}" in names:
                found = (getattr(ops, REPACK).default, getattr(ops, name).default)
                if _names(found[0]) <= REPACKED and _names(found[1]) <= TYPED:
                    return found
    return None


def _names(op: Any) -> set[str]:
    return {argument.name for argument in op._schema.arguments}


#: Arguments that these operators had so far: each version has some of them, and gets those.
REPACKED = {"b_q_weight", "perm", "size_k", "size_n", "num_bits", "is_a_8bit"}
TYPES = {"b_q_type", "b_q_type_id", "b_type_id"}
TYPED = {
    *TYPES, "a", "c_or_none", "b_q_weight", "b_bias_or_none", "b_scales", "a_scales",
    "global_scale", "global_scale_or_none", "b_zeros_or_none", "g_idx_or_none", "perm_or_none",
    "workspace", "size_m", "size_n", "size_k", "is_k_full", "use_atomic_add", "use_fp32_reduce",
    "is_zp_float",
}  # fmt: skip


def _call(op: Any, given: Mapping[str, Any]) -> Tensor:
    result: Tensor = op(*(given.get(argument.name) for argument in op._schema.arguments))
    return result


def probe() -> str | None:
    found = _operators()
    return found if isinstance(found, str) else None


#: What torch tells of the device, and torch's own operations between products.
caps, block_ops, probes = reference.caps, reference.block_ops, reference.probes


# ---- the weight as Marlin has it


def _type(spec: Spec) -> int:
    """`ScalarType.id` of vLLM: the bits from bit 8, what is subtracted from bit 17, IEEE."""
    return spec.bits << 8 | (spec.half if spec.symmetric else 0) << 17 | 1 << 50


@cache
def _order(single: bool) -> Tensor:
    """Which column of a block stands at every place of it: the threads of a tensor-core product
    take eight of 64 each, or of 32 where a column has one scale."""
    if single:
        return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
    return torch.arange(64).view(8, 8).t().flatten()


def _blocked(t: Tensor, order: Tensor) -> Tensor:
    """``t [G, N]`` with the columns of each block in an order."""
    return t.view(-1, len(order))[:, order.to(t.device)].view(t.shape)


def _repacked(codes: Tensor, bits: int) -> Tensor:
    (n, k), device = codes.shape, codes.device
    operators = _operators()
    assert not isinstance(operators, str), operators
    given = {
        "b_q_weight": pack_stream(codes, bits).t().contiguous(),
        "perm": torch.empty(0, dtype=torch.int32, device=device),
        "size_k": k,
        "size_n": n,
        "num_bits": bits,
        "is_a_8bit": False,
    }
    return _call(operators[0], given)


def _pack(parts: Parts, spec: Spec) -> Parts:
    scale = parts["scale"].t().contiguous()
    single = len(scale) == 1
    packed = {
        "codes": _repacked(parts["codes"], spec.bits),
        "scale": _blocked(scale, _order(single)),
    }
    if not spec.symmetric:
        zero = _blocked(parts["zero"].t().contiguous(), _order(False))
        packed["zero"] = pack_stream(_blocked(zero, torch.tensor(AWQ_ORDER)), 4)
    return packed


def _unpack(parts: Parts, spec: Spec, shape: tuple[int, int]) -> Parts:
    """Where a code has gone is asked of the repacking itself, by giving it the digits of places."""
    n, k = shape
    words, bits = parts["codes"], spec.bits
    place = torch.arange(n * k, device=words.device)
    source, mask = torch.zeros_like(place), (1 << bits) - 1
    for shift in range(0, (n * k - 1).bit_length(), bits):
        digit = (place >> shift & mask).to(torch.uint8).view(n, k)
        source |= _codes_of(_repacked(digit, bits), bits).to(torch.int64) << shift
    codes = torch.empty(n * k, dtype=torch.uint8, device=words.device)
    codes[source] = _codes_of(words, bits)
    scale = _blocked(parts["scale"], _order(len(parts["scale"]) == 1).argsort())
    plain = {"codes": codes.view(n, k), "scale": scale.t().contiguous()}
    if not spec.symmetric:
        zero = _blocked(unpack_stream(parts["zero"], 4), torch.tensor(AWQ_ORDER).argsort())
        plain["zero"] = _blocked(zero, _order(False).argsort()).t().contiguous()
    return plain


def _codes_of(words: Tensor, bits: int) -> Tensor:
    return unpack_stream(words.view(1, -1), bits).flatten()


def _bound(weight: Weight) -> dict[str, Any]:
    """Arguments of a product that are the weight's, made once."""
    if weight.handle is None:
        (n, k), parts, kind = weight.shape, weight.parts, _type(weight.spec)
        device = parts["codes"].device
        locks = max(4 * caps(device).units, n // 64 * 16)
        none = torch.empty(0, dtype=torch.int32, device=device)
        weight.handle = {
            "b_q_weight": parts["codes"],
            "b_scales": parts["scale"],
            "b_zeros_or_none": parts.get("zero"),
            "g_idx_or_none": none,
            "perm_or_none": none,
            "workspace": torch.zeros(locks, dtype=torch.int32, device=device),
            **dict.fromkeys(TYPES, kind),
            "size_n": n,
            "size_k": k,
            "is_k_full": True,
            "use_atomic_add": False,  # sums in any order
            "use_fp32_reduce": True,
            "is_zp_float": False,
        }
    handle: dict[str, Any] = weight.handle
    return handle


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    operators = _operators()
    assert not isinstance(operators, str), operators
    given = {"a": x, "c_or_none": out, "size_m": x.shape[0], **_bound(weight)}
    found = _call(operators[1], given)
    if bias is not None:
        torch.add(found, bias.to(x.dtype), out=out)
    elif found.data_ptr() != out.data_ptr():
        out.copy_(found)


def _refuse(spec: Spec, n: int, k: int) -> str | None:
    width = spec.width(k)
    if spec.bits != 4 and not (spec.bits == 8 and spec.symmetric):
        return f"Marlin has s4, u4 and s8, not {spec.elem}"
    if spec.groups(k) > 1 and (width not in (32, 64, 128) or k % width):
        return f"groups of {width} in {k} columns: Marlin has 32, 64, 128 and whole rows"
    if n % 64 or k % 128:
        return f"[{n}, {k}]: Marlin wants N % 64 == 0 and K % 128 == 0"
    return None


def _when(case: Case) -> str | None:
    spec = case.spec
    if case.dtype == torch.float32:
        return "Marlin multiplies bf16 and f16"
    if case.dtype != spec.scale_dtype:
        return f"scales of {spec.scale_dtype}: Marlin wants them in the dtype of x, {case.dtype}"
    return _refuse(spec, case.n, case.k)


LAYOUTS = (Layout("marlin.tiles", _refuse, _pack, _unpack),)

KERNELS = (Kernel("marlin.qgemm", "qgemm", _qgemm, _when, "marlin.tiles"),)

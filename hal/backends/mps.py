# SPDX-License-Identifier: Apache-2.0
"""Apple's GPUs: products by a shader of ours that torch compiles, or by MLX where it is installed.

Not run on hardware. Tests run the shader's text on the host and MLX's product on its CPU.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hal.backends import reference
from hal.layout import WORDS
from hal.plan import Weight
from hal.registry import EMULATED, WRITTEN, Case, Kernel
from hal.spec import Spec

NAME = "mps"
KINDS = {NAME: WRITTEN}
FEW = 16  # rows; from more on the weight is decoded for torch's dense product
LANES = 32  # threads that share a row of the weight
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat", torch.float16: "half"}
MLX_BITS, MLX_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


def probe() -> str | None:
    return None if torch.backends.mps.is_available() else "no Apple GPU that torch can use"


#: What torch tells of the device, and torch's own operations between products.
caps, block_ops, probes = reference.caps, reference.block_ops, reference.probes


# ---- the shader: the weight as rows of words (hal.layout.WORDS)

#: T: dtype of x and out; S: of scales; BITS; SYMMETRIC. sizes: n, k, columns of a group, groups.
SHADER = """
#include <metal_stdlib>
using namespace metal;

inline float level_at(device const uint* words, int i) {
  const int word = i * BITS / 32, shift = i * BITS % 32;
  uint x = words[word] >> shift;
  if (shift + BITS > 32) x |= words[word + 1] << (32 - shift);
  return float(x & ((1u << BITS) - 1));
}

inline float zero_at(device const uchar* zero, int group) {
  return SYMMETRIC ? float(1 << (BITS - 1)) : float(zero[group]);
}

// Row at.y of the weight times row at.z of x. A thread takes 32 columns, BITS words, at a time.
kernel void product(device const T* x, device const uint* codes, device const S* scale,
                    device const uchar* zero, device const float* bias, device T* out,
                    device const int* sizes, uint3 at [[thread_position_in_grid]]) {
  const int n = sizes[0], k = sizes[1], width = sizes[2], groups = sizes[3];
  const int row = int(at.y), chunks = (k + 31) / 32;
  device const T* own = x + long(at.z) * k;
  float sum = 0;
  for (int chunk = int(at.x); chunk < chunks; chunk += 32) {
    device const uint* words = codes + (long(row) * chunks + chunk) * BITS;
    const int first = chunk * 32, end = min(k, first + 32);
    for (int i = first; i < end;) {  // columns of one group
      const int group = i / width, stop = min(end, (group + 1) * width);
      const float level = zero_at(zero, row * groups + group);
      float dot = 0;
      for (; i < stop; i++) dot += float(own[i]) * (level_at(words, i - first) - level);
      sum += float(scale[row * groups + group]) * dot;
    }
  }
  sum = simd_sum(sum);
  if (at.x == 0) out[long(at.z) * n + row] = T(sum + bias[row]);
}

// Column at.x of row at.y of the weight.
kernel void decode(device const uint* codes, device const S* scale, device const uchar* zero,
                   device T* out, device const int* sizes,
                   uint2 at [[thread_position_in_grid]]) {
  const int k = sizes[1], row = int(at.y), i = int(at.x);
  const int group = row * sizes[3] + i / sizes[2];
  device const uint* words = codes + (long(row) * ((k + 31) / 32) + i / 32) * BITS;
  const float level = level_at(words, i % 32) - zero_at(zero, group);
  out[long(row) * k + i] = T(float(scale[group]) * level);
}
"""


def shader(spec: Spec, dtype: torch.dtype) -> str:
    """The shader's text for weights of a spec and x of a dtype."""
    macros = {
        "T": TYPES[dtype],
        "S": TYPES[spec.scale_dtype],
        "BITS": spec.bits,
        "SYMMETRIC": int(spec.symmetric),
    }
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + SHADER


@cache
def _library(text: str) -> Any:
    return torch.mps.compile_shader(text)


def _held(weight: Weight) -> dict[str, Any]:
    """What the shader and MLX look up once per weight."""
    if weight.handle is None:
        weight.handle = {}
    held: dict[str, Any] = weight.handle
    return held


def _bound(weight: Weight) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The compiled shader, sizes, zero levels (any where there are none) and a bias of nothing."""
    held = _held(weight)
    if "shader" not in held:
        spec, (n, k), parts = weight.spec, weight.shape, weight.parts
        sizes = torch.tensor([n, k, spec.width(k), spec.groups(k)], dtype=torch.int32)
        none = torch.zeros(n, dtype=torch.float32, device=weight.device)
        library = _library(shader(spec, weight.dtype))
        zero = parts.get("zero", parts["codes"])
        held["shader"] = (library, sizes.to(weight.device), zero, none)
    bound: tuple[Any, Tensor, Tensor, Tensor] = held["shader"]
    return bound


def _qgemm(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    library, sizes, zero, none = _bound(weight)
    added = none if bias is None else bias.float().contiguous()
    given = (x, weight.parts["codes"], weight.parts["scale"], zero, added, out, sizes)
    threads = (LANES, weight.shape[0], x.shape[0])
    library.product(*given, threads=threads, group_size=(LANES, 1, 1))


def _qgemm_dense(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    """The weight rounded to the dtype of x and multiplied by torch."""
    library, sizes, zero, _ = _bound(weight)
    dense = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    given = (weight.parts["codes"], weight.parts["scale"], zero, dense, sizes)
    library.decode(*given, threads=(weight.shape[1], weight.shape[0]))
    if bias is None:
        torch.mm(x, dense.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, dense.t(), out=out)


# ---- MLX: its packing is the same words; scale * code + bias, where bias = -scale * zero


@cache
def _mlx() -> ModuleType | str:
    try:
        return importlib.import_module("mlx.core")
    except ImportError as error:
        return f"mlx is not installed: {error}"


def _shared(t: Tensor) -> Any:
    """A tensor as MLX has it."""
    mx = _mlx()
    assert not isinstance(mx, str)
    return mx.array(t.cpu())


def mlx_weight(weight: Weight) -> tuple[Any, Any, Any]:
    """Words, scales and biases. f32 holds all products of f16 and bf16 scales with zero levels."""
    spec, parts = weight.spec, weight.parts
    scale = parts["scale"].float()
    zero = parts["zero"].float() if "zero" in parts else torch.full_like(scale, spec.half)
    return _shared(parts["codes"].view(torch.uint32)), _shared(scale), _shared(-scale * zero)


def _qgemm_mlx(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> None:
    mx, spec = _mlx(), weight.spec
    assert not isinstance(mx, str)
    held = _held(weight)
    if "mlx" not in held:
        held["mlx"] = mlx_weight(weight)
    how = {"transpose": True, "group_size": spec.group, "bits": spec.bits}
    found = mx.quantized_matmul(_shared(x.float()), *held["mlx"], **how)
    if bias is not None:
        found = found + _shared(bias.float())
    mx.eval(found)
    out.copy_(torch.frombuffer(found, dtype=torch.float32).view(out.shape))


def _many_rows(case: Case) -> str | None:
    return None if case.m > FEW else f"m <= {FEW}: mps.qgemm is faster, and exact"


def _dense(case: Case) -> str | None:
    exact = "f32: rounding to it gains nothing" if case.dtype == torch.float32 else None
    return exact or _many_rows(case)


def _fits_mlx(case: Case) -> str | None:
    spec = case.spec
    if case.dtype != torch.float32:
        return "copies between torch and MLX are worth it for f32 only"
    if spec.bits not in MLX_BITS or spec.group not in MLX_GROUPS:
        return f"MLX has no {spec.bits} bits in groups of {spec.group}"
    if case.k % spec.group:
        return f"{case.k} columns are no multiple of the group {spec.group}"
    if reason := _many_rows(case):
        return reason
    module = _mlx()
    return module if isinstance(module, str) else None


LAYOUTS = (WORDS,)

KERNELS = (
    Kernel("mps.qgemm_dense", "qgemm", _qgemm_dense, _dense, "words"),
    Kernel("mps.qgemm_mlx", "qgemm", _qgemm_mlx, _fits_mlx, "words", EMULATED),
    Kernel("mps.qgemm", "qgemm", _qgemm, layout="words"),
)

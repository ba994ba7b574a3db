# SPDX-License-Identifier: Apache-2.0
"""Apple's GPUs without one: the shader's text on the host, MLX's product on its CPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hal
from hal.backends import mps
from hal.plan import Weight
from hal.registry import Caps, Case
from hal.testing import TOLERANCE, quantized, relative_error, same, weights

GPU = Caps("mps", "", "", frozenset(), 16, 1 << 35)
ROWS = {row.name: row for row in mps.KERNELS}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")

DRIVER = """
extern "C" void run_product(const T* x, const uint* codes, const S* scale, const uchar* zero,
                            const float* bias, T* out, const int* sizes, uint m) {
  for (uint z = 0; z < m; z++) {
    for (uint y = 0; y < (uint)sizes[0]; y++) {
      handed_in = 0;
      for (counting = true;; counting = false) {
        for (uint i = 0; i < 32; i++) product(x, codes, scale, zero, bias, out, sizes, {i, y, z});
        if (!counting) break;
      }
    }
  }
}
extern "C" void run_decode(const uint* codes, const S* scale, const uchar* zero, T* out,
                           const int* sizes) {
  for (uint y = 0; y < (uint)sizes[0]; y++) {
    for (uint x = 0; x < (uint)sizes[1]; x++) decode(codes, scale, zero, out, sizes, {x, y});
  }
}
"""

Library = Callable[[hal.Spec, torch.dtype], ctypes.CDLL]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """The shader as a host's library, `DRIVER` in the place of the GPU."""

    def build(spec: hal.Spec, dtype: torch.dtype) -> ctypes.CDLL:
        (tmp_path / "metal_stdlib").write_text(f'#include "{Path(__file__).parent}/metal.h"\n')
        (tmp_path / "shader.cpp").write_text(mps.shader(spec, dtype) + DRIVER)
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{tmp_path}"]
        made = tmp_path / "shader.so"
        subprocess.run([*command, tmp_path / "shader.cpp", "-o", made], check=True)
        return ctypes.CDLL(str(made))

    return build


def addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


@needs_compiler
@pytest.mark.parametrize(
    ("text", "n", "k", "dtype"),
    [
        ("s4:g128:f16", 5, 256, torch.float16),
        ("u4:g32:bf16:int", 3, 300, torch.bfloat16),
        ("u3:g20:f32:int", 4, 90, torch.float32),
        ("s2:g0:f16", 2, 1100, torch.bfloat16),
        ("u5:g64:f16:int", 7, 37, torch.float16),
        ("s6:g16:bf16", 3, 64, torch.float32),
        ("u7:g128:f32:int", 2, 320, torch.bfloat16),
        ("u8:g96:f16:int", 3, 200, torch.float32),
    ],
)
def test_the_shader(text: str, n: int, k: int, dtype: torch.dtype, library: Library) -> None:
    q = quantized(weights(n, k, 1), hal.Spec.parse(text))
    parts, built = mps.LAYOUTS[0].pack(q.parts, q.spec), library(q.spec, dtype)
    zero = parts.get("zero", parts["codes"])
    sizes = torch.tensor([n, k, q.spec.width(k), q.spec.groups(k)], dtype=torch.int32)
    dense = torch.full((n, k), torch.nan, dtype=dtype)
    built.run_decode(*addresses(parts["codes"], parts["scale"], zero, dense, sizes))
    assert same(dense, hal.dequantize(q, dtype=dtype))
    x, bias = weights(6, k, 2).to(dtype), torch.randn(n)
    out = torch.full((6, n), torch.nan, dtype=dtype)
    built.run_product(
        *addresses(x, parts["codes"], parts["scale"], zero, bias, out, sizes), ctypes.c_uint(6)
    )
    want = x.double() @ hal.dequantize(q, dtype=torch.float32).double().T + bias.double()
    assert relative_error(out, want) < TOLERANCE[dtype]


MLX_SPECS = ["s4:g128:f16", "u4:g32:bf16:int", "u2:g64:f16:int", "s3:g32:f32", "u5:g64:f16:int"]
MLX_SPECS += ["u6:g128:bf16:int", "s8:g64:f16"]


@pytest.mark.parametrize("text", MLX_SPECS)
def test_mlx_multiplies_by_the_same_weight(text: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    q = quantized(weights(40, 384, 1), hal.Spec.parse(text))
    row = ROWS["mps.qgemm_mlx"]
    assert row.when(Case("qgemm", q.spec, torch.float32, *q.shape, GPU, m=64)) is None
    parts = mps.LAYOUTS[0].pack(q.parts, q.spec)
    weight = Weight(q.spec, q.shape, 1, torch.float32, "words", parts, ((1024, row),))
    dense = hal.dequantize(q, dtype=torch.float32)
    theirs = mx.dequantize(*mps.mlx_weight(weight), group_size=q.spec.group, bits=q.spec.bits)
    mx.eval(theirs)
    own = torch.frombuffer(theirs, dtype=torch.float32).view(dense.shape)
    assert relative_error(own, dense) < 1e-6
    for m, bias in ((17, None), (64, torch.randn(40))):
        x, out = weights(m, 384, m), torch.full((m, 40), torch.nan)
        row.fn(x, weight, bias, out)
        want = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        assert relative_error(out, want) < TOLERANCE[torch.float32], m


@pytest.mark.parametrize(
    ("text", "k", "m", "dtype", "why"),
    [
        ("s7:g128:f16", 256, 64, torch.float32, "7 bits"),
        ("s4:g0:f16", 256, 64, torch.float32, "groups of 0"),
        ("s4:g128:f16", 320, 64, torch.float32, "multiple of the group"),
        ("s4:g128:f16", 256, 64, torch.bfloat16, "f32 only"),
        ("s4:g128:f16", 256, 16, torch.float32, "faster"),
    ],
)
def test_mlx_says_what_it_cannot(text: str, k: int, m: int, dtype: torch.dtype, why: str) -> None:
    case = Case("qgemm", hal.Spec.parse(text), dtype, 64, k, GPU, m=m)
    assert why in str(ROWS["mps.qgemm_mlx"].when(case))

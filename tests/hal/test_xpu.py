# SPDX-License-Identifier: Apache-2.0
"""Intel GPUs without one: the SYCL kernels on a processor, and a double of torch's operator."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hal
from hal.backends import xpu
from hal.plan import Weight
from hal.registry import Caps, Case
from hal.testing import quantized, relative_error, same, weights

PARITY = Path(__file__).with_name("test_parity.py")
GPU = Caps("xpu", "", "", frozenset({"xmx"}), 160, 1 << 34)
ROWS = {row.name: row for row in xpu.KERNELS}


@pytest.mark.slow  # `make sycl` builds what it needs
def test_sycl_kernels_equal_the_reference() -> None:
    """In a process of its own: a backend serves what its environment says when it is imported."""
    pytest.importorskip("hal._sycl", reason="hal._sycl is not built here: make sycl")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "xpu"]
    done = subprocess.run(
        [*command, str(PARITY)],
        env={**os.environ, "ONEAPI_DEVICE_SELECTOR": "opencl:cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40


#: One verb and one product: each compiles all kernels of its file.
ASKS = """
import torch, hal
from hal.testing import quantized, weights
w, spec = weights(16, 64, 1), hal.Spec("s4", 32)
hal.qdq(w, hal.search(w, spec), spec)
hal.qgemm(w.bfloat16(), hal.prepare(quantized(w, spec), dtype=torch.bfloat16))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ocloc"), reason="needs apt-get install intel-opencl-icd")
@pytest.mark.parametrize(("gpu", "spilled"), [("pvc", 8), ("dg2", 0)])
def test_intels_compiler_takes_the_kernels(gpu: str, spilled: int, tmp_path: Path) -> None:
    """Debian's, of 2022: it knows neither later GPUs nor the matrix engines of today's SPIR-V."""
    pytest.importorskip("hal._sycl", reason="hal._sycl is not built here: make sycl")
    env = {**os.environ, "ONEAPI_DEVICE_SELECTOR": "opencl:cpu", "SYCL_DUMP_IMAGES": "1"}
    env |= {"HAL_BACKEND": "xpu", "SYCL_CACHE_PERSISTENT": "0"}
    subprocess.run([sys.executable, "-c", ASKS], env=env, cwd=tmp_path, check=True)
    images = list(tmp_path.glob("*.spv"))
    assert len(images) == 2
    for image in images:
        command = ["ocloc", "compile", "-file", image, "-spirv_input", "-device", gpu]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "Build succeeded" in done.stdout, done.stdout + done.stderr
        assert all(int(n) <= spilled for n in re.findall(r"spilled around (\d+)", done.stdout))


def int4_product(x: Tensor, words: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    """What torch checks and oneDNN computes: eight codes a word along K, lowest bits first; scales
    in the dtype of x, zero levels in s8, both [K / group, N]; the weight rounded to that dtype."""
    (n, packed), k = words.shape, x.shape[1]
    assert words.dtype == torch.int32
    assert packed * 8 == k
    assert scale.shape == zero.shape == (k // group, n)
    assert scale.dtype == x.dtype
    assert zero.dtype == torch.int8
    assert all(t.is_contiguous() for t in (x, words, scale, zero))
    codes = torch.stack([words >> 4 * i & 15 for i in range(8)], -1).flatten(1)
    steps = codes.t() - zero.repeat_interleave(group, 0)
    return x @ (steps * scale.repeat_interleave(group, 0)).to(x.dtype)


@pytest.fixture
def operator() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_weight_int4pack_mm_with_scales_and_zeros", int4_product, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("text", ["s4:g128:bf16", "u4:g32:f16:int", "s4:g0:f16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchs_product_of_4_bits(text: str, dtype: torch.dtype) -> None:
    q = quantized(weights(48, 256, 1), hal.Spec.parse(text))
    row = ROWS["xpu.qgemm_int4"]
    assert row.when(Case("qgemm", q.spec, dtype, *q.shape, GPU, m=64)) is None
    parts = xpu.LAYOUTS[0].pack(q.parts, q.spec)
    weight = Weight(q.spec, q.shape, 1, dtype, "words", parts, ((1024, row),))
    dense = hal.dequantize(q, dtype=torch.float32).double()
    for m, bias in ((33, None), (64, torch.randn(48))):
        x, out = weights(m, 256, m).to(dtype), torch.empty(m, 48, dtype=dtype)
        row.fn(x, weight, bias, out)
        want = x.double() @ dense.T + (0 if bias is None else bias.double())
        assert relative_error(out, want) < 8e-3  # scale and weight are rounded to the dtype


@pytest.mark.parametrize(
    ("text", "k", "m", "dtype", "why"),
    [
        ("s3:g128:f16", 256, 64, torch.float16, "4 bits"),
        ("s4:g48:f16", 96, 64, torch.float16, "multiple of 32"),
        ("s4:g128:f16", 320, 64, torch.float16, "whole groups"),
        ("s4:g128:f16", 256, 64, torch.float32, "rounding"),
        ("s4:g128:f16", 256, 16, torch.float16, "exact"),
    ],
)
def test_torchs_product_says_what_it_cannot(
    text: str, k: int, m: int, dtype: torch.dtype, why: str
) -> None:
    case = Case("qgemm", hal.Spec.parse(text), dtype, 64, k, GPU, m=m)
    assert why in str(ROWS["xpu.qgemm_int4"].when(case))


@pytest.mark.parametrize("k", [1, 37, 64, 300])
@pytest.mark.parametrize("bits", range(2, 9))
def test_words_hold_every_code(bits: int, k: int) -> None:
    q = quantized(weights(5, k, bits), hal.Spec(f"u{bits}", 32, zero="int"))
    parts = xpu.LAYOUTS[0].pack(q.parts, q.spec)
    assert parts["codes"].shape == (5, -(-k // 32) * bits)
    back = xpu.LAYOUTS[0].unpack(parts, q.spec, q.shape)
    assert all(same(back[name], q.parts[name]) for name in q.parts)


def test_kernels_for_one_kind_of_device_come_before_those_for_several() -> None:
    names = [b.NAME for b in hal.backends.backends()]
    assert names[-1] == "reference"
    assert names.index("xpu") < names.index("triton")

# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels without a GPU: their bodies on a host that plays one, and compiled by nvcc."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import hal
from hal.backends import cuda
from hal.testing import TOLERANCE, quantized, relative_error, same, weights

HERE, KERNELS = Path(__file__).parent, Path(__file__).parents[2] / "kernels_cuda"
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

CASES = [
    # (spec, n, k): every width, groups of 16 to 256 and whole rows, tails in both directions
    ("s4:g128:f16", 48, 256),
    ("u4:g32:bf16:int", 40, 300),
    ("s2:g64:f16", 16, 512),
    ("u3:g128:f32:int", 33, 260),
    ("s5:g16:f16", 16, 144),
    ("u6:g64:f16:int", 50, 132),
    ("s7:g0:bf16", 20, 200),
    ("s8:g128:f16", 32, 384),
    ("u8:g32:f32:int", 17, 128),
    ("s3:g256:f16", 16, 1100),
]


class Product(ctypes.Structure):
    """`hal_cuda::Product`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "zero", "bias", "out")),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "chunks", "groups", "shift")),
        *((name, ctypes.c_int32) for name in ("scale_dtype", "bias_dtype")),
    ]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("simt") / "libproduct.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-I{HERE}"]
    subprocess.run([*command, HERE / "simt_product.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def fragments(q: hal.QTensor) -> dict[str, torch.Tensor]:
    return cuda.LAYOUTS[0].pack(q.parts, q.spec)


def call(
    host: ctypes.CDLL, q: hal.QTensor, x: torch.Tensor, bias: torch.Tensor | None, dense: bool
) -> torch.Tensor:
    """The product, or the dense weight, as the launcher in qgemm.cu would have it."""
    (n, k), parts = q.shape, fragments(q)
    out = torch.full((n, k) if dense else (len(x), n), torch.nan, dtype=x.dtype)
    given = Product(
        x.data_ptr(), parts["codes"].data_ptr(), parts["scale"].data_ptr(),
        parts["zero"].data_ptr() if "zero" in parts else None,
        None if bias is None else bias.data_ptr(), out.data_ptr(),
        len(x), n, k, parts["codes"].shape[1], q.spec.groups(k), cuda.shift(q.spec, k),
        cuda.DTYPES[q.spec.scale_dtype], 0 if bias is None else cuda.DTYPES[bias.dtype],
    )  # fmt: skip
    how = (cuda.DTYPES[x.dtype], q.spec.bits, cuda.steps(q.spec, k), int(dense))
    assert host.hal_cuda_product(ctypes.byref(given), *how, None) == 0
    return out


@pytest.mark.parametrize(("text", "n", "k"), CASES)
def test_fragments_hold_every_code(text: str, n: int, k: int) -> None:
    q = quantized(weights(n, k, 1), hal.Spec.parse(text))
    back = cuda.LAYOUTS[0].unpack(fragments(q), q.spec, q.shape)
    assert back.keys() == q.parts.keys()
    assert all(same(back[name], q.parts[name]) for name in back)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("text", "n", "k"), CASES)
def test_products(text: str, n: int, k: int, dtype: torch.dtype, host: ctypes.CDLL) -> None:
    q = quantized(weights(n, k, 1), hal.Spec.parse(text))
    w = hal.dequantize(q, dtype=torch.float32)
    for m in (1, 5, 11):
        x, bias = weights(m, k, m).to(dtype), torch.randn(n) if m > 1 else None
        want = x.double() @ w.double().T + (0 if bias is None else bias.double())
        assert relative_error(call(host, q, x, bias, False), want) < TOLERANCE[dtype], m
    dense = call(host, q, torch.zeros(0, k, dtype=dtype), None, True)
    assert same(dense, w.to(dtype))


@needs_compiler
@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
def test_nvcc_spills_nothing(arch: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(
        [*command, "-Xptxas", "-v", "-c", KERNELS / "qgemm.cu", "-o", tmp_path / "qgemm.o"],
        capture_output=True,
        text=True,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spills) == 2 * 7 * 13  # dtypes, widths, three sizes by four groups and decode
    assert set(spills) == {"0"}

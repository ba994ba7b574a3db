# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels without a GPU: their bodies on a host that plays one, and compiled by nvcc."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import on_host
import pytest
import torch

import hal
from hal.backends import cuda
from hal.plan import Weight
from hal.testing import TOLERANCE, quantized, relative_error, same, weights

HERE, KERNELS = Path(__file__).parent, Path(__file__).parents[2] / "kernels_cuda"
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

ROWS = {row.name: row for row in cuda.KERNELS}
#: Flags (cmake/cuda.cmake) and kernels of every file. Products: two dtypes, seven widths, and three
#: sizes by four groups or decode.
SOURCES = {"groups.cu": (["-fmad=false"], 7), "qgemm.cu": ([], 2 * 7 * 13)}
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
    ("s4:g128:f16", 16, 6300),  # six and seven chunks a warp, which has four under way
    ("u8:g64:bf16:int", 16, 3300),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hal._cuda with kernels that run on this machine."""
    return on_host.build(tmp_path_factory.mktemp("simt"))


@needs_compiler
def test_kernels_equal_the_reference(host: Path) -> None:
    """Every CUDA row through tests/hal/test_parity.py, in a process that takes CPUs for GPUs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_host"]
    paths = {"PYTHONPATH": str(HERE), "SIMT_MODULE": str(host)}
    done = subprocess.run(
        [*command, "-k", "cuda", str(HERE.parent / "hal" / "test_parity.py")],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 21
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(("text", "n", "k"), CASES)
def test_fragments_hold_every_code(text: str, n: int, k: int) -> None:
    q = quantized(weights(n, k, 1), hal.Spec.parse(text))
    parts = cuda.LAYOUTS[0].pack(q.parts, q.spec)
    back = cuda.LAYOUTS[0].unpack(parts, q.spec, q.shape)
    assert back.keys() == q.parts.keys()
    assert all(same(back[name], q.parts[name]) for name in back)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("text", "n", "k"), CASES)
def test_products(
    text: str, n: int, k: int, dtype: torch.dtype, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = on_host.load(host)
    monkeypatch.setattr(cuda, "_import", lambda: module)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    q = quantized(weights(n, k, 1), hal.Spec.parse(text))
    w = hal.dequantize(q, dtype=torch.float32)
    native = cuda.LAYOUTS[0].pack(q.parts, q.spec)
    ready = Weight(q.spec, q.shape, 1, dtype, "cuda.fragments", native, ())
    dense = torch.empty(n, k, dtype=dtype)
    cuda._bound(ready).decode(dense.data_ptr(), cuda.DTYPES[dtype], 0)
    assert same(dense, w.to(dtype))
    for m in (1, 5, 11):
        x, bias = weights(m, k, m).to(dtype), torch.randn(n) if m > 1 else None
        want = x.double() @ w.double().T + (0 if bias is None else bias.double())
        out = torch.full((m, n), torch.nan, dtype=dtype)
        ROWS["cuda.qgemm"].fn(x, ready, bias, out)
        assert relative_error(out, want) < TOLERANCE[dtype], m


#: Faults in how chunks pass through shared memory, each of which makes products wrong.
EARLY = {
    "read before it is there": ("arrived<STAGES - 1>()", "arrived<STAGES>()"),
    "overwritten before it is read": ("(stage + STAGES - 1) % STAGES)", "stage)"),
    "never waited for at the end": (
        "    commit();\n  };",
        "    if (chunk < p.chunks) commit();\n  };",
    ),
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("right", "wrong"), EARLY.values(), ids=EARLY)
def test_the_host_sees_what_is_not_waited_for(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("csrc", "kernels_cuda", "tests/native"):
        shutil.copytree(HERE.parents[1] / folder, tmp_path / folder)
    source = tmp_path / "kernels_cuda" / "qgemm.cuh"
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    module = on_host.load(on_host.build(tmp_path, tmp_path))
    monkeypatch.setattr(cuda, "_import", lambda: module)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    spec, k = hal.Spec.parse("s4:g128:f16"), 9 * 8 * 128  # nine chunks a warp
    q = quantized(weights(16, k, 1), spec)
    native = cuda.LAYOUTS[0].pack(q.parts, spec)
    ready = Weight(spec, q.shape, 1, torch.float16, "cuda.fragments", native, ())
    x, out = weights(1, k, 2).half(), torch.empty(1, 16, dtype=torch.float16)
    ROWS["cuda.qgemm"].fn(x, ready, None, out)
    want = x.double() @ hal.dequantize(q, dtype=torch.float32).double().T
    assert not relative_error(out, want) < 0.1


@needs_compiler
@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "89", "90a", "100a", "120a"])
def test_nvcc_spills_nothing(arch: str, tmp_path: Path) -> None:
    for source, (flags, kernels) in SOURCES.items():
        command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        done = subprocess.run(
            [*command, *flags, "-Xptxas", "-v", "-c", KERNELS / source, "-o", tmp_path / "o"],
            capture_output=True,
            text=True,
            check=True,
        )
        spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
        assert len(spills) == kernels, source
        assert set(spills) == {"0"}, source

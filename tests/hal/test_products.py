# SPDX-License-Identifier: Apache-2.0
"""Products of any shape, encoding and column order against float64; and how they may be called."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import FLOATS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hal
from hal.backends import cpu
from hal.testing import TOLERANCE, quantized, relative_error, same, weights

ISAS = cpu.isas() if cpu.probe() is None else ()
needs_native = pytest.mark.skipif(not ISAS, reason=str(cpu.probe()))


@pytest.fixture(params=("reference", *ISAS))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, and the native products on every instruction set of this machine."""
    name = str(request.param)
    monkeypatch.setenv(*("HAL_BACKEND", name) if name == "reference" else ("HAL_ISA", name))
    return name


GROUPS = (0, 8, 16, 20, 32, 64, 100, 128, 256)
SPECS = st.builds(
    lambda bits, group, scale, asym: hal.Spec(
        f"{'u' if asym else 's'}{bits}", group, scale, **({"zero": "int"} if asym else {})
    ),
    st.integers(2, 8),
    st.sampled_from(GROUPS),
    st.sampled_from(("f16", "bf16", "f32")),
    st.booleans(),
)
DTYPES = st.sampled_from(FLOATS)
SIZES = {"n": st.integers(1, 200), "k": st.integers(1, 400)}
ANY = settings(
    max_examples=100,
    # The choice of kernels stays.
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def weight(spec: hal.Spec, n: int, k: int, shuffled: bool, seed: int) -> tuple[hal.QTensor, Tensor]:
    """A quantized weight, with its columns in act-order if ``shuffled``, and its numbers in f64."""
    q = quantized(weights(n, k, seed), spec)
    if shuffled:
        rng = torch.Generator().manual_seed(seed)
        g_idx = torch.arange(k, dtype=torch.int32) // spec.width(k)
        q = q.ordered(g_idx[torch.randperm(k, generator=rng)])
    plain = {name: t.double() for name, t in replace(q, perm=None).parts.items()}
    group = torch.arange(k) // spec.width(k)
    zero = plain["zero"][:, group] if "zero" in plain else float(spec.half)
    dense = plain["scale"][:, group] * (plain["codes"] - zero)
    return q, dense if q.perm is None else dense[:, q.perm.argsort()]


def rounded(x: Tensor, group: int, q: hal.QTensor) -> Tensor:
    """``x`` in f64 after 8 bits a group, in the order in which the columns are stored."""
    order = torch.arange(x.shape[1]) if q.perm is None else q.perm.long()
    codes, scale = hal.quantize_act(x[:, order].contiguous(), hal.Act("s8", group))
    scales = scale.repeat_interleave(q.spec.width(x.shape[1]), 1)[:, : x.shape[1]]
    return (codes.double() * scales.double())[:, order.argsort()]


def close(got: Tensor, want: Tensor, what: object) -> None:
    assert got.shape == want.shape
    assert relative_error(got, want) < TOLERANCE[got.dtype], what


@given(
    spec=SPECS, dtype=DTYPES, **SIZES, m=st.integers(0, 40), bias=st.sampled_from((None, *FLOATS)),
    fast=st.booleans(), shuffled=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
@example(hal.Spec("s4", 128), torch.bfloat16, 128, 256, 0, torch.float32, False, True, 0)
@example(hal.Spec("s3", 64), torch.bfloat16, 65, 129, 300, None, False, True, 1)
@example(
    hal.Spec("u5", 32, zero="int"), torch.bfloat16, 130, 136, 1030, torch.float32, True, True, 2
)
@example(
    hal.Spec("u7", 136, zero="int"), torch.float16, 300, 700, 150, torch.bfloat16, True, True, 3
)
@ANY
def test_products(
    kernels: str, spec: hal.Spec, dtype: torch.dtype, n: int, k: int, m: int,
    bias: torch.dtype | None, fast: bool, shuffled: bool, seed: int,
) -> None:  # fmt: skip
    q, dense = weight(spec, n, k, shuffled, seed)
    act = hal.Act("s8", spec.group) if fast else None
    ready = hal.prepare(q, dtype=dtype, act=act)
    x = weights(m, k, seed + 1).to(dtype) if m else torch.empty(0, k, dtype=dtype)
    b = None if bias is None else torch.linspace(-1, 1, n).to(bias)
    served = bool(m) and ready.kernel(m).name.endswith("_fast")
    used = rounded(x, spec.group, q) if served else x.double()
    want = used @ dense.T + (0 if b is None else b.double())
    close(hal.qgemm(x, ready, b), want, ready.kernel(m))


@given(
    spec=SPECS, dtype=DTYPES, **SIZES, counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    fast=st.booleans(), shuffled=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
@ANY
def test_products_of_experts(
    kernels: str, spec: hal.Spec, dtype: torch.dtype, n: int, k: int, counts: list[int],
    fast: bool, shuffled: bool, seed: int,
) -> None:  # fmt: skip
    experts, m = len(counts), sum(counts)
    q, dense = weight(spec, n * experts, k, shuffled, seed)
    q.experts = experts
    ready = hal.prepare(q, dtype=dtype, act=hal.Act("s8", spec.group) if fast else None)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    x = weights(m, k, seed + 1).to(dtype) if m else torch.empty(0, k, dtype=dtype)
    got = hal.qgemm_grouped(x, ready, offsets)
    served = bool(m) and ready.kernel(m).name.endswith("_fast")
    used = rounded(x, spec.group, q) if served else x.double()
    wants = [
        own @ w.T for own, w in zip(used.split(counts), dense.view(experts, n, k), strict=True)
    ]
    close(got, torch.cat(wants), ready.kernel(m))


@needs_native
def test_one_weight_used_from_several_python_threads() -> None:
    torch.manual_seed(0)
    ready = hal.prepare(
        quantized(weights(512, 1024, 1), hal.Spec.parse("u4:g32:f16:int")), dtype=torch.bfloat16
    )
    inputs = [torch.randn(m, 1024).bfloat16() for m in (1, 3, 40, 300) * 4]
    wants = [hal.qgemm(x, ready) for x in inputs]
    ready.handle = None  # looked up by whoever comes first
    with ThreadPoolExecutor(4) as pool:
        gots = list(pool.map(lambda x: hal.qgemm(x, ready), inputs * 4))
    assert all(same(got, want) for got, want in zip(gots, wants * 4, strict=True))


def test_inference_mode_and_gradients_elsewhere() -> None:
    """A product is no part of a graph: the same numbers in every mode, and none asks for grad."""
    q = quantized(weights(96, 64, 1), hal.Spec("s4", 32))
    ready, x = hal.prepare(q, dtype=torch.float32), torch.randn(5, 64)
    want = hal.qgemm(x, ready)
    with torch.inference_mode():
        made_here = hal.qgemm(x.clone(), hal.prepare(q, dtype=torch.float32))
        assert made_here.is_inference()
        assert same(made_here, want)
    assert same(hal.qgemm(x.clone().requires_grad_(), ready), want)


COUNTS = """
import os, sys, torch, hal
from hal.testing import quantized, weights
torch.set_num_threads(1)
w = quantized(weights(1024, 1024, 1), hal.Spec("s4", 128))
ready, x = hal.prepare(w, dtype=torch.bfloat16), torch.randn(32, 1024).bfloat16()
found = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    hal.qgemm(x, ready)
    found.append(len(os.listdir("/proc/self/task")))
print(*(n - found[0] for n in found))
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_products_take_as_many_threads_as_torch_was_given() -> None:
    """OpenMP starts a thread when it is first needed and keeps it."""
    run = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "1", "2"], run.stderr

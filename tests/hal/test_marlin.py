# SPDX-License-Identifier: Apache-2.0
"""Marlin's row with doubles of the operators, as packages have them; not run on hardware."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hal
from hal.backends import marlin
from hal.plan import Weight
from hal.registry import Case, described
from hal.testing import quantized, relative_error, same, weights

#: Signatures as they stand in the libraries: vLLM 0.33, SGLang's kernels 0.3.21, vLLM 0.10.
VERSIONS = {
    "new": (
        "gptq_marlin_repack(Tensor b_q_weight, SymInt size_k, SymInt size_n, int num_bits, "
        "bool is_a_8bit) -> Tensor",
        "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
        "Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, "
        "Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, "
        "bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor",
    ),
    "sgl": (
        "gptq_marlin_repack(Tensor! b_q_weight, Tensor! perm, int size_k, int size_n, "
        "int num_bits) -> Tensor",
        "gptq_marlin_gemm(Tensor! a, Tensor? c_or_none, Tensor! b_q_weight, Tensor! b_scales, "
        "Tensor? global_scale_or_none, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, "
        "Tensor? perm_or_none, Tensor! workspace, int b_q_type_id, int size_m, int size_n, "
        "int size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, "
        "bool is_zp_float) -> Tensor",
    ),
    "old": (
        "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, "
        "int num_bits) -> Tensor",
        "gptq_marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, "
        "Tensor b_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none, "
        "Tensor? perm_or_none, Tensor workspace, int b_q_type, SymInt size_m, SymInt size_n, "
        "SymInt size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, "
        "bool is_zp_float) -> Tensor",
    ),
}
#: Integers of vLLM 0.33's scalar_types: uint4b8, uint8b128, uint4. Bits, what is subtracted.
TYPES = {1125899907892224: (4, 8), 1125899923621888: (8, 128), 1125899906843648: (4, None)}


def fields(words: Tensor, bits: int) -> Tensor:
    """Codes of a row of words, lowest first."""
    return torch.stack([words >> bits * i & (1 << bits) - 1 for i in range(32 // bits)], -1)


def shuffled(k: int, n: int) -> Tensor:
    """Any order of the codes will do: it is the double's own."""
    return torch.randperm(k * n, generator=torch.Generator().manual_seed(k + n))


def repack(words: Tensor, k: int, n: int, bits: int) -> Tensor:
    assert words.shape == (k * bits // 32, n)
    codes = fields(words.t(), bits).flatten()[shuffled(k, n)]
    parts = codes.view(-1, 32 // bits) << bits * torch.arange(32 // bits)
    return parts.sum(1).to(torch.int32).view(k // 16, -1)


def unblocked(t: Tensor, single: bool) -> Tensor:
    """Column o of a block of 64 is at 8 (o mod 8) + o / 8; of one of 32, with a scale a column, at
    8 (o mod 8 / 2) + 2 (o / 8) + o mod 2."""
    size = 32 if single else 64
    o = torch.arange(size)
    at = 8 * (o % 8 // 2) + 2 * (o // 8) + o % 2 if single else 8 * (o % 8) + o // 8
    return t.reshape(-1, size)[:, at].reshape(t.shape)


def product(given: dict[str, object]) -> Tensor:
    """What the operator is told, multiplied in f64; the weight rounded as the kernel rounds it."""
    a, scales, zeros = given["a"], given["b_scales"], given.get("b_zeros_or_none")
    assert isinstance(a, Tensor)
    assert isinstance(scales, Tensor)
    kind = next(given[name] for name in ("b_type_id", "b_q_type_id", "b_q_type") if name in given)
    bits, bias = TYPES[kind]  # type: ignore[index]
    m, n, k = (given[f"size_{d}"] for d in "mnk")
    assert a.shape == (m, k)
    assert scales.dtype == a.dtype
    assert not given["use_atomic_add"]
    assert given.get("is_k_full", True)
    locks = given["workspace"]
    assert isinstance(locks, Tensor)
    assert locks.numel() >= n // 64 * 16  # type: ignore[operator]
    assert not locks.any()
    codes = torch.empty(k * n, dtype=torch.int32)  # type: ignore[operator]
    codes[shuffled(k, n)] = fields(given["b_q_weight"], bits).flatten()  # type: ignore
    steps = codes.view(n, k).t().float()  # type: ignore
    rows = k // len(scales)  # type: ignore[operator]
    if bias is None:
        assert isinstance(zeros, Tensor)
        places = fields(
            zeros, 4
        )  # [groups, n / 8, 8], place i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]
        blocked = torch.empty_like(places)
        blocked[..., [0, 2, 4, 6, 1, 3, 5, 7]] = places
        level = unblocked(blocked.flatten(1), False).float()
        steps -= level.repeat_interleave(rows, 0)
    else:
        assert zeros is None
        steps -= bias
    scale = unblocked(scales, len(scales) == 1).repeat_interleave(rows, 0)
    dense = (steps.to(a.dtype) * scale).double()
    result = (a.double() @ dense).to(a.dtype)
    out = given["c_or_none"]
    assert isinstance(out, Tensor)
    return out.copy_(result)


def named(schema: str) -> list[str]:
    return [part.split()[-1] for part in schema.partition("(")[2].partition(")")[0].split(",")]


@pytest.fixture(scope="module", params=VERSIONS)
def operators(request: pytest.FixtureRequest) -> Iterator[None]:
    repacking, multiplying = VERSIONS[request.param]
    library = torch.library.Library(f"marlin_{request.param}", "DEF")

    def repacked(*args: object) -> Tensor:
        given = dict(zip(named(repacking), args, strict=True))
        return repack(*(given[n] for n in ("b_q_weight", "size_k", "size_n", "num_bits")))  # type: ignore

    def multiplied(*args: object) -> Tensor:
        return product(dict(zip(named(multiplying), args, strict=True)))

    for schema, fn in ((repacking, repacked), (multiplying, multiplied)):
        library.define(schema)
        library.impl(schema.partition("(")[0], fn, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        found = marlin._registered()
        assert found is not None
        assert found[0].namespace == f"marlin_{request.param}"
        patch.setattr(marlin, "_operators", lambda: found)
        yield
    library._destroy()


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("s4:g128:bf16", torch.bfloat16),
        ("s4:g32:f16", torch.float16),
        ("s4:g0:f16", torch.float16),
        ("u4:g64:bf16:int", torch.bfloat16),
        ("u4:g0:f16:int", torch.float16),
        ("s8:g128:f16", torch.float16),
        ("s8:g0:bf16", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("operators")
def test_products(text: str, dtype: torch.dtype) -> None:
    q = quantized(weights(192, 256, 1), hal.Spec.parse(text))
    row, layout = marlin.KERNELS[0], marlin.LAYOUTS[0]
    case = Case("qgemm", q.spec, dtype, *q.shape, described(torch.device("cpu")), m=8)
    assert row.when(case) is None
    parts = layout.pack(q.parts, q.spec)
    back = layout.unpack(parts, q.spec, q.shape)
    assert back.keys() == q.parts.keys()
    assert all(same(back[name], q.parts[name]) for name in q.parts)
    weight = Weight(q.spec, q.shape, 1, dtype, "marlin.tiles", parts, ((1024, row),))
    dense = hal.dequantize(q, dtype=torch.float32).double()
    for m, bias in ((1, None), (7, torch.randn(192))):
        x, out = weights(m, 256, m).to(dtype), torch.full((m, 192), torch.nan, dtype=dtype)
        row.fn(x, weight, bias, out)
        want = x.double() @ dense.T + (0 if bias is None else bias.double())
        assert relative_error(out, want) < {torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize(
    ("text", "n", "k", "dtype", "why"),
    [
        ("s3:g128:bf16", 64, 256, torch.bfloat16, "s4, u4 and s8"),
        ("u8:g128:bf16:int", 64, 256, torch.bfloat16, "s4, u4 and s8"),
        ("s4:g16:bf16", 64, 256, torch.bfloat16, "32, 64, 128"),
        ("s4:g128:bf16", 96, 256, torch.bfloat16, "N % 64"),
        ("s4:g64:bf16", 64, 192, torch.bfloat16, "K % 128"),
        ("s4:g128:f16", 64, 256, torch.float32, "bf16 and f16"),
        ("s4:g128:f16", 64, 256, torch.bfloat16, "in the dtype of x"),
    ],
)
def test_says_what_it_cannot(text: str, n: int, k: int, dtype: torch.dtype, why: str) -> None:
    case = Case("qgemm", hal.Spec.parse(text), dtype, n, k, described(torch.device("cpu")), m=8)
    assert why in str(marlin.KERNELS[0].when(case))


def test_operators_of_unknown_arguments_are_left() -> None:
    library = torch.library.Library("marlin_later", "DEF")
    library.define(VERSIONS["new"][0])
    library.define(VERSIONS["new"][1].replace("bool is_zp_float", "bool is_zp_float, int mode"))
    found = marlin._registered()
    assert found is None or found[0].namespace != "marlin_later"
    library._destroy()


def test_a_package_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "not installed" in str(marlin._load("no_such_package", ("x.so",)))
    assert "no library" in str(marlin._load("hal", ("sm{arch}/x.so",)))


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "brokenmarlin"
    (folder / "sm90").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "sm90" / "x.so").write_text("no library")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "x.so of brokenmarlin" in str(marlin._load("brokenmarlin", ("sm{arch}/x.so",)))

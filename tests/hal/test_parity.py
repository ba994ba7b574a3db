# SPDX-License-Identifier: Apache-2.0
"""Every kernel row of every usable backend, on every instruction set, against the reference."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FLOATS, KINDS, specs, weight

import hal
from hal import codec
from hal import device as devices
from hal.backends import REFERENCE, cpu, reference, serving
from hal.layout import LAYOUTS
from hal.plan import Weight
from hal.registry import Case, Kernel, bucket
from hal.testing import TOLERANCE, params, quantized, relative_error, same, weights

NATIVE = cpu.probe() is None
ISAS = cpu.isas() if NATIVE else ()
needs_native = pytest.mark.skipif(not NATIVE, reason=str(cpu.probe()))


HOST = torch.device("cpu")


def each(*ops: str) -> pytest.MarkDecorator:
    """Rows of every backend on the devices of this machine, native ones on every instruction set.

    One argument for each op, named like it, and ``place``: where the tensors are.
    """
    found = []
    for where in dict.fromkeys((HOST, devices.resolve(None))):
        for b in (b for b in serving(where.type) if b.NAME != REFERENCE):
            for row in itertools.product(*([r for r in b.KERNELS if r.op == op] for op in ops)):
                for isa in ISAS if b is cpu else ("",):
                    names = [*(r.name for r in row), isa or str(where)]
                    found.append(pytest.param(*row, (where, isa), id="-".join(names)))
    if not found:  # nothing here but the reference: its row is held to the codec
        own = itertools.product(*([r for r in reference.KERNELS if r.op == op] for op in ops))
        found = [pytest.param(*row, (HOST, ""), id="-".join(r.name for r in row)) for row in own]
    return pytest.mark.parametrize((*ops, "place"), found, indirect=["place"])


@pytest.fixture
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    where, isa = request.param
    if isa:
        monkeypatch.setenv("HAL_ISA", isa)
    return where


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HAL_ISA", request.param)
    return str(request.param)


def interpreted(row: Kernel, place: torch.device) -> bool:
    return place == HOST and not row.name.startswith(cpu.NAME)


def tried(row: Kernel, place: torch.device) -> list[tuple[hal.Spec, torch.Tensor]]:
    """Every spec with two kinds of weight, kinds and dtypes taking turns; a sample of them for
    kernels that an interpreter runs."""
    turns = itertools.cycle(itertools.product(KINDS, FLOATS))
    found = [
        (spec, weight(kind, n, k, dtype))
        for spec, n, k in specs()
        for kind, dtype in itertools.islice(turns, 2)
    ]
    few = 61 if row.op == "search" else 13
    return found[::few] if interpreted(row, place) else found


def poisoned(
    shape: tuple[int, ...], dtype: torch.dtype, place: torch.device = HOST
) -> torch.Tensor:
    """What a kernel must overwrite: 0xA5 in every byte."""
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    return torch.full((size,), 0xA5, dtype=torch.uint8, device=place).view(dtype).view(shape)


def moved(parts: dict[str, torch.Tensor], place: torch.device) -> dict[str, torch.Tensor]:
    return {name: t.to(place) for name, t in parts.items()}


@each("search")
@pytest.mark.parametrize("grid", [0, 8])
def test_search(search: Kernel, place: torch.device, grid: int) -> None:
    for i, (spec, w) in enumerate(tried(search, place)):
        importance = torch.rand(w.shape[1]) if i % 2 else None
        shape = (w.shape[0], spec.groups(w.shape[1]))
        amin, amax = (poisoned(shape, torch.float32, place) for _ in range(2))
        given = None if importance is None else importance.to(place)
        search.fn(w.to(place), spec, given, grid, amin, amax)
        want = codec.search(w, spec, importance, grid)
        assert same(amin.cpu(), want[0]), (spec, w.dtype, i)
        assert same(amax.cpu(), want[1]), (spec, w.dtype, i)


@each("qdq")
def test_qdq(qdq: Kernel, place: torch.device) -> None:
    for i, (spec, w) in enumerate(tried(qdq, place)):
        here, p = params(w.to(place), spec, i), params(w, spec, i)
        if i % 3 == 0:
            here.v = p.v = None
        out = poisoned(tuple(w.shape), w.dtype, place)
        qdq.fn(w.to(place), here, spec, out)
        assert same(out.cpu(), codec.qdq(w, p, spec)), (spec, w.dtype, i)


@each("qdq")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_ties(qdq: Kernel, place: torch.device, bits: int, dtype: torch.dtype) -> None:
    """Every significand of an f16 scale times the middles of levels, and the floats around them."""
    spec = hal.Spec(f"s{bits}", 0, "f16")
    scale = torch.arange(1024, 2048)[:: 97 if interpreted(qdq, place) else 1, None] / 4096
    middles = (scale * (torch.arange(-spec.half, spec.half) + 0.5)).to(dtype)
    ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    w = torch.cat([middles, *(middles.nextafter(end) for end in ends)], 1)
    one, none = torch.ones_like(scale), torch.zeros_like(scale)
    p = hal.Params(None, one, one, -scale * spec.half, none)
    out = poisoned(tuple(w.shape), dtype, place)
    here = hal.Params(None, *(t.to(place) for t in (p.lo, p.hi, p.amin, p.amax)))
    qdq.fn(w.to(place), here, spec, out)
    assert same(out.cpu(), codec.qdq(w, p, spec))


@each("qdq_step")
def test_qdq_step(qdq_step: Kernel, place: torch.device) -> None:
    for i, (spec, w) in enumerate(tried(qdq_step, place)):
        got, want = params(w.to(place), spec, i), params(w, spec, i)
        if i % 3 == 0:
            got.v = want.v = None
        grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(i)).to(FLOATS[i % 3])
        grad[grad.abs() < 0.1] = 0
        qdq_step.fn(got, w.to(place), grad.to(place), spec, 0.005, 0.3)
        codec.qdq_step_(want, w, grad, spec, 0.005, 0.3)
        pairs = [(got.lo, want.lo), (got.hi, want.hi)]
        if got.v is not None and want.v is not None:
            pairs.append((got.v, want.v))
        assert all(same(a.cpu(), b) for a, b in pairs), (spec, w.dtype, i)


@each("quantize", "dequantize")
def test_quantize_dequantize(quantize: Kernel, dequantize: Kernel, place: torch.device) -> None:
    for i, (spec, w) in enumerate(tried(quantize, place)):
        p, groups = params(w, spec, i), (w.shape[0], spec.groups(w.shape[1]))
        shapes = {"codes": (tuple(w.shape), torch.uint8), "scale": (groups, spec.scale_dtype)}
        if not spec.symmetric:
            shapes["zero"] = (groups, torch.uint8)
        got = {name: poisoned(*of, place) for name, of in shapes.items()}
        want = {name: poisoned(*of) for name, of in shapes.items()}
        quantize.fn(w.to(place), params(w.to(place), spec, i), spec, got)
        reference._quantize(w, p, spec, want)
        assert all(same(got[name].cpu(), want[name]) for name in want), (spec, w.dtype, i)
        out, truth = poisoned(tuple(w.shape), w.dtype, place), torch.empty_like(w)
        dequantize.fn(moved(want, place), spec, out)
        reference._dequantize(want, spec, truth)
        assert same(out.cpu(), truth), (spec, w.dtype, i)


@each("quantize_act")
def test_quantize_act(quantize_act: Kernel, place: torch.device) -> None:
    for i, (spec, x) in enumerate(tried(quantize_act, place)):
        want = codec.quantize_act(x, spec.group, None)
        got = quantize_act.fn(x.to(place), spec.group, None)
        assert all(same(a.cpu(), b) for a, b in zip(got, want, strict=True)), (spec, x.dtype, i)
        given = want[1] * 0.7  # clips
        codes, scale = quantize_act.fn(x.to(place), spec.group, given.to(place))
        assert same(codes.cpu(), codec.quantize_act(x, spec.group, given)[0]), (spec, x.dtype, i)
        assert same(scale.cpu(), given)


@each("hadamard")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hadamard(hadamard: Kernel, place: torch.device, dtype: torch.dtype) -> None:
    for block in (1, 2, 16, 32, 128, 1024):
        x = weights(5, 2 * block, block).to(dtype)
        got = x.clone().to(place)
        hadamard.fn(got, block)
        assert same(got.cpu(), codec.hadamard(x, block)), block


@each("pack", "unpack")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_unpack(
    bits: int, layout: str, pack: Kernel, unpack: Kernel, place: torch.device
) -> None:
    for spec in (hal.Spec(f"s{bits}", 32), hal.Spec(f"u{bits}", 96, zero="int")):
        for n, k in ((32, 96), (64, 288)):
            if LAYOUTS[layout].fits(spec, n, k):
                continue
            plain = quantized(weights(n, k, bits), spec).parts
            want = LAYOUTS[layout].pack(plain, spec)
            got = pack.fn(moved(plain, place), spec, (n, k), layout)
            assert got.keys() == want.keys()
            assert all(same(got[name].cpu(), want[name]) for name in want), spec
            back = unpack.fn(moved(want, place), spec, (n, k), layout)
            assert all(same(back[name].cpu(), plain[name]) for name in plain), spec


#: (n, k, group): vectors of 64 weights and what is left of them, two groups to a vector, odd
#: counts of groups, a last group that is short, more groups than a batch, rows of many pieces.
ROUNDED = [
    (5, 352, 128), (3, 640, 64), (7, 96, 32), (5, 160, 16), (3, 320, 40), (2, 1312, 0),
    (33, 128, 128), (1, 32, 128), (2, 576, 192),
]  # fmt: skip


@each("round")
@pytest.mark.parametrize("bits", range(2, 9))
def test_round(round: Kernel, place: torch.device, bits: int) -> None:
    turns = itertools.cycle(itertools.product(KINDS, FLOATS))
    scales = itertools.cycle(("f16", "bf16", "f32", "f16"))
    kinds = 2 if interpreted(round, place) else 5
    for n, k, group in ROUNDED:
        for elem, zero in ((f"s{bits}", ""), (f"u{bits}", "int")):
            for (kind, dtype), scale in zip(itertools.islice(turns, kinds), scales):  # noqa: B905
                spec, w = hal.Spec(elem, group, scale, zero), weight(kind, n, k, dtype)
                case = Case("round", spec, dtype, n, k, devices.caps(place), layout="stream")
                if round.when(case):
                    continue
                q, _, s, z = codec.levels(w, hal.Params(None, *_whole(w, spec)), spec)
                plain = {"codes": codec.ungrouped(q, k).to(torch.uint8), "scale": s, "zero": z}
                plain = {**plain, "scale": s.to(spec.scale_dtype), "zero": z.to(torch.uint8)}
                if spec.symmetric:
                    del plain["zero"]
                want = LAYOUTS["stream"].pack(plain, spec)
                got = round.fn(w.to(place), spec, "stream")
                assert got.keys() == want.keys()
                for name, t in want.items():
                    assert torch.equal(got[name].cpu(), t), (spec, n, k, kind, dtype, name)


def _whole(w: torch.Tensor, spec: hal.Spec) -> list[torch.Tensor]:
    """lo, hi, amin, amax of rounding to nearest."""
    amin, amax = codec.value_range(w, spec)
    return [torch.ones_like(amin), torch.ones_like(amin), amin, amax]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_a_stream(bits: int, layout: str) -> None:
    """Rounded in one pass or in steps, turned or by way of a byte for each code: the same files."""
    for spec in (hal.Spec(f"s{bits}", 32), hal.Spec(f"u{bits}", 0, zero="int")):
        w = weights(64, 288, bits).bfloat16()
        if hal.refuse(spec, (64, 288), layout):
            continue
        want = hal.pack(hal.quantize(w, hal.search(w, spec), spec), layout).parts
        stream = hal.quantize(w, None, spec, layout="stream")
        for got in (hal.pack(stream, layout), hal.quantize(w, None, spec, layout=layout)):
            assert got.layout == layout
            assert got.parts.keys() == want.keys()
            assert all(same(got.parts[name], t) for name, t in want.items()), spec


GEMM_SHAPES = [(1, 1), (33, 1), (65, 90), (70, 256), (128, 512), (3, 300), (192, 640)]


def product_cases() -> list[hal.QTensor]:
    cases = []
    for i, bits in enumerate(range(2, 9)):
        for j, group in enumerate((0, 16, 20, 32, 128)):
            scale = ("f16", "f32", "bf16")[(i + j) % 3]
            n, k = GEMM_SHAPES[(3 * i + j) % len(GEMM_SHAPES)]
            asym = {"zero": "int"} if (i + j) % 2 else {}
            spec = hal.Spec(f"{'u' if asym else 's'}{bits}", group, scale, **asym)
            cases.append(quantized(weights(n, k, 7 * i + j), spec))
    cases += [
        quantized(weights(128, 512, 9), hal.Spec.parse(f"u4:g{g}:f16:int")) for g in (32, 128)
    ]
    return cases


PRODUCTS = product_cases()


@each("qgemm")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_qgemm(
    qgemm: Kernel, place: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_KERNEL", qgemm.name.split(".")[0] + ".qgemm*")
    slow, caps = interpreted(qgemm, place), devices.caps(place)
    rows = (1, 5, 70) if slow else (1, 2, 3, 4, 5, 17, 101)
    for i, q in enumerate(PRODUCTS[FLOATS.index(dtype) :: 3] if slow else PRODUCTS):
        w = hal.dequantize(q, dtype=torch.float32).double()
        ready = hal.prepare(q, dtype=dtype, device=place)
        for m in (*rows[i % 2 :: 2], *[600] * (i % 6 == 0 and not (slow and i))):
            if qgemm.when(Case("qgemm", q.spec, dtype, *q.shape, caps, m=bucket(m))):
                continue
            x = weights(m, q.shape[1], m).to(dtype)
            bias = torch.randn(q.shape[0]).to(FLOATS[i % 3]) if i % 3 else None
            out = poisoned((m, q.shape[0]), dtype, place)
            qgemm.fn(x.to(place), ready, None if bias is None else bias.to(place), out)
            want = x.double() @ w.T + (0 if bias is None else bias.double())
            assert relative_error(out.cpu(), want) < TOLERANCE[dtype], (q.spec, q.shape, m)


@each("qgemm_grouped")
@pytest.mark.parametrize("rows_of_expert", [64, 40])
def test_products_of_experts(
    qgemm_grouped: Kernel, place: torch.device, rows_of_expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_KERNEL", qgemm_grouped.name.split(".")[0] + ".qgemm*")
    spec, experts, k = hal.Spec.parse("u3:g32:f16:int"), 4, 96
    q = quantized(weights(experts * rows_of_expert, k, 1), spec)
    q.experts = experts
    dense = hal.dequantize(q, dtype=torch.float32).double().view(experts, rows_of_expert, k)
    ends = [0, 5, 5, 42, 43]  # the second expert gets nothing, the third more than a tile
    for dtype in FLOATS:
        x, ready = weights(43, k, 2).to(dtype), hal.prepare(q, dtype=dtype, device=place)
        caps = devices.caps(place)
        case = Case("qgemm_grouped", spec, dtype, *q.shape, caps, m=bucket(43), experts=experts)
        if qgemm_grouped.when(case):
            continue
        out = poisoned((43, rows_of_expert), dtype, place)
        offsets = torch.tensor(ends, dtype=torch.int32, device=place)
        qgemm_grouped.fn(x.to(place), ready, offsets, out)
        out = out.cpu()
        for e in range(experts):
            own = slice(ends[e], ends[e + 1])
            assert relative_error(out[own], x[own].double() @ dense[e].T) < TOLERANCE[dtype]


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fast_products_are_exact_on_quantized_activations(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for q in PRODUCTS:
        act = hal.Act("s8", q.spec.group)
        most = cpu.FAST_ROWS.get(isa, 0)
        if isa == "amx" and q.spec.width(q.shape[1]) < 128:
            most = 16
        ready = hal.prepare(q, dtype=dtype, act=act)
        w = hal.dequantize(q, dtype=torch.float32).double()
        for m in (1, 2, 3, 4, 7, 8, 70, 300):
            served = m <= most
            assert (ready.kernel(m).name == "cpu.qgemm_fast") == served
            x = weights(m, q.shape[1], m).to(dtype)
            bias = torch.randn(q.shape[0])
            codes, scale = hal.quantize_act(x, act)
            scales = scale.repeat_interleave(q.spec.width(x.shape[1]), 1)[:, : x.shape[1]]
            used = codes.double() * scales.double() if served else x.double()
            got, want = hal.qgemm(x, ready, bias), used @ w.T + bias.double()
            assert relative_error(got, want) < TOLERANCE[dtype], (q.spec, q.shape, m)
            exact = x.double() @ w.T + bias.double()
            assert relative_error(got, exact) < 0.02, (q.spec, q.shape, m)


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(
    "spec", ["s4:g128:f16", "u7:g136:bf16:int", "u8:g0:f16:int", "s3:g256:f32"]
)
def test_fast_rows_do_not_depend_on_their_number(isa: str, spec: str) -> None:
    q = quantized(weights(330, 1160, 0), hal.Spec.parse(spec))
    ready = hal.prepare(q, dtype=torch.bfloat16, act=hal.Act("s8", q.spec.group))
    x = weights(600, 1160, 1).bfloat16()
    served = [m for m in (1, 2, 8, 70, 150, 600) if ready.kernel(m).name == "cpu.qgemm_fast"]
    found = [hal.qgemm(x[:m], ready) for m in served]
    assert all(same(few, found[-1][: len(few)]) for few in found)


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("bits", range(2, 9))
def test_products_of_bf16_numbers_are_exact_to_a_millionth(isa: str, bits: int) -> None:
    for text in (f"s{bits}:g128:f32", f"u{bits}:g32:f32:int", f"s{bits}:g0:f32"):
        q = quantized(weights(130, 1024, bits), hal.Spec.parse(text))
        w = hal.dequantize(q, dtype=torch.float32).double()
        ready = hal.prepare(q, dtype=torch.float32)
        for m in (1, 3, 9, 40):
            x = weights(m, 1024, m)
            x[:, ::97] *= 64  # outliers
            x = x.bfloat16().float()
            got = hal.qgemm(x, ready)
            assert relative_error(got, x.double() @ w.T) < 1e-6, (text, m)


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: torch.dtype, bad: float) -> None:
    q = quantized(weights(70, 256, 1), hal.Spec.parse("s4:g128:f16"))
    ready = hal.prepare(q, dtype=dtype)
    for m in (1, 3, 20):
        x = weights(m, 256, m).to(dtype)
        want = hal.qgemm(x, ready)
        x[m - 1, 5] = bad
        got = hal.qgemm(x, ready)
        assert same(got[: m - 1], want[: m - 1])
        assert not got[m - 1].isfinite().all()


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_zeros_and_the_smallest_numbers(isa: str) -> None:
    q = quantized(weights(70, 256, 1), hal.Spec.parse("u4:g64:f32:int"))
    w = hal.dequantize(q, dtype=torch.float32).double()
    ready = hal.prepare(q, dtype=torch.float32)
    assert not hal.qgemm(torch.zeros(3, 256), ready).any()
    x = weights(2, 256, 2) * 1e-30
    assert relative_error(hal.qgemm(x, ready), x.double() @ w.T) < 1e-5


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_more_rows_than_are_prepared_at_once(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAL_KERNEL", "cpu.qgemm")
    q = quantized(weights(70, 96, 1), hal.Spec.parse("u4:g32:f16:int"))
    ready, x = hal.prepare(q, dtype=torch.float32), torch.randn(1601, 96)
    want = x.double() @ hal.dequantize(q, dtype=torch.float32).double().T
    assert relative_error(hal.qgemm(x, ready), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("rows_of_expert", [64, 40, 7])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_qgemm_grouped(isa: str, rows_of_expert: int, dtype: torch.dtype) -> None:
    spec, experts, k = hal.Spec.parse("u4:g32:f16:int"), 4, 96
    q = quantized(weights(experts * rows_of_expert, k, 1), spec)
    q.experts = experts
    dense = hal.dequantize(q, dtype=torch.float32).double().view(experts, rows_of_expert, k)
    torch.manual_seed(0)
    x = torch.randn(23, k).to(dtype)
    ends = [0, 5, 5, 22, 23]  # the second expert gets nothing
    got = hal.qgemm_grouped(x, hal.prepare(q, dtype=dtype), torch.tensor(ends, dtype=torch.int32))
    fast = hal.prepare(q, dtype=dtype, act=hal.Act("s8", 32))
    rounded = hal.qgemm_grouped(x, fast, torch.tensor(ends, dtype=torch.int32))
    assert ("fast" in fast.kernel(23).name) == (isa in cpu.FAST_ROWS and isa != "avx512vnni")
    for e in range(experts):
        own = slice(ends[e], ends[e + 1])
        want = x[own].double() @ dense[e].T
        assert relative_error(got[own], want) < TOLERANCE[dtype]
        assert relative_error(rounded[own], want) < 0.03


def test_experts_with_activations_in_s8() -> None:
    spec, experts, k, inner = hal.Spec.parse("s4:g32:f16"), 3, 64, 96
    up, down = (
        quantized(weights(experts * n, columns, n), spec)
        for n, columns in ((2 * inner, k), (k, inner))
    )
    up.experts = down.experts = experts

    def act(h: torch.Tensor) -> torch.Tensor:
        gate, value = h.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * value

    torch.manual_seed(0)
    x, index = torch.randn(9, k), torch.randint(0, experts, (9, 2))
    share = torch.rand(9, 2)
    results = []
    for fast in (False, True):
        module = hal.QExperts(experts, act)
        module.load(up, down, torch.float32, fast=fast)
        results.append(module(x, index, share))
    assert relative_error(results[1], results[0]) < 0.04


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_restore_is_the_inverse_of_prepare(isa: str) -> None:
    for q in PRODUCTS:
        back = hal.restore(hal.prepare(q, dtype=torch.bfloat16))
        assert all(same(back.parts[name], q.parts[name]) for name in q.parts), (q.spec, q.shape)


def tuned_and_multiplied(threads: int) -> list[torch.Tensor]:
    """Everything large enough to be split, with this many threads."""
    spec, w = hal.Spec.parse("u4:g128:f16:int"), weights(512, 1024, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        p = params(w, spec, 2)
        found = hal.search(w, spec, grid=8)
        q = hal.quantize(w, p, spec)
        ready = hal.prepare(q, dtype=torch.bfloat16)
        products = [hal.qgemm(weights(m, 1024, m).bfloat16(), ready) for m in (1, 9, 100, 600)]
        hal.qdq_step_(p, w, weights(512, 1024, 3), spec, lr_v=0.01, lr_range=0.01)
        assert p.v is not None
        tuned = [p.v, p.lo, p.hi, found.amin, hal.qdq(w, p, spec)]
        return [*tuned, *ready.parts.values(), *hal.pack(q, "gptq_raw").parts.values(), *products]
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    one, two = tuned_and_multiplied(1), tuned_and_multiplied(2)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


@needs_native
def test_calls_from_several_python_threads() -> None:
    want = tuned_and_multiplied(2)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: tuned_and_multiplied(2), range(8)):
            assert all(same(a, b) for a, b in zip(got, want, strict=True))


@needs_native
def test_a_weight_keeps_its_tensors_alive() -> None:
    q = quantized(weights(64, 256, 1), hal.Spec("s4"))
    ready: Weight = hal.prepare(q, dtype=torch.bfloat16)
    x = torch.randn(1, 256).bfloat16()
    before = hal.qgemm(x, ready)
    del q
    assert same(before, hal.qgemm(x, ready))


def test_every_device_passes_its_own_check() -> None:
    from hal.testing import check

    for found in devices.devices():
        assert [what for what, right in check(found.torch) if not right] == []

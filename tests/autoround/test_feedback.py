# SPDX-License-Identifier: Apache-2.0
"""The closed form: its quadratic against float64 arithmetic by the book, its place in a block."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F

import hal
from autoround.models import Call, Samples
from autoround.options import build_recipe
from autoround.run import pipeline
from autoround.run.events import Event, Step
from autoround.stages import BlockTask, Feedback, Kept, LayerTask, Measure, Search, quadratic
from autoround.stages.feedback import least
from autoround.stages.inputs import Moments, dataflow, expert_moments, gain, moments
from autoround.stages.quadratic import Grid, cholesky_, damped, descend, feedback, refit

PGDOC = Path(__file__).parents[2] / "benchmarks/models/pgdoc"
SPECS = ["s2:g16:f16", "s4:g32:f16", "u3:g16:f16:int", "s3:g0:f16", "u2:g24:f16:int"]


def problem(spec: hal.Spec, n: int = 5, k: int = 40) -> tuple[Tensor, Tensor, Grid]:
    """A weight, transposed, the second moment of correlated inputs, and a searched grid."""
    random = torch.Generator().manual_seed(3)
    t = torch.randn(n, k, generator=random)
    x = torch.randn(200, k, generator=random) @ torch.randn(k, k, generator=random)
    h = x.t() @ x
    params = hal.search(t, spec, importance=h.diagonal().contiguous(), grid=40)
    return t.t().contiguous(), h, Grid.of(t, params, spec)


def cost(q: Tensor, t: Tensor, h: Tensor) -> float:
    e = (q - t).double()
    return float(torch.trace(e.t() @ h.double() @ e))


def rounded(x: Tensor, column: int, grid: Grid) -> Tensor:
    """The nearest level's value of one column ``[N]``."""
    g = column // grid.spec.width(grid.k)
    scale, zero = grid.scale[:, g], grid.zero[:, g]
    return ((x / scale).round() + zero).clamp(0, grid.spec.max_level).sub(zero) * scale


@pytest.fixture(params=SPECS, ids=str)
def spec(request: pytest.FixtureRequest) -> hal.Spec:
    return hal.Spec.parse(request.param)


# ---- the quadratic ---------------------------------------------------------------------------


def test_params_mean_their_grid_exactly(spec: hal.Spec) -> None:
    t, _, grid = problem(spec)
    parts = hal.quantize(t.t().contiguous(), grid.params(), spec).parts
    assert torch.equal(parts["scale"].float(), grid.scale)
    if "zero" in parts:
        assert torch.equal(parts["zero"].float(), grid.zero)
    on_grid = torch.stack([rounded(t[j], j, grid) for j in range(len(t))], 1)
    assert torch.equal(hal.qdq(t.t().contiguous(), grid.params(), spec), on_grid)
    assert torch.equal(hal.qdq(on_grid, grid.params(), spec), on_grid)


def test_feedback_equals_eliminating_one_column_at_a_time(spec: hal.Spec) -> None:
    """Optimal brain surgeon by the book: after each column, the inverse of what is left (f64)."""
    t, h, grid = problem(spec)
    left, inverse = t.double(), torch.linalg.inv(damped(h, 0.01))
    want = torch.empty_like(t)
    for j in range(len(t)):
        want[j] = rounded(left[j].float(), j, grid)
        error = (left[j] - want[j].double()) / inverse[j, j]
        left -= error * inverse[j][:, None]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    differs = feedback(t, damped(h, 0.01), grid) != want
    assert differs.float().mean() < 0.02  # ties that f32 and f64 break differently


def test_feedback_where_f32_finds_no_factor(
    spec: hal.Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, h, grid = problem(spec)
    want = feedback(t, h.double(), grid)
    monkeypatch.setattr(
        quadratic, "cholesky_", lambda a: None if a.dtype == torch.float32 else cholesky_(a)
    )
    assert torch.equal(feedback(t, h, grid), want)


def test_descent_ends_where_no_single_level_helps(spec: hal.Spec) -> None:
    t, h, grid = problem(spec, n=3, k=24)
    q = feedback(t, damped(h, 0.01), grid)
    costs = [cost(q, t, h)]
    for _ in range(12):
        q = descend(q, t, h, grid, sweeps=1)
        costs.append(cost(q, t, h))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(costs))
    levels = torch.arange(spec.max_level + 1)
    for j in range(len(t)):
        g = j // spec.width(len(t))
        for level in levels:
            other = q.clone()
            other[j] = grid.scale[:, g] * (level - grid.zero[:, g])
            assert cost(other, t, h) >= costs[-1] * (1 - 1e-5)


def test_refit_is_least_squares(spec: hal.Spec) -> None:
    t, h, grid = problem(spec)
    q = feedback(t, damped(h, 0.01), grid)
    new_q, new = refit(q, h @ t, h, grid)
    assert cost(new_q, t, h) < cost(q, t, h)
    width, k = spec.width(len(t)), len(t)
    root = torch.linalg.cholesky(h.double())
    for row in range(t.shape[1]):
        codes = (q[:, row].double() / grid.spread(grid.scale)[:, row].double()).round()
        by_group = torch.zeros(k, new.scale.shape[1], dtype=torch.float64)
        by_group[torch.arange(k), torch.arange(k) // width] = codes
        best = torch.linalg.lstsq(root.t() @ by_group, root.t() @ t[:, row].double()).solution
        least = cost((by_group @ best)[:, None].float(), t[:, row : row + 1], h)
        found = cost(new_q[:, row : row + 1], t[:, row : row + 1], h)
        assert found <= least * 1.02 + 1e-6  # the ridge and the f16 of a stored scale
    new_q = new_q.t().contiguous()
    assert torch.equal(hal.qdq(new_q, new.params(), spec), new_q)


# ---- in a block ------------------------------------------------------------------------------

H, INNER, COUNT = 32, 64, 16


class Block(nn.Module):
    """Two residual branches, the second with a layer of two users; optionally a norm at the end."""

    def __init__(self, scale_after: float = 1.0) -> None:
        super().__init__()
        self.mix = nn.Linear(H, H, bias=False)
        self.gate, self.up = nn.Linear(H, INNER), nn.Linear(H, INNER, bias=False)
        self.down = nn.Linear(INNER, H)
        self.scale_after = scale_after

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = hidden_states + self.mix(hidden_states.roll(1, 1))
        inner = torch.nn.functional.layer_norm(x, (H,))
        x = x + self.down(torch.sigmoid(self.gate(inner)) * self.up(inner))
        return (x * self.scale_after,)


def case(block: Block, noise: float = 0.1, held: int = 2) -> BlockTask:
    """The block as a task, its quantized chain a noisy copy of the float one."""
    random = torch.Generator().manual_seed(1)
    shape = (COUNT, 24, H)
    xs = torch.randn(shape, generator=random) @ torch.randn(H, H, generator=random) / H**0.5
    errors = noise * torch.randn(shape, generator=random) + noise * xs.roll(1, 2)
    spec = hal.Spec.parse("s3:g16:f16")
    layers = {
        f"{name}.weight": LayerTask(spec, m.weight.detach().clone(), lambda m: m)
        for name, m in block.named_children()
    }
    task = BlockTask(0, block, layers, contextlib.nullcontext)
    task.floats = Samples({i: Call((x[None],), {}) for i, x in enumerate(xs)})
    task.x = Samples({i: Call((x[None],), {}) for i, x in enumerate(xs + errors)})
    task.y = {i: block(x[None])[0].detach() for i, x in enumerate(xs)}
    task.held = tuple(range(COUNT - held, COUNT))
    return task


@pytest.fixture
def block() -> Block:
    torch.manual_seed(5)
    return Block().eval().requires_grad_(False)


def test_layers_in_the_order_of_their_use(block: Block) -> None:
    task = case(block)
    assert dataflow(task, (0, 1)) == [
        ["mix.weight"], ["gate.weight", "up.weight"], ["down.weight"]
    ]  # fmt: skip


@pytest.mark.parametrize("after", [1.0, 0.25])
def test_gain_of_what_adds_to_the_residual(after: float) -> None:
    torch.manual_seed(5)
    task = case(Block(after).eval().requires_grad_(False))
    tied = gain(task, "down.weight", {}, (0,))
    assert tied is not None
    assert torch.allclose(tied, torch.full_like(tied, after), rtol=1e-3)
    assert gain(task, "mix.weight", {}, (0,)) is not None
    assert gain(task, "gate.weight", {}, (0,)) is None


def test_moments_are_those_of_the_inputs(block: Block) -> None:
    task = case(block)
    assert task.x is not None
    assert task.floats is not None
    batches = task.x.batches(task.seen, 4)

    def inputs(samples: Any) -> Tensor:
        x = torch.cat([samples.call(i).hidden[0] for i in task.seen]).double()
        return x.view(-1, 24, H).roll(1, 1).flatten(0, 1)

    x, f = inputs(task.x), inputs(task.floats)
    plain = moments(task, "mix.weight", {}, batches, None)
    assert plain is not None
    close = {"rtol": 0.02, "atol": 0.02 * float((x.t() @ x).diagonal().mean())}
    assert torch.allclose(plain.h.double(), x.t() @ x, **close)
    assert torch.allclose(plain.miss.double(), (f - x).t() @ x, **close)
    lacking = moments(task, "mix.weight", {}, batches, torch.full((H,), 2.0))
    assert lacking is not None
    call = task.x.gather(task.seen)
    y = torch.cat([task.y[i] for i in task.seen]).flatten(0, 1).double()  # type: ignore[index]
    error = y - block(*call.args)[0].flatten(0, 1).double()
    squares = y.pow(2).mean(-1, keepdim=True)  # a position counts as a share of what it is
    close["atol"] *= float((1 / squares).mean())
    assert torch.allclose(lacking.h.double(), x.t() @ (x / squares), **close)
    assert torch.allclose(lacking.miss.double(), (error / 2 / squares).t() @ x, **close)


class Massive(nn.Module):
    """One position's output is hundreds of times as large as the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, INNER, bias=False), nn.Linear(INNER, H, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + self.down(F.relu(self.up(hidden_states)) ** 2),)


def test_a_massive_position_does_not_decide_for_all_others() -> None:
    torch.manual_seed(5)
    block = Massive().eval().requires_grad_(False)
    task = case(block, noise=0.0)
    assert task.floats is not None
    xs = {i: task.floats.call(i).hidden.clone() for i in range(COUNT)}  # type: ignore[attr-defined]
    for x in xs.values():
        x[0, 0] *= 60
    task.x = task.floats = Samples({i: Call((x,), {}) for i, x in xs.items()})
    task.y = {i: block(x)[0] for i, x in xs.items()}
    assert task.y[0][0, 0].norm() > 200 * task.y[0][0, 1:].norm(dim=-1).max()

    def others() -> float:
        weights = {name: hal.qdq(t.w, t.ready, t.spec) for name, t in task.layers.items()}
        errors = [task.forward(Call((xs[i],), {}), weights)[0] - block(xs[i])[0] for i in task.held]
        return float(torch.cat(errors)[:, 1:].pow(2).mean())

    Search().run(task)
    Measure("rtn", 4).run(task)
    before = others()
    Kept(Feedback(4), "rtn", 4).run(task)
    assert others() < 0.7 * before


def test_closed_form_beats_rounding_on_held_out_samples(block: Block) -> None:
    task = case(block)
    Search().run(task)
    Measure("rtn", 4).run(task)
    Feedback(4).run(task)
    Measure("closed", 4).run(task)
    assert task.report["closed"] < 0.7 * task.report["rtn"]
    assert set(task.fixed) == set(task.layers)
    for name, layer in task.layers.items():
        assert torch.equal(task.fixed[name], hal.qdq(layer.w, layer.ready, layer.spec))


def test_silent_inputs_round_like_any_other(block: Block) -> None:
    task = case(block, noise=0.0)
    assert task.floats is not None
    quiet = {i: Call((torch.zeros(1, 24, H),), {}) for i in range(COUNT)}
    task.x = task.floats = Samples(quiet)
    task.y = {i: block(call.args[0])[0] for i, call in quiet.items()}
    Search().run(task)
    Feedback(4).run(task)
    mix = task.layers["mix.weight"]
    step = hal.quantize(mix.w, mix.ready, mix.spec).parts["scale"].float().abs()
    error = (task.fixed["mix.weight"] - block.mix.weight).abs().view(H, -1, 16)
    assert (error <= 1.3 * step[..., None]).all()  # one level of clipping at the far end


@pytest.mark.parametrize("better", [True, False])
def test_a_stage_is_kept_only_where_held_out_loss_falls(block: Block, better: bool) -> None:
    class Ruin:
        def run(self, task: BlockTask) -> None:
            for name, layer in task.layers.items():
                layer.w = torch.zeros_like(layer.w)
                layer.params = hal.search(layer.w, layer.spec)
                task.fixed[name] = layer.w

    task = case(block)
    Search().run(task)
    Measure("start", 4).run(task)
    before = {name: (layer.w, layer.params) for name, layer in task.layers.items()}
    Kept(Feedback(4) if better else Ruin(), "start", 4).run(task)
    assert bool(task.fixed) is better
    for name, layer in task.layers.items():
        assert (layer.w is before[name][0] and layer.params is before[name][1]) is not better


# ---- in the pipeline -------------------------------------------------------------------------


def made(source: Path, output: Path, threads: int = 0, **changes: Any) -> pipeline.Run:
    small: Mapping[str, Any] = {"group_size": 32, "nsamples": 32, "seqlen": 64}
    recipe = build_recipe("autoround", {**small, **changes})
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return pipeline.quantize(recipe, pipeline.Source(source, torch.device("cpu")), output)
    finally:
        torch.set_num_threads(before)


def digest(path: Path) -> str:
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("changes", [{"bits": 4}, {"bits": 2, "sym": False}], ids=str)
def test_better_than_rounding_on_a_trained_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = made(PGDOC, tmp_path / "one", **changes)
    for block in run.blocks:
        assert 0 < block.loss < 0.95 * block.loss_rtn
    if run.plan.contents.base.sym:
        made(PGDOC, tmp_path / "two", **changes)
        assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.parametrize("lowest", range(6))
def test_a_valley_is_walked_downhill(lowest: int) -> None:
    seen: list[float] = []

    def height(at: float) -> float:
        seen.append(at)
        return abs(at - lowest)

    assert least(height, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (0, lowest)
    assert len(seen) == len({*seen})


def test_without_ridges_the_weight_is_its_own_target(block: Block) -> None:
    task = case(block)
    assert task.x is not None
    found = moments(task, "mix.weight", {}, task.x.batches(task.seen, 4), None)
    assert found is not None
    w = torch.randn(H, H)
    assert Feedback(4, ridges=())._target(w, found, found) is w


def test_a_ridge_that_rounding_buries_is_passed_over() -> None:
    """Second moments with an eigenvalue of minus a fifth of their mean diagonal, by rounding."""
    h = torch.diag(torch.tensor([31.0, 1.0, 1.0, -1.65]))
    m = Moments(h, 0.1 * torch.eye(4), False)
    w = torch.ones(3, 4)
    found = Feedback(4)._target(w, m, m)
    assert torch.isfinite(found).all()
    assert torch.equal(Feedback(4, ridges=(0.003, 0.01))._target(w, m, m), w)


@pytest.mark.parametrize("nsamples", [1, 2])
def test_few_samples(tmp_path: Path, nsamples: int) -> None:
    source = zoo.save("llama", tmp_path / "llama", "5GB")
    recipe = build_recipe("autoround", {"nsamples": nsamples, "seqlen": 16, "group_size": 32})
    ids = [[int(i) for i in range(1, 17)]] * nsamples
    where = pipeline.Source(source, torch.device("cpu"))
    run = pipeline.quantize(recipe, where, tmp_path / "out", dataset=ids)
    assert all(block.loss <= block.loss_rtn for block in run.blocks)


def experts(output: Path, name: str = "mixtral", **changes: Any) -> tuple[pipeline.Run, list[int]]:
    """A run on a small model with fused experts, and the steps of SignRound that it took."""
    source = zoo.save(name, output / "model", "5GB")
    ids = torch.randint(0, 90, (32, 16), generator=torch.Generator().manual_seed(0))
    small = {"iters": 4, "nsamples": 32, "seqlen": 16, "group_size": 32, "bits": 3}
    told: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            told.append(event.t)

    where = pipeline.Source(source, torch.device("cpu"))
    recipe = build_recipe("autoround", small | changes)
    rows = [row.tolist() for row in ids]
    run = pipeline.quantize(recipe, where, output / "out", dataset=rows, listener=watch)
    return run, told


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4"]
)
def test_fused_experts_are_rounded_in_closed_form(name: str, tmp_path: Path) -> None:
    run, told = experts(tmp_path, name)
    assert not told
    assert all(block.loss < block.loss_rtn for block in run.blocks)
    assert sum(block.loss / block.loss_rtn for block in run.blocks) < 0.8 * len(run.blocks)
    record = json.loads(next((tmp_path / "out").rglob("autoround.json")).read_text())
    counts = [block.get("sparse_experts", 0) for block in record["blocks"]]
    assert counts == [block.sparse_experts for block in run.blocks]


def test_experts_of_another_product_are_left_to_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where inputs of experts cannot be told apart SignRound takes those weights, those alone."""
    monkeypatch.setattr("autoround.stages.feedback.expert_moments", lambda *_: None)
    run, told = experts(tmp_path, lr=0.05)
    assert told == [0, 1, 2, 3] * len(run.blocks)


class Experts(nn.Module):
    """Two fused weights; of a batch, the first token goes to expert 0, the others to expert 2."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 32, H))
        self.down = nn.Parameter(torch.randn(3, H, 32))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        ends = torch.tensor([1, 1, len(flat)], dtype=torch.int32)
        up = F.grouped_mm(flat, self.up.transpose(1, 2), offs=ends)
        return F.grouped_mm(up.relu(), self.down.transpose(1, 2), offs=ends).view(x.shape)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.experts(x),)


def routed() -> tuple[Routed, BlockTask, Tensor]:
    torch.manual_seed(2)
    block = Routed().eval().requires_grad_(False)
    spec = hal.Spec.parse("s4:g16:f16")
    layers = {
        "experts.up": LayerTask(spec, block.experts.up.flatten(0, 1), lambda m: m.view(3, 32, H)),
        "experts.down": LayerTask(
            spec, block.experts.down.flatten(0, 1), lambda m: m.view(3, H, 32)
        ),
    }
    task = BlockTask(0, block, layers, contextlib.nullcontext)
    xs = torch.randn(8, 1, 10, H)
    task.x = task.floats = Samples({i: Call((x,), {}) for i, x in enumerate(xs)})
    task.y = {i: block(x)[0] for i, x in enumerate(xs)}
    return block, task, xs


def test_moments_of_what_each_expert_is_sent() -> None:
    block, task, xs = routed()
    inner = [F.linear(x[0, :1], block.experts.up[0]).relu() for x in xs]
    other = [F.linear(x[0, 1:], block.experts.up[2]).relu() for x in xs]
    sent = {
        "experts.up": ([x[0, :1] for x in xs], [x[0, 1:] for x in xs]),
        "experts.down": (inner, other),
    }
    alone = [(i,) for i in range(8)]
    for name, (first, last) in sent.items():
        found = expert_moments(task, name, {}, alone, range(3))
        assert found is not None
        assert found.tokens.tolist() == [8, 0, 72]
        assert found.routed == 80
        for got, rows in ((found.h[0], first), (found.h[2], last), (found.together, first + last)):
            x = torch.cat(rows).double()
            close = {"rtol": 0.02, "atol": 0.02 * float((x.t() @ x).diagonal().mean())}
            assert torch.allclose(got.double(), x.t() @ x, **close)
        assert not found.h[1].any()
        part = expert_moments(task, name, {}, alone, range(2, 3))
        assert part is not None
        assert torch.equal(part.h[0], found.h[2])


def test_an_expert_without_tokens_is_rounded_for_those_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, task, _ = routed()
    Search().run(task)
    Feedback(1).run(task)
    assert task.report["sparse_experts"] == 4  # expert 0 has 8 tokens, expert 1 none; two weights
    assert set(task.fixed) == set(task.layers)
    whole = {name: layer.w for name, layer in task.layers.items()}
    _, task, _ = routed()
    monkeypatch.setattr("autoround.stages.feedback.AT_ONCE", 1)  # an expert a pass
    Search().run(task)
    Feedback(1).run(task)
    assert all(torch.equal(task.layers[name].w, w) for name, w in whole.items())

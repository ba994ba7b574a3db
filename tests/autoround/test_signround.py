# SPDX-License-Identifier: Apache-2.0
"""SignRound against the paper (`paper.py`): plain torch, autograd, straight-through."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from paper import Wrapped, fp16, order_of, reference, rne
from torch import Tensor, nn
from torch.func import functional_call

import hal
from autoround.models import Call, Samples
from autoround.options import build_recipe
from autoround.recipe import Recipe
from autoround.run import course, engine, pipeline
from autoround.scheme import Scheme
from autoround.stages import BlockTask, LayerTask, Measure, Search, SignRound, WeightedSearch
from autoround.stages.search import filled
from autoround.stages.signround import Cyclic
from autoround.stages.steps import adam, momentum

PGDOC = Path(__file__).parents[2] / "benchmarks/models/pgdoc"
H, INNER, ROWS, COUNT = 32, 64, 6, 12


class Block(nn.Module):
    """A gated MLP with a residual: three weights, one path where gradients mix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(H, INNER), nn.Linear(H, INNER, bias=False)
        self.down = nn.Linear(INNER, H)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = hidden_states
        return (x + self.down(torch.sigmoid(self.gate(x)) * self.up(x)),)


def case(scheme: Scheme) -> tuple[Block, list[Tensor], list[Tensor], BlockTask]:
    """A block, its inputs and float outputs, and the same as a task for the stage."""
    torch.manual_seed(5)
    block = Block().eval().requires_grad_(False)
    xs = [torch.randn(1, ROWS, H) for _ in range(COUNT)]
    ys = [block(x)[0] for x in xs]
    assert scheme.spec is not None
    layers = {
        f"{name}.weight": LayerTask(scheme.spec, m.weight.detach().clone(), lambda m: m)
        for name, m in block.named_children()
    }
    task = BlockTask(0, block, layers, contextlib.nullcontext)
    task.x = Samples({i: Call((x,), {}) for i, x in enumerate(xs)})
    task.y = dict(enumerate(ys))
    return block, xs, ys, task


def stage(told: Callable[[int, float], None] = lambda t, loss: None, **changes: Any) -> SignRound:
    plain = SignRound(20, 4, 1, lambda bits: 0.02, lambda bits: 0.04 / 2**bits, 7, told)
    return replace(plain, **changes)


SCHEMES = [Scheme(b, g, sym) for b, g in ((2, 16), (4, 32), (8, 16)) for sym in (True, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equal_to_autograd(scheme: Scheme) -> None:
    told: list[float] = []
    run = stage(lambda t, loss: told.append(loss))
    block, xs, ys, task = case(scheme)
    Search().run(task)
    run.run(task)
    wrapped = {n: Wrapped(la.w.clone(), scheme) for n, la in task.layers.items()}
    order = order_of(run, COUNT)
    losses = reference(
        lambda weights, x: functional_call(block, weights, (x,))[0], wrapped, xs, ys, run, order
    )
    assert told == pytest.approx(losses, rel=1e-4)
    assert min(losses) < 0.9 * losses[0]
    for name, layer in task.layers.items():
        p, w = layer.ready, wrapped[name]
        same_v = (p.v - w.v).abs() < 1e-6
        same_range = ((p.lo - w.alpha).abs() < 1e-6) & ((p.hi - w.beta).abs() < 1e-6)
        # A sign may differ where autograd's and our sum cancel to rounding: a sum of G terms has an
        # error of G * 2^-24 of its largest, so about that share of the signs is open each step.
        open_signs = run.iters * scheme.group_size * 2.0**-24
        assert (~same_range).sum() <= max(1, open_signs * same_range.numel())
        reached = (~same_range).repeat_interleave(scheme.group_size, 1)
        assert (~same_v & ~reached).sum() <= max(1, open_signs * same_v.numel())
        ours = hal.dequantize(hal.quantize(layer.w, p, layer.spec), dtype=torch.float32)
        assert torch.equal(ours, hal.qdq(layer.w, p, layer.spec))
        theirs = w().detach()
        step = w.scale_zero()[0].abs().repeat_interleave(scheme.group_size, 1)
        # Equal up to the f32 rounding of the straight-through sums, except for such elements.
        differs = (ours - theirs).abs() > 1e-5 * step * 2**scheme.bits
        assert (differs & ~reached).sum() <= max(1, open_signs * differs.numel())


STEPS: dict[str, tuple[Any, Any]] = {
    "adam": (adam, lambda leaf: torch.optim.Adam([leaf], lr=0.01)),
    "momentum": (lambda: momentum(0.9), lambda leaf: torch.optim.SGD([leaf], 0.01, momentum=0.9)),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_remembering_steps_equal_torch_optim(kind: str, scheme: Scheme) -> None:
    """Five steps against torch's own optimizer on autograd's gradients, momentum by its signs."""
    ours, theirs = STEPS[kind]
    torch.manual_seed(3)
    assert scheme.spec is not None
    w = torch.randn(16, 64)
    layer = LayerTask(scheme.spec, w, lambda m: m)
    p = hal.search(w, scheme.spec)
    layer.params = hal.Params(torch.zeros_like(w), p.lo, p.hi, p.amin, p.amax)
    wrapped, steps = Wrapped(w, scheme), ours()
    optimizers = [theirs(leaf) for leaf in wrapped.leaves]
    for _ in range(5):
        grad = torch.randn_like(w)
        wrapped().backward(grad)
        steps.take(layer, grad, 0.01, 0.01)
        for leaf, optimizer in zip(wrapped.leaves, optimizers, strict=True):
            before = leaf.detach().clone()
            optimizer.step()
            with torch.no_grad():
                if kind == "momentum":
                    leaf.copy_(before + 0.01 * (leaf - before).sign())
            leaf.grad = None
        with torch.no_grad():
            wrapped.alpha.clamp_(0, 1)
            wrapped.beta.clamp_(0, 1)
    for mine, leaf in zip(
        (layer.ready.v, layer.ready.lo, layer.ready.hi), wrapped.leaves, strict=True
    ):
        close = (mine - leaf).abs() < 1e-4
        assert close.float().mean() > 0.97  # a sum that cancels may fall either way
        assert (mine - 1).abs().max() > 0.005


def test_first_step_and_decay() -> None:
    """After t updates at constant sign, V has moved by the sum of a linear schedule."""
    run = stage(iters=4, batch_size=COUNT)
    _, _, _, task = case(Scheme(4, 32))
    Search().run(task)
    seen: list[dict[str, Tensor]] = []
    original = hal.qdq_step_

    def spy(p: hal.Params, w: Tensor, grad: Tensor, spec: hal.Spec, **rates: float) -> None:
        before = p.v.clone()
        original(p, w, grad, spec, **rates)
        seen.append({"moved": (p.v - before).abs(), "rate": torch.tensor(rates["lr_v"]),
                     "range": torch.tensor(rates["lr_range"])})  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hal, "qdq_step_", spy)
        run.run(task)
    rates = [round(float(s["rate"]), 9) for s in seen[::3]]
    assert rates == [0.02, 0.015, 0.01, 0.005]
    assert [round(float(s["range"]), 9) for s in seen[::3]] == [0.0025, 0.001875, 0.00125, 0.000625]
    for s in seen:
        moved = s["moved"][s["moved"] > 0]
        assert moved.numel()
        assert (moved - s["rate"]).abs().max() < 1e-7


def test_best_step_is_kept_before_its_update() -> None:
    """With a step so large that every update hurts, the start is the result."""
    _, _, _, task = case(Scheme(8, 16))
    Search().run(task)
    told: list[float] = []
    huge = stage(lambda t, loss: told.append(loss), lr=lambda bits: 30.0, batch_size=COUNT, iters=5)
    huge.run(task)
    assert min(told) == told[0]
    for layer in task.layers.values():
        assert not layer.ready.v.any()
        assert (layer.ready.lo == 1).all()


def test_the_last_position_of_a_sample_does_not_count() -> None:
    """Targets that are wrong there change nothing; anywhere else they do (algorithms.md 1.5)."""
    ends = []
    for at in (None, ROWS - 1, 0):
        _, _, ys, task = case(Scheme(4, 16))
        Search().run(task)
        if at is not None:
            for y in ys:
                y[:, at] += 10.0
        told: list[float] = []
        stage(lambda t, loss, to=told: to.append(loss)).run(task)
        ends.append((told, [la.ready.v.clone() for la in task.layers.values()]))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    assert ends[0][0] != ends[2][0]


def test_last_step_and_patience() -> None:
    """With a step so large that every update hurts: the last seen, and an early end."""
    ends = {}
    for name, changes in {"last": {"keep_last": True}, "patient": {"patience": 2}}.items():
        _, _, _, task = case(Scheme(8, 16))
        Search().run(task)
        told: list[float] = []
        run = stage(lambda t, loss, to=told: to.append(loss), lr=lambda bits: 30.0, iters=5)
        replace(run, batch_size=COUNT, **changes).run(task)
        ends[name] = (len(told), any(la.ready.v.any() for la in task.layers.values()))
    assert ends == {"last": (5, True), "patient": (3, False)}


@pytest.mark.parametrize(("batch", "steps"), [(4, 2), (3, 4), (2, 3)])
def test_accumulation_equals_a_bigger_batch(batch: int, steps: int) -> None:
    results, losses = [], []
    for size, accumulate in ((batch, steps), (batch * steps, 1)):
        _, _, _, task = case(Scheme(4, 16))
        Search().run(task)
        told: list[float] = []
        run = stage(lambda t, loss, to=told: to.append(loss), batch_size=size)
        replace(run, accumulate=accumulate).run(task)
        results.append(task)
        losses.append(told)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, layer in results[0].layers.items():
        same = layer.ready.v == results[1].layers[name].ready.v
        assert (~same).float().mean() < 1e-3  # signs of sums that cancel


def test_range_is_left_alone_without_minmax_tuning() -> None:
    _, _, _, task = case(Scheme(4, 16, False))
    Search().run(task)
    stage(minmax_lr=lambda bits: 0.0).run(task)
    for layer in task.layers.values():
        assert layer.ready.v.any()
        assert (layer.ready.lo == 1).all()
        assert (layer.ready.hi == 1).all()


def test_recipe_decides_the_steps() -> None:
    made = course._signround(Recipe(iters=1000), lambda t, loss: None)
    assert [made.lr(b) for b in (2, 3, 4)] == [2e-3, 2e-3, 1e-3]
    assert [made.minmax_lr(b) for b in (2, 4)] == [2e-3, 1e-3]
    off = course._signround(Recipe(enable_minmax_tuning=False), lambda t, loss: None)
    assert (off.lr(4), off.minmax_lr(4)) == (5e-3, 0.0)
    own = course._signround(Recipe(lr=0.1, minmax_lr=0.2), lambda t, loss: None)
    assert (own.lr(2), own.minmax_lr(2)) == (0.1, 0.2)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 5), (7, 8), (1, 1)])
def test_cyclic_batches(count: int, size: int) -> None:
    sampler = Cyclic(range(count), size, Random(3))
    own = min(count, size)
    per_round = count // own
    for _ in range(5):
        visits = Counter(i for _ in range(per_round) for i in sampler.next())
        assert sum(visits.values()) == per_round * own
        assert set(visits.values()) == {1}  # nothing twice in a round; what is left over is dropped
    assert Cyclic(range(12), 4, Random(3)).next() == Cyclic(range(12), 4, Random(3)).next()


def test_order_depends_on_seed_and_block_only() -> None:
    def order(seed: int, block: int) -> list[int]:
        random = stage(seed=seed)._random(block)
        return Cyclic(range(100), 100, random).next()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, b)) for s in (1, 2) for b in (1, 2)}) == 4


def test_deterministic() -> None:
    results = []
    for _ in range(2):
        _, _, _, task = case(Scheme(3, 16, False))
        Search().run(task)
        stage().run(task)
        results.append([t for la in task.layers.values() for t in (la.ready.v, la.ready.lo)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_measure_is_the_mean_over_all_samples() -> None:
    block, xs, ys, task = case(Scheme(2, 16))
    Search().run(task)
    Measure("rtn", 8).run(task)
    weights = {n: Wrapped(la.w, Scheme(2, 16))().detach() for n, la in task.layers.items()}
    errors = [
        (
            ((functional_call(block, weights, (x,))[0] - y).double() ** 2).sum(-1)
            / (y.double() ** 2).sum(-1)
        ).mean()
        for x, y in zip(xs, ys, strict=True)
    ]
    assert task.report["rtn"] == pytest.approx(float(sum(errors)) / COUNT, rel=1e-4)


# ---- in the pipeline -------------------------------------------------------------------------


def tuned(output: Path, **changes: Any) -> pipeline.Run:
    small = {"nsamples": 8, "seqlen": 32, "batch_size": 4, "iters": 8, "lr": 0.02}
    recipe = build_recipe("signround", {"bits": 2, "group_size": 32} | small | changes)
    return pipeline.quantize(recipe, pipeline.Source(PGDOC, torch.device("cpu")), output)


def test_tuning_beats_rounding_on_a_trained_model(tmp_path: Path) -> None:
    run = tuned(tmp_path / "out")
    assert [b.index for b in run.blocks] == list(range(len(run.plan.blocks)))
    for block in run.blocks:
        assert 0 < block.loss < block.loss_rtn


@pytest.mark.parametrize("chained", [True, False])
def test_blocks_are_tuned_on_the_chain_asked_for(
    chained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 1's inputs are the outputs of block 0: quantized with the option, float without."""
    seen: list[dict[str, Any]] = []
    original = engine.Engine._run_stages

    def spy(self: Any, task: BlockTask) -> None:
        original(self, task)
        assert task.x is not None
        assert task.y is not None
        call = task.x.gather([0])
        weights = engine._dequantized(task)
        with torch.no_grad():
            rounded = task.forward(call, weights)
            plain = task.forward(call, {})
        out = [x[0] if isinstance(x, tuple) else x for x in (rounded, plain)]
        seen.append({"x": call.hidden.clone(), "rounded": out[0], "float": out[1],
                     "y": task.y[0].clone()})  # fmt: skip

    monkeypatch.setattr(engine.Engine, "_run_stages", spy)
    # One sample a batch, so that every forward is the same arithmetic.
    tuned(tmp_path / "out", enable_quanted_input=chained, batch_size=1, nsamples=4)
    for before, after in pairwise(seen):
        assert not torch.equal(before["rounded"], before["float"])
        assert torch.equal(after["x"], before["rounded" if chained else "y"])
    # The target is always the float chain's.
    assert torch.equal(seen[0]["y"], seen[0]["float"])
    assert torch.equal(seen[1]["y"], seen[1]["float"]) is not chained


# ---- the second paper ------------------------------------------------------------------------


def test_wide_ranges_equal_autograd() -> None:
    """s = s0 * beta with beta in [0, 2] from 1, V as before: algorithms.md 2.1, by autograd."""
    block, xs, ys, task = case(Scheme(2, 16))
    Search().run(task)
    task.floats = task.x
    WeightedSearch(4).run(task)
    # One side of a symmetric range is zero; the other is 2 scales long, and says the sign.
    start = {n: (-la.ready.amin - la.ready.amax) / 2 for n, la in task.layers.items()}
    told: list[float] = []
    run = stage(
        lambda t, loss: told.append(loss),
        widest=2.0,
        minmax_lr=lambda bits: 0.02,
        trim=lambda bits: 0.01,
    )
    order = order_of(run, COUNT)
    leaves = {n: (torch.zeros_like(la.w, requires_grad=True), torch.ones_like(start[n]))
              for n, la in task.layers.items()}  # fmt: skip
    weights = {n: la.w for n, la in task.layers.items()}
    run.run(task)
    losses = []
    for t, indices in enumerate(order):
        total = []
        rounded = {}
        for n, (v, beta) in leaves.items():
            beta.requires_grad_()
            s = fp16(start[n] * beta)[..., None]
            w = weights[n].view(*start[n].shape, -1)
            q = (rne(w / s + v.view_as(w))).clamp(-2, 1)
            rounded[n] = (s * q).view_as(v)
        x, y = (torch.cat([z[i] for i in indices]) for z in (xs, ys))
        error = (functional_call(block, rounded, (x,))[0] - y)[:, :-1].flatten()
        keep = torch.ones_like(error)
        keep[error.abs().topk(int(error.numel() / 100)).indices] = 0
        loss = ((error * keep) ** 2).mean()
        total.append(loss.item())
        loss.backward()
        losses += total
        decay = 1 - t / run.iters
        with torch.no_grad():
            for v, beta in leaves.values():
                v -= 0.02 * decay * v.grad.sign()
                beta -= 0.02 * decay * beta.grad.sign()
                beta.clamp_(0, 2)
                v.grad = beta.grad = None
    assert told == pytest.approx(losses, rel=2e-3)
    assert min(losses) < 0.9 * losses[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weighted_search_tries_the_published_candidates(bits: int) -> None:
    """Inverse scales (m - step k) / extreme, least weighted error, the first of equals."""
    _, xs, _, task = case(Scheme(bits, 16))
    Search().run(task)
    task.floats = task.x
    WeightedSearch(4).run(task)
    layer, m = task.layers["gate.weight"], 2 ** (bits - 1)
    weights = torch.cat(xs).flatten(0, 1).double().pow(2).sum(0).view(1, -1, 16)
    w = layer.w.double().view(len(layer.w), -1, 16)
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))[..., 0]
    half, step = (90, 0.01) if bits == 2 else (100, 2 * 0.75 * m / 200)
    errors = []
    for k in range(-half, half + 1):
        s = (-extreme / (m - step * k)).half().double()[..., None]
        errors.append(((s * (w / s).round().clamp(-m, m - 1) - w) ** 2 * weights).sum(-1))
    least = torch.stack(errors).min(0).values
    ours = hal.qdq(layer.w, layer.ready, layer.spec).double().view_as(w)
    found = ((ours - w) ** 2 * weights).sum(-1)
    assert torch.allclose(found, least, rtol=1e-4)


def test_silent_inputs_are_filled() -> None:
    spec = hal.Spec.parse("s4:g32:f16")
    weights = torch.arange(1.0, 97.0)
    weights[3:5] = 0
    weights[32:50] = 0
    out = filled(weights, spec)
    others = [i for i in range(32) if i not in (3, 4)]
    assert torch.equal(out[3:5], weights[others].mean().expand(2))
    assert torch.equal(out[32:64], torch.ones(32))
    assert torch.equal(out[64:], weights[64:])

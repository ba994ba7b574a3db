# SPDX-License-Identifier: Apache-2.0
"""Scales tuned on the output of the whole model: gradients, what is kept, what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch.nn import functional as F

import autoround
import hal
from autoround.options import build_recipe
from autoround.run import pipeline
from autoround.run.record import Run, Source, WholeReport
from autoround.stages import EndToEnd, Scaled, Vector, end_to_end

CPU = torch.device("cpu")
ROWS = torch.randint(3, 120, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
SMALL = {"group_size": 32, "bits": 2}
DATA = {"nsamples": 8, "seqlen": 16, "batch_size": 4}
Saved = Callable[..., Path]


def run(source: Path, output: Path, steps: int = 8, **changes: Any) -> Run:
    """After rounding to nearest at 2 bits, which leaves much to gain."""
    low = changes.pop("low_cpu_mem_usage", False)
    given = DATA | {"end_to_end": steps} if steps else {}
    recipe = build_recipe("rtn", SMALL | given | changes)
    where = Source(source, CPU, low_cpu_mem_usage=low)
    return pipeline.quantize(recipe, where, output, dataset=ROWS if steps else None)


def own(output: Path) -> dict[str, torch.Tensor]:
    """All tensors of the run."""
    return load_file(output / "model.safetensors")


def record(output: Path) -> Any:
    return json.loads((output / "autoround.json").read_text())


# ---- one weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [64, 80])
@pytest.mark.parametrize(
    "spec", [hal.Spec("s2", 32), hal.Spec("u3", 32, zero="int"), hal.Spec("s8", 0)]
)
def test_gradient_is_that_of_the_formula(
    spec: hal.Spec, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """w = scale (1 + change) (code - zero), written out in f64 and left to autograd."""
    monkeypatch.setattr(end_to_end, "PIECE", 3 * k)  # several pieces, the last one short
    w = torch.randn(7, k, generator=torch.Generator().manual_seed(k))
    q = hal.quantize(w, hal.search(w, spec), spec)
    scaled = Scaled(spec, (7, k), torch.float32, q.parts["scale"].float(), lambda: q, lambda m: m)
    upstream = torch.randn(7, k, generator=torch.Generator().manual_seed(1))
    (scaled.weight() * upstream).sum().backward()  # type: ignore[no-untyped-call]

    change = torch.zeros(q.parts["scale"].shape, dtype=torch.float64, requires_grad=True)
    group = torch.arange(k) // spec.width(k)
    zero = q.parts["zero"].double() if "zero" in q.parts else torch.full_like(change, spec.half)
    levels = q.parts["codes"].double() - zero.detach()[:, group]
    plain = (q.parts["scale"].double() * (1 + change))[:, group] * levels
    (plain * upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert scaled.change.grad is not None
    assert change.grad is not None
    torch.testing.assert_close(scaled.change.grad.double(), change.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(scaled.weight(), hal.dequantize(q, dtype=torch.float32))


def test_a_stored_scale_keeps_its_sign_and_is_never_zero() -> None:
    spec = hal.Spec("s4", 32)
    start = torch.tensor([[1.0, -2.0, 1e-5, 60000.0, 0.5, -3.0]])
    scaled = Scaled(spec, (1, 192), torch.float32, start, lambda: None, lambda m: m)  # type: ignore[arg-type, return-value]
    with torch.no_grad():
        scaled.change.copy_(torch.tensor([[0.5, 0.5, -0.5, 0.5, -1.5, torch.nan]]))
    wanted = torch.tensor([[1.5, -3.0, 1e-5, 60000.0, 0.5, -3.0]]).half()
    assert torch.equal(scaled.stored(), wanted)


# ---- a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"sym": False, "quant_lm_head": True}], ids=["", "asym"])
def test_what_is_written_is_what_was_judged(
    changes: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    """The loss of the record, from the finished files, by `load` and the published formula."""
    made = run(saved("llama", torch.bfloat16), tmp_path / "out", **changes)
    found, tokens = made.whole, made.tokens
    assert found is not None
    assert tokens is not None
    assert found.kept
    assert record(tmp_path / "out")["end_to_end"] == found.to_json()
    rounded = autoround.load(tmp_path / "out")
    plain = zoo.plain("llama", saved("llama", torch.bfloat16))
    ids = tokens.ids[-1:]  # one of eight judges
    with torch.no_grad():
        p, q = (F.log_softmax(m(input_ids=ids).logits.double(), -1) for m in (plain, rounded))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.after == pytest.approx(kl, rel=0.05)


def test_what_changes(saved: Saved, tmp_path: Path) -> None:
    """Scales and norms; the record says which tensors are not the source's."""
    run(saved("llama"), tmp_path / "with")
    run(saved("llama"), tmp_path / "without", 0)
    with_, without = own(tmp_path / "with"), own(tmp_path / "without")
    moved = {name for name in without if not torch.equal(with_[name], without[name])}
    norms = {name for name in without if "norm" in name}
    assert moved == norms | {name for name in without if name.endswith(".scales")}
    fates = record(tmp_path / "with")["tensors"]
    assert {name for name, fate in fates.items() if fate == "tuned"} == norms
    assert "tuned" not in record(tmp_path / "without")["tensors"].values()
    assert "end_to_end" not in record(tmp_path / "without")


def test_vectors_keep_their_dtype_and_what_is_zero() -> None:
    start = torch.tensor([1.0, -3.0, 0.0, 2.0], dtype=torch.bfloat16)
    one, none = Vector(start), Vector(torch.zeros(3))
    with torch.no_grad():
        one.change.copy_(torch.tensor([0.0, 1.0, 2.0, torch.inf]))
        none.change.fill_(1.0)
    assert torch.equal(one.stored(), torch.tensor([1.0, -1.5, 3.0, 2.0], dtype=torch.bfloat16))
    assert torch.equal(none.stored(), torch.zeros(3))
    one.change.data[3] = 0.0
    one.weight().float().sum().backward()  # type: ignore[no-untyped-call]
    assert one.change.grad is not None
    assert torch.equal(one.change.grad, torch.full((4,), 1.5))  # the mean size


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("llama", "qwen3_moe") else pytest.param(n, marks=pytest.mark.slow)
        for n in zoo.ZOO
    ],
)
def test_families(name: str, saved: Saved, tmp_path: Path) -> None:
    """Also without memory: the same bytes."""
    found = run(saved(name), tmp_path / "out", 2)
    assert found.whole is not None
    assert found.whole.because is None
    run(saved(name), tmp_path / "low", 2, low_cpu_mem_usage=True)
    names = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.safetensors")]
    assert names
    for each in names:
        assert (tmp_path / "out" / each).read_bytes() == (tmp_path / "low" / each).read_bytes()


def test_a_worse_result_is_not_kept(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EndToEnd, "_share", lambda self, t: 200.0)
    found = run(saved("llama"), tmp_path / "bad").whole
    assert found is not None
    assert not found.kept
    assert found.after > found.before
    run(saved("llama"), tmp_path / "without", 0)
    bad, without = own(tmp_path / "bad"), own(tmp_path / "without")
    assert all(torch.equal(bad[name], without[name]) for name in without)
    assert record(tmp_path / "bad")["end_to_end"]["kept"] is False


@pytest.mark.parametrize(
    ("losses", "share", "told"),
    [
        ([4.0, 3.0, 2.0, 2.5], 0.5, 2.0),
        ([4.0, 3.0, 3.5, 3.9], 1.0, 3.0),
        ([4.0, 5.0, 4.5, 4.0], 0.0, 5.0),
        ([4.0, torch.nan, torch.nan, 3.0], 0.25, 3.0),
        ([4.0, torch.nan, torch.nan, torch.nan], 0.0, torch.nan),
    ],
)
def test_the_share_that_serves_best(
    losses: list[float], share: float, told: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Vector(torch.ones(4))
    task = end_to_end.ModelTask(
        None,
        [(torch.nn.Module(), {"w": found})],
        None,
        None,
        torch.zeros(2, 8),
        [],
        (),
        torch.no_grad,
    )
    with torch.no_grad():
        found.change.fill_(1.0)
    heard = iter(losses[1:])
    monkeypatch.setattr(end_to_end, "_judged", lambda task, size: next(heard))
    loss = EndToEnd(1, lambda t, loss: None, 0)._settled(task, 1, losses[0])
    assert loss == pytest.approx(told, nan_ok=True)
    assert torch.equal(found.change, torch.full((4,), share))


def test_positions_are_thinned_where_logits_are_large(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "LOGITS", 2 * 128 * 16 // 4)  # a quarter of 16 tokens
    counted: list[int] = []
    original = end_to_end._beside

    def beside(head: Any, projection: Any, teacher: torch.Tensor, every: int) -> Any:
        counted.append(teacher.shape[1])
        return original(head, projection, teacher, every)

    monkeypatch.setattr(end_to_end, "_beside", beside)
    found = run(saved("llama"), tmp_path / "out", 2).whole
    assert found is not None
    assert found.because is None
    assert {*counted} == {4}


def test_a_model_without_gradients_is_told(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, rows: Any) -> Any:
        raise NotImplementedError("no derivative of such")

    monkeypatch.setattr(end_to_end.ModelTask, "loss", fails)
    found = run(saved("llama"), tmp_path / "out").whole
    reason = "the model takes no gradients (NotImplementedError: no derivative of such)"
    assert found is not None
    assert found == WholeReport(because=reason)
    assert record(tmp_path / "out")["end_to_end"] == {"because": reason}

# SPDX-License-Identifier: Apache-2.0
"""Blocks tuned as one (`nblocks`): against plain torch, and where it would not be right."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.llama import modeling_llama

from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.run import course, engine, pipeline
from autoround.run.failure import Recorder
from autoround.run.outlook import outlook
from autoround.run.record import Run, Source
from autoround.run.reproduce import reproduce
from autoround.stages import BlockTask, SignRound

Saved = Callable[..., Path]
CPU = torch.device("cpu")
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]
SMALL: dict[str, Any] = {"nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32, "bits": 3,
                         "iters": 6, "lr": 0.05}  # fmt: skip


def tuned(source: Path, output: Path, name: str = "signround", **changes: Any) -> Run:
    recipe = build_recipe(name, SMALL | changes)
    return pipeline.quantize(recipe, Source(source, CPU), output, dataset=ROWS)


class Chain(nn.Module):
    """Decoder blocks of Llama one after the other, as its own forward has them."""

    def __init__(self, layers: list[nn.Module], rotary: nn.Module) -> None:
        super().__init__()
        self.layers, self.rotary = nn.ModuleList(layers), rotary

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1])[None]
        table = self.rotary(x, position_ids=where)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=where, position_embeddings=table)
        return x


def test_equal_to_two_blocks_in_plain_torch(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of every step, and the weights in the end: two blocks of three, then the last."""
    tasks: list[tuple[BlockTask, dict[str, Tensor]]] = []
    told: list[list[float]] = []
    original = engine.Engine._run_stages

    def spy(self: Any, task: BlockTask) -> None:
        told.append([])
        original(self, task)
        tasks.append((task, engine._dequantized(task)))

    monkeypatch.setattr(engine.Engine, "_run_stages", spy)
    # In f32: of bf16 products a last bit more or less turns signs.
    monkeypatch.setattr(engine.Engine, "computing", lambda self: contextlib.nullcontext())
    recipe = build_recipe("signround", SMALL | {"nblocks": 2})
    source = Source(saved("llama"), CPU)
    run = pipeline.quantize(
        recipe, source, tmp_path / "out", dataset=ROWS,
        listener=lambda event: told[-1].append(event.loss) if hasattr(event, "t") else None,
    )  # fmt: skip
    model = zoo.plain("llama", saved("llama")).requires_grad_(False).model
    stage = course._signround(recipe, lambda t, loss: None)
    assert run.tokens is not None
    floats = quants = [model.embed_tokens(row[None]) for row in run.tokens.ids]
    for (task, ours), losses, indices in zip(tasks, told, ([0, 1], [2]), strict=True):
        chain = Chain([model.layers[i] for i in indices], model.rotary_emb)
        ys = [chain(x) for x in floats]
        prefix = "layers." if len(indices) > 1 else "layers.0."
        wrapped = {
            prefix + name: paper.Wrapped(layer.w.clone(), recipe.weight_scheme)
            for name, layer in task.layers.items()
        }
        assert len(wrapped) == 7 * len(indices)

        def forward(weights: dict[str, Tensor], x: Tensor, chain: nn.Module = chain) -> Tensor:
            out: Tensor = functional_call(chain, weights, (x,))
            return out

        order = paper.order_of(stage, len(ROWS), indices[0])
        assert losses == pytest.approx(
            paper.reference(forward, wrapped, quants, ys, stage, order), rel=1e-3
        )
        assert min(losses) < 0.95 * losses[0]
        rounded = {name: w().detach() for name, w in wrapped.items()}
        for name, weight in ours.items():
            same = (weight - rounded[prefix + name]).abs() < 1e-5
            assert same.float().mean() > 0.995  # a sum that cancels may fall either way
        with torch.no_grad():
            quants = [forward({prefix + n: w for n, w in ours.items()}, x) for x in quants]
        floats = ys


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3", {}),
        ("gemma3", {"nblocks": 9}),
        ("zamba2", {"enable_quanted_input": False}),
        ("gpt_oss", {}),
    ],
)
def test_losses_fall_in_every_family(
    name: str, changes: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    """Masks and tables that differ from block to block, weights shared by blocks, experts."""
    run = tuned(saved(name), tmp_path / "out", **{"nblocks": 2, "batch_size": 8, **changes})
    count = changes.get("nblocks", 2)
    losses = [(b.loss_rtn, b.loss) for b in run.blocks]
    assert len(run.blocks) == len(run.plan.blocks)
    for at, (before, after) in enumerate(losses):
        assert (before, after) == losses[at // count * count]  # its unit's
        assert after < before


def test_what_a_block_passes_on_is_the_rounded_one(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next unit is tuned on what the written weights of the whole unit put out."""
    inputs = []
    original = engine.Engine._run_stages

    def spy(self: Any, task: BlockTask) -> None:
        original(self, task)
        assert task.x is not None
        call = task.x.gather([3])
        with torch.no_grad():
            inputs.append((call.hidden.clone(), task.forward(call, engine._dequantized(task))))

    monkeypatch.setattr(engine.Engine, "_run_stages", spy)
    tuned(saved("qwen3"), tmp_path / "out", nblocks=2, batch_size=1)
    assert torch.equal(inputs[1][0], inputs[0][1])


def test_a_unit_that_fails_runs_again(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, run = Recorder(), SignRound.run

    def broken(self: SignRound, task: BlockTask) -> None:
        raise ArithmeticError("broken")

    monkeypatch.setattr(SignRound, "run", broken)
    recipe, source = build_recipe("signround", SMALL | {"nblocks": 2}), Source(saved("llama"), CPU)
    with pytest.raises(ArithmeticError) as error:
        pipeline.quantize(recipe, source, tmp_path / "out", dataset=ROWS, listener=recorder)
    bundle = recorder.bundle(error.value, recipe, source, tmp_path / "out", [])
    monkeypatch.setattr(SignRound, "run", run)
    facts = json.loads((bundle / "failure.json").read_text())["block"]
    assert (facts["name"], facts["count"], len(facts["layers"])) == ("model.layers.0", 2, 14)
    assert reproduce(bundle)["loss_rtn"] > 0


# ---- models that do more between two blocks than to hand on ------------------------------------


def between(does: str) -> Callable[..., Any]:
    """A forward of Llama that does something between blocks."""

    def forward(self: Any, input_ids: Tensor, **_: Any) -> Any:
        x = self.embed_tokens(input_ids)
        where = torch.arange(x.shape[1])[None]
        table, state = self.rotary_emb(x, position_ids=where), dict[str, Tensor]()
        for i, layer in enumerate(self.layers):
            given: dict[str, Any] = {"position_embeddings": table, "attention_mask": None}
            if does == "scales":
                x = x * 1.5
            elif does == "skips" and i == 1:
                continue
            elif does == "shares":
                given["state"] = state
            elif does == "derives" and i:
                given["extra"] = x.mean()
            elif does == "repeats":
                given["extra"] = input_ids  # of the sample, and not of what passes through
            x = layer(x, **given)
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    return forward


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("scales", "the model changes what one puts out before the other is given it"),
        ("skips", "text does not go straight from one to the other"),
        ("shares", "they share state, which each may write into"),
        ("derives", "extra may depend on what one of them puts out"),
        ("repeats", None),
    ],
)
def test_models_that_do_more_between_blocks(
    does: str, said: str | None, chained: bool, saved: Saved, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", between(does))
    tuned(saved("llama"), tmp_path / "alone", enable_quanted_input=chained, iters=1)
    changes = {"enable_quanted_input": chained, "nblocks": 2, "iters": 1}
    if said is None:
        tuned(saved("llama"), tmp_path / "out", **changes)
        return
    message = f"nblocks=2: model.layers.0 and model.layers.1 of .* {said}; leave nblocks at 1"
    with pytest.raises(InputError, match=message):
        tuned(saved("llama"), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# ---- what is asked for ---------------------------------------------------------------------------


def test_units_ask_for_steps() -> None:
    assert build_recipe(None, {"nblocks": 2}) == replace(build_recipe("signround", {}), nblocks=2)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("autoround", {"nblocks": 2}, "closed form takes layers one by one.*--recipe signround"),
        ("best", {"nblocks": 4}, "closed form"),
        ("rtn", {"nblocks": 2}, "nblocks has no effect without tuning"),
        (None, {"nblocks": 0}, "nblocks=0 is too small; use 1 or more"),
        (None, {"nblocks": 2, "nsamples": 1}, "nblocks=2 needs 2 samples or more"),
    ],
)
def test_refused(name: str | None, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_recipe(name, changes)


def test_memory_of_a_unit_is_planned(saved: Saved, tmp_path: Path) -> None:
    def needed(n: int) -> dict[str, int]:
        recipe = build_recipe("signround", SMALL | {"nblocks": n})
        return outlook(recipe, Source(saved("llama"), CPU), tmp_path / "out").needs.memory

    one, *more = (needed(n) for n in (1, 2, 3, 9))
    for count, need in zip((2, 3, 3), more, strict=True):
        assert need["block"] == count * one["block"]
        assert need["work on a block"] == pytest.approx(count * one["work on a block"], rel=1e-3)
        assert need["hidden states"] == one["hidden states"] * 5 // 4

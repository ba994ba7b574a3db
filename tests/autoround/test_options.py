# SPDX-License-Identifier: Apache-2.0
"""Options that users of the known tool know: on the command line, as keywords, and what they do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoround import AutoRound, cli
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.recipe import Recipe
from autoround.run import outlook, pipeline
from autoround.run.record import Run, Source
from autoround.scheme import Scheme

Saved = Callable[..., Path]
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]

#: Words of a command, the same as keywords of `AutoRound`, and what they make of a recipe.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("--iters 7", {"iters": 7}, {"iters": 7}),
    ("--lr 0.01", {"lr": 0.01}, {"lr": 0.01}),
    ("--minmax_lr 0.02", {"minmax_lr": 0.02}, {"minmax_lr": 0.02}),
    ("--nsamples 9 --seqlen 33", {"nsamples": 9, "seqlen": 33}, {"nsamples": 9, "seqlen": 33}),
    ("--batch_size 3", {"batch_size": 3}, {"batch_size": 3}),
    ("--gradient_accumulate_steps 2", {"gradient_accumulate_steps": 2},
     {"gradient_accumulate_steps": 2}),
    ("--disable_minmax_tuning", {"enable_minmax_tuning": False}, {"enable_minmax_tuning": False}),
    ("--disable_quanted_input", {"enable_quanted_input": False}, {"enable_quanted_input": False}),
    ("--enable_adam", {"enable_adam": True}, {"enable_adam": True}),
    ("--adam", {"enable_adam": True}, {"enable_adam": True}),
    ("--momentum 0.9", {"momentum": 0.9}, {"momentum": 0.9}),
    ("--not_use_best_mse", {"not_use_best_mse": True}, {"not_use_best_mse": True}),
    ("--dynamic_max_gap 5", {"dynamic_max_gap": 5}, {"dynamic_max_gap": 5}),
    ("--dynamic_max_gap -1", {"dynamic_max_gap": -1}, {}),
    ("--nblocks 2", {"nblocks": 2}, {"nblocks": 2}),
    ("--quant_lm_head", {"quant_lm_head": True}, {"quant_lm_head": True}),
    ("--ignore_layers q_proj,layers.1", {"ignore_layers": "q_proj,layers.1"},
     {"ignore_layers": ("q_proj", "layers.1")}),
    ("--to_quant_block_names model.layers.1", {"to_quant_block_names": "model.layers.1"},
     {"to_quant_block_names": ("model.layers.1",)}),
    ("--layer_config {q_proj:{bits:8,data_type:int}}",
     {"layer_config": {"q_proj": {"bits": 8, "data_type": "int"}}},
     {"layer_config": {"q_proj": {"bits": 8, "data_type": "int"}}}),
    ("--seed 3", {"seed": 3}, {"seed": 3}),
    ("--device_map cpu", {"device_map": "cpu"}, {}),
    ("--device_map cpu,cpu", {"device_map": {"model.layers.0": "cpu"}}, {}),
    ("--low_cpu_mem_usage", {"low_cpu_mem_usage": True}, {}),
]  # fmt: skip


class Seen(Exception):
    """Ends a command when it has said what it would do."""


@pytest.mark.parametrize(("words", "keywords", "fields"), SAME, ids=[row[0] for row in SAME])
def test_a_flag_and_a_keyword_mean_the_same(
    words: str, keywords: dict[str, Any], fields: dict[str, Any], saved: Saved,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given: list[tuple[Recipe, Source]] = []

    def look(recipe: Recipe, source: Source, *_: Any, **__: Any) -> None:
        given.append((recipe, source))
        raise Seen

    monkeypatch.setattr(outlook, "outlook", look)
    model = str(saved("llama"))
    with pytest.raises((Seen, SystemExit)):
        cli.run(["quantize", model, "--dry-run", "--recipe", "signround", *words.split()])
    made = AutoRound(model, recipe="signround", **keywords)
    recipe, source = given[0]
    assert recipe == made.recipe == build_recipe("signround", fields)
    assert (source.device, source.low_cpu_mem_usage) == (made.device, made.low_cpu_mem_usage)


def tuned(source: Path, output: Path, **changes: Any) -> Run:
    small = {"iters": 6, "nsamples": 6, "seqlen": 16, "batch_size": 2, "group_size": 32, "lr": 0.05}
    recipe = build_recipe("signround", small | {"bits": 2} | changes)
    return pipeline.quantize(recipe, Source(source, torch.device("cpu")), output, dataset=ROWS)


@pytest.fixture(scope="module")
def plain(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of all blocks without further options."""
    return [b.loss for b in tuned(saved("llama"), tmp_path_factory.mktemp("plain") / "o").blocks]


@pytest.mark.parametrize(
    "change",
    [
        {"minmax_lr": 0.01}, {"gradient_accumulate_steps": 2}, {"enable_minmax_tuning": False},
        {"enable_adam": True}, {"momentum": 0.9}, {"not_use_best_mse": True},
        {"dynamic_max_gap": 1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_option_of_the_steps_counts(
    change: dict[str, Any], plain: list[float], saved: Saved, tmp_path: Path
) -> None:
    run = tuned(saved("llama"), tmp_path / "out", **change)
    assert [b.loss for b in run.blocks] != plain
    assert change.keys() & {"not_use_best_mse"} or run.blocks[-1].loss < run.blocks[-1].loss_rtn


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("model.layers.1.mlp.up_proj", 1),
        ("model.layers.1.mlp", 3),
        ("layers.1.", 7),
        ("*.up_proj", 3),
        ("model.layers.*.mlp", 9),
        (r"layers\.[02]\..*_proj", 14),
    ],
)
def test_forms_of_a_layer_config(key: str, count: int, saved: Saved, tmp_path: Path) -> None:
    config = {key: {"bits": 8, "group_size": 16, "sym": False, "data_type": "int", "act_bits": 16}}
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(config))
    for number, form in enumerate((str(file), json.dumps(config))):
        out = tmp_path / str(number)
        words = ["--iters", "0", "--group-size", "32", "--layer_config", form, "-o", str(out)]
        with pytest.raises(SystemExit) as end:
            cli.run(["quantize", str(saved("llama")), "-q", *words])
        assert end.value.code == 0
        fates = json.loads((out / "autoround.json").read_text())["tensors"].values()
        assert sum(fate == f"quantized {Scheme(8, 16, False).spec}" for fate in fates) == count


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layer_config": {"up_proj": {"data_type": "mx_fp"}}}, "data_type='mx_fp' is not supp"),
        ({"layer_config": {"up_proj": {"act_bits": 8}}}, "act_bits=8 is not supported"),
        ({"layer_config": {"no_proj": {"bits": 8}}}, "'no_proj' matches no layer"),
        ({"dynamic_max_gap": 0}, "dynamic_max_gap=0: give 1 or more"),
        ({"device_map": {"model.layers.0": "cuda:7"}}, "'cuda:7' is not on this machine"),
        ({"momentum": 0.9, "enable_adam": True}, "momentum and enable_adam exclude each other"),
    ],
)
def test_what_cannot_be_done_is_said(given: dict[str, Any], said: str, saved: Saved) -> None:
    with pytest.raises(InputError, match=said):
        AutoRound(saved("llama"), iters=2, group_size=32, dataset=ROWS, **given).quantize()

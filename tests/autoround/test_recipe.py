# SPDX-License-Identifier: Apache-2.0
"""Recipes, their learning rates and JSON, and what the options refuse."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from autoround.errors import InputError
from autoround.options import (
    DATA_ONLY,
    NEUTRAL,
    STEPS_ONLY,
    build_recipe,
    default_output,
    device_by_name,
    parse_layer_config,
    split_names,
)
from autoround.recipe import RECIPES, Recipe, recipe_by_name, shard_bytes
from autoround.scheme import Scheme


@pytest.mark.parametrize(
    ("name", "iters", "nsamples", "lr"),
    [
        ("signround", 200, 128, 5e-3),
        ("signround-best", 1000, 512, 1e-3),
        ("signround-light", 50, 128, 5e-3),
    ],
)
def test_table(name: str, iters: int, nsamples: int, lr: float) -> None:
    recipe = RECIPES[name]
    assert (recipe.iters, recipe.nsamples, recipe.seqlen) == (iters, nsamples, 2048)
    assert recipe.learning_rate(4) == pytest.approx(lr, rel=1e-15)
    assert recipe.weight_scheme == Scheme(4, 128, True)


def test_rtn_needs_no_tuning() -> None:
    assert RECIPES["rtn"].iters == 0


@pytest.mark.parametrize(
    ("fields", "bits", "expected"),
    [
        ({"iters": 200}, 2, 1 / 200),
        ({"iters": 999}, 2, 1 / 999),
        ({"iters": 1000}, 2, 2 / 1000),
        ({"iters": 1000}, 3, 2 / 1000),
        ({"iters": 1000}, 4, 1 / 1000),
        ({"iters": 1000, "lr": 3e-3}, 2, 3e-3),
        ({"iters": 0}, 4, 1.0),
    ],
)
def test_learning_rate(fields: dict[str, Any], bits: int, expected: float) -> None:
    assert Recipe(**fields).learning_rate(bits) == expected


def test_overrides_lie_over_the_scheme() -> None:
    recipe = Recipe(scheme="w3a16g64", sym=False, group_size=-1)
    assert recipe.weight_scheme == Scheme(3, -1, False)


def test_json_is_stable_and_plain() -> None:
    a = Recipe(layer_config={"b": {"bits": 8}, "a": {"sym": False, "bits": 2}})
    b = Recipe(layer_config={"a": {"bits": 2, "sym": False}, "b": {"bits": 8}})
    assert json.dumps(a.to_json()) == json.dumps(b.to_json())
    assert json.loads(json.dumps(a.to_json())) == a.to_json()
    assert a.to_json() != Recipe().to_json()
    with_names = Recipe(ignore_layers=("x", "y"), layer_config={"a": "W8A16"})
    assert with_names.to_json()["ignore_layers"] == ["x", "y"]


def test_scheme_objects_in_layer_config_reach_the_json() -> None:
    plain = Recipe(layer_config={"a": Scheme(8, 32, False)}).to_json()
    assert plain["layer_config"]["a"] == {"bits": 8, "group_size": 32, "sym": False}


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"iters": -1}, "iters=-1 is too small; use 0 or more"),
        ({"nsamples": 0}, "nsamples=0"),
        ({"seqlen": 1}, "seqlen=1 is too small; use 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"gradient_accumulate_steps": 0}, "gradient_accumulate_steps=0"),
        ({"dynamic_max_gap": 0}, "dynamic_max_gap=0: give 1 or more"),
        ({"momentum": 1.0}, "momentum=1.0: give 0 or more, below 1"),
        ({"momentum": 0.5, "enable_adam": True}, "momentum and enable_adam exclude each other"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": -1e-3}, "lr=-0.001: give a number of 0 or more"),
        ({"minmax_lr": math.nan}, "minmax_lr=nan"),
        ({"scheme": "W9A16"}, "unknown scheme 'W9A16'"),
        ({"bits": 9}, "bits=9: choose 2 to 8"),
        ({"group_size": 8}, "group_size=8"),
        ({"max_shard_size": "5"}, "max_shard_size='5': write it like 5GB"),
        ({"max_shard_size": "5TB"}, "max_shard_size='5TB'"),
        ({"max_shard_size": "GB"}, "max_shard_size='GB'"),
        ({"max_shard_size": "nanGB"}, "max_shard_size='nanGB'"),
        ({"max_shard_size": "infGB"}, "max_shard_size='infGB'"),
        ({"max_shard_size": "-1GB"}, "below 1MB"),
        ({"max_shard_size": "999KB"}, "below 1MB"),
    ],
)
def test_refused_values(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("0.5gb", 5 * 10**8), ("1000KB", 10**6)]
)
def test_shard_size(text: str, size: int) -> None:
    assert shard_bytes(text) == size


def test_unknown_recipe() -> None:
    with pytest.raises(InputError, match="unknown recipe 'fast'; choose one of autoround, best"):
        recipe_by_name("fast", {})


GIVEN: dict[str, Any] = {
    "lr": 1e-3,
    "minmax_lr": 1e-3,
    "dataset": "x.txt",
    "nsamples": 8,
    "seqlen": 64,
    "batch_size": 4,
    "gradient_accumulate_steps": 2,
    "enable_minmax_tuning": False,
    "not_use_best_mse": True,
    "dynamic_max_gap": 5,
    "momentum": 0.9,
    "enable_adam": True,
    "nblocks": 2,
    "enable_quanted_input": False,
    "seed": 1,
}


@pytest.mark.parametrize("option", NEUTRAL)
@pytest.mark.parametrize("name", [None, "rtn", "light", "signround2"])
def test_values_that_ask_for_nothing(name: str | None, option: str) -> None:
    assert build_recipe(name, {option: NEUTRAL[option]}) == build_recipe(name, {})


def test_every_tuning_option_is_tried() -> None:
    assert set(GIVEN) == {*DATA_ONLY, *STEPS_ONLY}


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("way", ["rtn", "iters"])
def test_options_without_effect_are_refused(option: str, way: str) -> None:
    name, changes = ("rtn", {}) if way == "rtn" else (None, {"iters": 0})
    with pytest.raises(InputError, match=rf"^{option} has no effect without tuning"):
        build_recipe(name, changes | {option: GIVEN[option]})
    tuned = build_recipe("signround", {option: GIVEN[option]})
    assert getattr(tuned, option) == GIVEN[option]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "autoround"),
        ({"bits": 3, "nsamples": 4, "lr": None}, "autoround"),
        ({"iters": 0}, "rtn"),
        ({"iters": 20}, "signround"),
        ({"lr": 1e-3}, "signround"),
        ({"enable_minmax_tuning": False}, "signround"),
    ],
)
def test_what_is_given_names_the_recipe(changes: dict[str, Any], name: str) -> None:
    assert build_recipe(None, changes) == build_recipe(name, changes)


def test_not_given_means_the_recipe_s_own() -> None:
    assert build_recipe("light", {"lr": None, "iters": None, "bits": None}) == RECIPES["light"]


# ---- what is typed on a command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ('{"k_proj": {"bits": 8}}', {"k_proj": {"bits": 8}}),
        ("{k_proj:{bits:8}}", {"k_proj": {"bits": 8}}),
        ("{ k_proj : { bits : 8 , sym : False } }", {"k_proj": {"bits": 8, "sym": False}}),
        ("{lm_head:W8A16}", {"lm_head": "W8A16"}),
        ("{model.layers.0.mlp:{group_size:-1}}", {"model.layers.0.mlp": {"group_size": -1}}),
        ("{.*down_proj.*:{bits:16}}", {".*down_proj.*": {"bits": 16}}),
        ('{"a": {"sym": true, "bits": null}}', {"a": {"sym": True, "bits": None}}),
    ],
)
def test_layer_config_forms(text: str, parsed: dict[str, Any]) -> None:
    assert parse_layer_config(text) == parsed


def test_layer_config_file(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text('{"a": {"bits": 3}}')
    assert parse_layer_config(str(file)) == {"a": {"bits": 3}}
    file.write_text("{")
    with pytest.raises(InputError, match="is not readable JSON"):
        parse_layer_config(str(file))
    with pytest.raises(InputError, match=r"nope\.json does not exist"):
        parse_layer_config(str(tmp_path / "nope.json"))


@pytest.mark.parametrize("text", ["{", "8", "[1]", "{k_proj:8:9}", "k_proj=8"])
def test_layer_config_nonsense(text: str) -> None:
    with pytest.raises(InputError, match=r"layer_config .* is not JSON; write e\.g\."):
        parse_layer_config(text)


@pytest.mark.parametrize(
    ("text", "names"), [("a, b", ("a", "b")), ("a,,", ("a",)), ("", ()), (None, None)]
)
def test_split_names(text: str | None, names: tuple[str, ...] | None) -> None:
    assert split_names(text) == names


@pytest.mark.parametrize(
    ("scheme", "name"),
    [(Scheme(4), "m-w4g128"), (Scheme(3, 32), "m-w3g32"), (Scheme(8, -1), "m-w8row")],
)
def test_default_output(scheme: Scheme, name: str) -> None:
    assert default_output("/some/where/m", scheme) == Path(name)


@pytest.mark.parametrize(
    "form",
    [None, "auto", "cpu", 0, "0", "cpu,cpu", {"": "cpu"}, {"a.b": 0, "c": 0}, "a.b:cpu,c.*:cpu"],
)
def test_forms_of_a_device_map(form: Any) -> None:
    if torch.accelerator.is_available():
        pytest.skip("the first device is an accelerator here")
    assert device_by_name(form) == torch.device("cpu")


@pytest.mark.parametrize("form", ["0,7", {"layers.0": 0, "layers.1": "nope"}, "a.b:cpu,c.d:9"])
def test_every_device_of_a_map_must_be_there(form: Any) -> None:
    with pytest.raises(InputError, match="is not on this machine; choose auto or one of"):
        device_by_name(form)

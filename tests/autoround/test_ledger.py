# SPDX-License-Identifier: Apache-2.0
"""Every tensor of the source has one fate, every tensor of the files one origin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.run import artefact, pipeline
from autoround.run.ledger import Ledger
from autoround.run.record import Source

FATES = {"a": "copied", "b": "quantized u4:g32:f16"}
Saved = Callable[..., Path]


def ledger() -> Ledger:
    made = Ledger(places=({}, {}))
    made.enter("a", "copied", [[("a", 0)], [("all", 1)]])
    made.enter("b", FATES["b"], [[("b.codes", 0), ("b.scale", 0)], [("all", 0)]])
    return made


OUTPUTS = [{"a": 1, "b.codes": 1, "b.scale": 1}, {"all": 2}]


def test_balanced() -> None:
    ledger().balance(["a", "b"], FATES, OUTPUTS)


@pytest.mark.parametrize(
    ("source", "planned", "outputs", "message"),
    [
        (["a", "b", "c"], FATES, OUTPUTS, "nothing became of c"),
        (["a"], FATES, OUTPUTS, "b is quantized .* and not in the source"),
        (["a", "b"], FATES | {"b": "copied"}, OUTPUTS, "b is quantized .*, planned was copied"),
        (["a", "b"], FATES, [{**OUTPUTS[0], "x": 1}, OUTPUTS[1]], "x .* nothing became it"),
        (["a", "b"], FATES, [OUTPUTS[0], {"all": 3}], r"all \(piece 2\) is in the files"),
        (["a", "b"], FATES, [{"a": 1, "b.codes": 1}, OUTPUTS[1]], "b.scale .* not in the files"),
    ],
)
def test_unbalanced(
    source: list[str], planned: dict[str, str], outputs: list[dict[str, int]], message: str
) -> None:
    with pytest.raises(InputError, match=f"does not balance: .*{message}"):
        ledger().balance(source, planned, outputs)


def test_one_place_is_written_once() -> None:
    found = ledger()
    with pytest.raises(AssertionError, match="two fates"):
        found.enter("a", "copied", [[], []])
    found.enter("c", "copied", [[("a", 0)], []])
    with pytest.raises(InputError, match=r"a \(piece 0\) was written 2 times"):
        found.balance(["a", "b", "c"], FATES | {"c": "copied"}, OUTPUTS)


def run(source: Path, output: Path, **changes: Any) -> pipeline.Run:
    small = {"nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32}
    rows = [list(range(3 + i, 19 + i)) for i in range(8)]
    recipe = build_recipe(None, small | changes)
    return pipeline.quantize(recipe, Source(source, torch.device("cpu")), output, dataset=rows)


def test_a_run_that_does_not_balance_fails(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that was kept where the plan had it quantized: no config, so no model."""
    enter = Ledger.enter

    def lost(self: Ledger, key: str, fate: str, places: Any) -> None:
        enter(self, key, "copied" if "layers.1.mlp.up" in key else fate, places)

    monkeypatch.setattr(artefact.Ledger, "enter", lost)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.* is copied, planned was quant"):
        run(saved("llama"), tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("config.json")]


def test_experts_tell_what_reached_them(saved: Saved, tmp_path: Path) -> None:
    """All tokens of the samples tuned on, as often as the router sends each."""
    run(saved("mixtral"), tmp_path / "out")
    record = json.loads((tmp_path / "out/autoround.json").read_text())
    assert list(record["tensors"]) == list(Checkpoint(saved("mixtral")).entries)
    for block in record["blocks"]:
        assert len(block["experts"]) == 2
        for tokens in block["experts"].values():
            assert len(tokens) == 4
            assert sum(tokens) == 7 * 16 * 2  # one of eight samples is held out; two experts each

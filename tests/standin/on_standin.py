# SPDX-License-Identifier: Apache-2.0
"""Runs on an accelerator, played by `standin`: whatever lies on the wrong device fails as on a GPU.

Operators are the CPU's, but not all of them: attention is told to be the plain one, and a product
with a bias is rounded once more there, so models without biases are compared bit for bit.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch.nn.attention import SDPBackend, sdpa_kernel

import autoround
import hal
from autoround.models import Store
from autoround.options import build_recipe
from autoround.run import pipeline
from autoround.run.journal import Journal
from hal import ops, registry
from hal.registry import Case, Kernel
from hal.testing import check, quantized, weights

HOST, SECOND = torch.device("cpu"), torch.device("standin", 1)
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]
SMALL = {"nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32}
#: What few steps by signs of gradients do depends on the last bit of each.
RECIPES = {
    "rtn": {"iters": 0, "group_size": 32},
    "autoround": SMALL,
    "light": SMALL,
    "end to end": {**SMALL, "bits": 2, "end_to_end": 2},
    "signround": {**SMALL, "iters": 4, "lr": 0.05},
}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HAL_BACKEND", "reference")
    with sdpa_kernel(SDPBackend.MATH):
        yield


def run(recipe: str, source: Path, output: Path, device: torch.device) -> pipeline.Run:
    name = "rtn" if recipe == "end to end" else recipe
    made = build_recipe(name, RECIPES[recipe])
    return pipeline.quantize(made, pipeline.Source(source, device), output, dataset=ROWS)


def tensors(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        *(("llama", recipe) for recipe in ("rtn", "autoround", "light")),
        ("qwen3_moe", "autoround"),
        pytest.param("deepseek_v3", "autoround", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "autoround", marks=pytest.mark.slow),
    ],
)
def test_files_are_those_of_the_cpu(model: str, recipe: str, tmp_path: Path) -> None:
    source = zoo.save(model, tmp_path / "source", "5GB", None, torch.bfloat16)
    run(recipe, source, tmp_path / "cpu", HOST)
    run(recipe, source, tmp_path / "standin", SECOND)
    assert tensors(tmp_path / "cpu") == tensors(tmp_path / "standin")


def test_steps_by_signs(tmp_path: Path) -> None:
    source = zoo.save("gpt2", tmp_path / "source", "5GB", None, torch.bfloat16)
    cpu = run("signround", source, tmp_path / "cpu", HOST)
    far = run("signround", source, tmp_path / "standin", SECOND)
    for here, there in zip(cpu.blocks, far.blocks, strict=True):
        assert there.loss == pytest.approx(here.loss, rel=0.2)
        assert there.loss_rtn == pytest.approx(here.loss_rtn, rel=0.02)


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
def test_end_to_end(model: str, tmp_path: Path) -> None:
    """Gradients differ in their last bits, so the scales do; what they are worth does not."""
    source = zoo.save(model, tmp_path / "source", "5GB", None, torch.bfloat16)
    found = {}
    for device in (HOST, SECOND):
        run("end to end", source, tmp_path / device.type, device)
        record = json.loads((tmp_path / device.type / "autoround.json").read_text())
        found[device] = record["end_to_end"]
    assert found[SECOND]["loss_before"] == pytest.approx(found[HOST]["loss_before"], rel=0.02)
    assert found[SECOND]["loss"] == pytest.approx(found[HOST]["loss"], rel=0.05)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = zoo.save("llama", tmp_path / "source", "5GB", None, torch.bfloat16)
    run("autoround", source, tmp_path / "whole", SECOND)
    commit, rows = Journal.commit, []

    def stop(self: Journal, row: Any) -> None:
        commit(self, row)
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            run("autoround", source, tmp_path / "stopped", SECOND)
    run("autoround", source, tmp_path / "stopped", SECOND)
    assert tensors(tmp_path / "whole") == tensors(tmp_path / "stopped")


def test_between_blocks_all_lies_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.device] = []
    put = Store.put

    def watched(self: Store, i: int, value: torch.Tensor) -> torch.Tensor:
        seen.append(value.device)
        return put(self, i, value)

    monkeypatch.setattr(Store, "put", watched)
    source = zoo.save("llama", tmp_path / "source", "5GB", None, torch.bfloat16)
    run("autoround", source, tmp_path / "out", SECOND)
    assert set(seen) == {HOST}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 13)[None].to(model.device)
    with torch.no_grad():
        got: torch.Tensor = model(input_ids=ids).logits.cpu()
    return got


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    source = zoo.save("llama", folder / "source", "5GB", None, torch.bfloat16)
    run("rtn", source, folder / "out", HOST)
    return folder / "out"


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [
        (None, {"standin:0"}),
        ("auto", {"standin:0"}),
        (1, {"standin:1"}),
        ("standin:1", {"standin:1"}),
        ("cpu", {"cpu"}),
        ("0,1", {"standin:0", "standin:1"}),
        ({"model.layers.0": 1, "model.layers.1": "cpu", "": 0}, {"standin:0", "standin:1", "cpu"}),
        (
            "model.layers.*:1,lm_head:0,model.embed_tokens:0,model.norm:1",
            {"standin:0", "standin:1"},
        ),
    ],
    ids=str,
)
def test_a_model_lies_where_it_is_told(device_map: Any, devices: set[str], packed: Path) -> None:
    want = logits(autoround.load(packed, device_map="cpu"))
    model = autoround.load(packed, device_map=device_map)
    assert torch.equal(logits(model), want)
    linears = [m.weight for m in model.modules() if isinstance(m, hal.nn.QLinear)]
    found = {str(t.device) for t in [*model.parameters(), *linears]}
    assert found == devices


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def select(case: Case) -> Kernel:
        row = registry.select(case)

        def watched(*args: object) -> object:
            seen.append(torch.accelerator.current_device_index())
            return row.fn(*args)

        return dataclasses.replace(row, fn=watched)

    monkeypatch.setattr(ops, "select", select)
    quantized(weights(8, 64, 1).to(SECOND), hal.Spec.parse("s4:g32:f16"))
    assert seen == [1, 1]
    assert torch.accelerator.current_device_index() == 0


def test_the_verbs() -> None:
    assert all(right for _, right in check(SECOND))

# SPDX-License-Identifier: Apache-2.0
"""Rounding without a model: the same bytes as through the model, or a reason for using one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autoround.checkpoint import Checkpoint
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.recipe import Recipe
from autoround.run import pipeline, stream

HOST = torch.empty(0).device
#: Families that no other test needs: (model class, what is changed).
ALSO: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("Cohere2ForCausalLM", {"attention_bias": True} | zoo.TIED),
    "gemma": ("GemmaForCausalLM", {"head_dim": 16} | zoo.TIED),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32, "attention_bias": True} | zoo.TIED),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    "granite": ("GraniteForCausalLM", {"attention_bias": True}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]} | zoo.TIED),
}
#: name -> what of the zoo's model is changed
SERVED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {},
    "qwen3_tied": {},
    "mistral": {},
    "phi3": {},
    "gemma3": {},
    "mixtral": {},
    "qwen3_moe": {},
    **{name: {} for name in ALSO},
}
Saved = Callable[..., Path]


def rtn(**changes: Any) -> Recipe:
    return build_recipe("rtn", {"group_size": 32} | changes)


def both(recipe: Recipe, source: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run without and with the model, compare every byte, return the directory."""
    assert stream.refuse(recipe, Checkpoint(source)) is None
    given = pipeline.Source(source, HOST)
    pipeline.quantize(recipe, given, work / "names")
    monkeypatch.setattr(stream, "refuse", lambda recipe, checkpoint: "compared with")
    pipeline.quantize(recipe, given, work / "model")
    files, others = (
        sorted(p.relative_to(work / at) for p in (work / at).rglob("*") if p.is_file())
        for at in ("model", "names")
    )
    assert files == others
    for file in files:
        assert (work / "names" / file).read_bytes() == (work / "model" / file).read_bytes(), file
    return work / "names"


@pytest.mark.parametrize("name", SERVED)
def test_the_bytes_are_those_of_the_run_through_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ALSO:
        monkeypatch.setitem(zoo.ZOO, name, ALSO[name])
    shard = "60KB" if name in ("llama", "mixtral") else "5GB"
    source = zoo.save(name, tmp_path / "float", shard, SERVED[name], torch.bfloat16)
    both(rtn(), source, tmp_path, monkeypatch)


def test_a_config_that_leaves_the_tie_to_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.ZOO, "gemma", ALSO["gemma"])
    source = zoo.save("gemma", tmp_path / "float", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    both(rtn(), source, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_lm_head": True},
        {"sym": False, "bits": 3},
        {"layer_config": {"down_proj": {"bits": 8}}, "ignore_layers": ("layers.1.self_attn",)},
        {"max_shard_size": "1MB", "group_size": -1},
        {"layer_config": {"lm_head": {"bits": 8, "group_size": 16}}},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_options_mean_the_same(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = zoo.save("qwen3", tmp_path / "float", dtype=dtype)
    both(rtn(**changes), source, tmp_path, monkeypatch)


def test_weights_are_rounded_in_the_dtype_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored f32, computed in bf16: the model rounds before it is quantized, so must names."""
    source = zoo.save("llama", tmp_path / "float")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    both(rtn(), source, tmp_path, monkeypatch)


def with_head(where: Path, bit: int) -> Path:
    """A model whose head is tied, and stored, as Qwen3-0.6B's is; ``bit`` is added to its first
    byte."""
    source = zoo.save("qwen3_tied", where, dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head.view(torch.uint8)[0, 0] ^= bit
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    return source


def test_a_tied_head_that_is_stored_too_is_not_saved_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_head(tmp_path / "float", 0)
    out = both(rtn(format="auto_round,fake"), source, tmp_path, monkeypatch)
    record = json.loads((out / "auto_round" / "autoround.json").read_text())
    assert record["tensors"]["lm_head.weight"].startswith("left out: model.embed_tokens.weight is")
    assert list(record["tensors"]) == list(Checkpoint(source).entries)
    for place in out.iterdir():
        assert "lm_head.weight" not in load_file(place / "model.safetensors"), place
    model = AutoModelForCausalLM.from_pretrained(out / "fake")
    assert torch.equal(
        model.lm_head.weight, load_file(source / "model.safetensors")["lm_head.weight"]
    )


def test_a_tied_head_of_its_own_bytes_stays(tmp_path: Path) -> None:
    source = with_head(tmp_path / "float", 1)
    assert "lm_head.weight" in (stream.refuse(rtn(), Checkpoint(source)) or "")
    run = pipeline.quantize(rtn(), pipeline.Source(source, HOST), tmp_path / "out")
    assert run.plan.fates["lm_head.weight"].startswith("copied")
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


# ---- architectures that transformers does not know


def unknown(where: Path) -> Path:
    """A made-up architecture: blocks called units, a table and a norm in them, a router."""
    where.mkdir()
    g = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    tensors = {"trunk.wte.weight": tensor(100, 64), "lm_head.weight": tensor(128, 64)}
    for i in range(3):
        tensors |= {
            f"trunk.units.{i}.mix.proj.weight": tensor(64, 64),
            f"trunk.units.{i}.mix.rel_embed.weight": tensor(32, 64),
            f"trunk.units.{i}.router.weight": tensor(32, 64),
            f"trunk.units.{i}.mlp.experts.1.up.weight": tensor(96, 64),
            f"trunk.units.{i}.norm.weight": tensor(64),
            f"trunk.units.{i}.conv.weight": tensor(64, 1, 4),
        }
    save_file(tensors, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps({"model_type": "no_such_thing", "width": 64}))
    return where


def test_an_unknown_architecture_is_rounded_by_its_names(tmp_path: Path) -> None:
    source = unknown(tmp_path / "float")
    run = pipeline.quantize(rtn(), pipeline.Source(source, HOST), tmp_path / "out")
    assert {layer.view.param for layer in run.plan.layers} == {
        f"trunk.units.{i}.{name}.weight"
        for i in range(3)
        for name in ("mix.proj", "mlp.experts.1.up")
    }
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "out"))
    kept = [key for key in before if key in after]
    assert len(kept) == 2 + 3 * 4
    assert all(torch.equal(before[key], after[key]) for key in kept)
    fates = json.loads((tmp_path / "out" / "autoround.json").read_text())["tensors"]
    assert list(fates) == list(Checkpoint(source).entries)
    assert "router" in fates["trunk.units.0.router.weight"]
    decoded = oracle.decode_all(tmp_path / "out")
    assert len(decoded) == 6
    for name, found in decoded.items():
        oracle.assert_nearest(found, before[f"{name}.weight"].double().numpy(), 4, True)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "gpt2 is built by transformers"),
        ("deepseek_v3", {}, "deepseek_v3 is built by transformers"),
        ("qwen3_moe", {"ignore_layers": ("layers.1",)}, "must share a scheme"),
    ],
)
def test_the_model_is_used_where_names_do_not_say_enough(
    name: str, changes: dict[str, Any], reason: str, saved: Saved
) -> None:
    assert reason in str(stream.refuse(rtn(**changes), Checkpoint(saved(name))))


def test_a_tuned_run_uses_the_model(saved: Saved) -> None:
    assert stream.refuse(Recipe(iters=1), Checkpoint(saved("llama"))) == "tuning runs the model"


def test_more_than_its_config_says_uses_the_model(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 2}
    (llama / "config.json").write_text(json.dumps(config))
    assert (
        stream.refuse(rtn(), Checkpoint(llama))
        == "model.layers.2.input_layernorm.weight is not what its config says"
    )


def test_what_is_found_on_the_way_leaves_nothing_behind(tmp_path: Path) -> None:
    source = unknown(tmp_path / "float")
    tensors = load_file(source / "model.safetensors")
    tensors["trunk.units.2.mix.proj.weight"][3, 3] = torch.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=r"units\.2\.mix\.proj\.weight .* holds 1 NaN"):
        pipeline.quantize(rtn(), pipeline.Source(source, HOST), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_imports_no_transformers(saved: Saved, tmp_path: Path) -> None:
    arguments = ["quantize", str(saved("llama")), "-o", str(tmp_path / "out"), "--recipe", "rtn"]
    code = f"""
import sys
from autoround.cli import run
try:
    run({[*arguments, "--group-size", "32"]})
except SystemExit as end:
    assert not end.code, end.code
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("name", ["granitemoe", "llama4"])
def test_experts_stored_as_one_tensor_are_split_by_names(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    """In rows and in columns: each expert's layer has the bytes of the run through the model."""
    source = tmp_path / "renamed"
    shutil.copytree(saved(name), source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "no_such_thing"}
    (source / "config.json").write_text(json.dumps(config))
    assert stream.refuse(rtn(), Checkpoint(source)) is None
    for where, out in ((source, "names"), (saved(name), "model")):
        pipeline.quantize(rtn(), pipeline.Source(where, HOST), tmp_path / out)
    found, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("names", "model"))
    experts = [key for key in wanted if ".experts." in key and "shared" not in key]
    assert experts
    assert not [key for key in found if found[key].ndim == 3]
    assert all(torch.equal(found[key], wanted[key]) for key in experts)

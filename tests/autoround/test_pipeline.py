# SPDX-License-Identifier: Apache-2.0
"""What a run writes: every tensor accounted for, every code the one float64 arithmetic gives."""

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

from autoround.errors import InputError
from autoround.formats import Export, Stored
from autoround.formats.sink import ShardSink
from autoround.options import build_recipe
from autoround.run import artefact, engine, pipeline, stream

ROOT = Path(__file__).parents[2]
PGDOC = ROOT / "benchmarks/models/pgdoc"
CPU = torch.device("cpu")
ROWS = [list(range(3 + i, 19 + i)) for i in range(8)]  # token ids for tuning

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Saved zoo models, each written once."""
    made: dict[Any, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **own: Any) -> Path:
        key = (name, dtype, shard, tuple(own.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(name)
            made[key] = zoo.save(name, path, shard, own or None, dtype)
        return made[key]

    return get


def rtn(source: Path, output: Path, **changes: Any) -> pipeline.Run:
    recipe = build_recipe(None, {"iters": 0, "group_size": 32} | changes)
    return pipeline.quantize(recipe, pipeline.Source(source, CPU), output)


def tune(source: Path, output: Path, **changes: Any) -> pipeline.Run:
    small = {"iters": 4, "nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32, "lr": 0.05}
    return pipeline.quantize(
        build_recipe(None, small | changes), pipeline.Source(source, CPU), output, dataset=ROWS
    )


def digest(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


def matrix(source: dict[str, torch.Tensor], module: str, name: str) -> torch.Tensor:
    """A checkpoint weight as [N, K] float32."""
    w = source[f"{module}.weight"].float()
    return w.t() if name == "gpt2" else w


# ---- every tensor, every code ----------------------------------------------------------------

MIXED = {
    "layers.0": {"bits": 2},
    "h.0": {"bits": 2},
    "layers.1": {"bits": 8, "group_size": 64},
    "h.1": {"bits": 8},
    "layers.2": {"bits": 3, "group_size": -1},
    "h.2": {"bits": 3, "group_size": -1},
}


def mixed(name: str, sym: bool) -> dict[str, Any]:
    own = "h." if name in ("gpt2", "gptj", "bloom") else "layers."
    table = {key: value for key, value in MIXED.items() if key.startswith(own)}
    return {"layer_config": table, "sym": sym}


CASES = {
    "w4": lambda name: {},
    "w4 asym": lambda name: {"sym": False},
    "w3": lambda name: {"bits": 3},
    "w2-8": lambda name: mixed(name, True),
    "w2-8 asym": lambda name: mixed(name, False),
}
PACKING = {
    "w4": "auto_round:auto_gptq",
    "w4 asym": "auto_round:auto_awq",
    "w3": "auto_round:auto_gptq",
    "w2-8": "auto_round:auto_gptq",
    "w2-8 asym": "auto_round",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_rounding_to_nearest(name: str, case: str, saved: Saved, tmp_path: Path) -> None:
    source, out = saved(name), tmp_path / "out"
    run = rtn(source, out, **CASES[case](name))
    before, after = oracle.one_by_one(oracle.read(source)), oracle.read(out)
    own = oracle.config(out)["quantization_config"]
    assert own["packing_format"] == PACKING[case]
    # One fate each; the output is what was planned, nothing more.
    modules = set(oracle.packed_modules(after))
    assert set(run.plan.fates) == set(before)
    made = {f"{m}.{part}" for m in modules for part in ("qweight", "qzeros", "scales")}
    kept = {key for key in before if key.removesuffix(".weight") not in modules}
    assert set(after) == made | kept
    for key in kept:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(after[key].view(torch.uint8), before[key].view(torch.uint8)), key
        assert run.plan.fates[key].startswith("copied")
    assert len(modules) >= 6
    # Every code, by bits taken from the file and float64 arithmetic.
    decoded = oracle.decode_all(out)
    for module, d in decoded.items():
        bits, _, sym = oracle.scheme_of(own, module)
        oracle.assert_nearest(d, matrix(before, module, name).numpy(), bits, sym)
        assert run.plan.fates[f"{module}.weight"].startswith("quantized")
    if "w2-8" in case:
        assert {oracle.scheme_of(own, m)[0] for m in decoded} >= {2, 8, 3}


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_bfloat16_source(name: str, saved: Saved, tmp_path: Path) -> None:
    source, out = saved(name, torch.bfloat16), tmp_path / "out"
    rtn(source, out)
    before = oracle.read(source)
    for module, d in oracle.decode_all(out).items():
        oracle.assert_nearest(d, matrix(before, module, name).numpy(), 4, True)


def test_decoder_sees_a_wrong_bit(saved: Saved, tmp_path: Path) -> None:
    """The oracle itself: one code off by one is noticed."""
    rtn(saved("llama"), tmp_path / "out")
    module, d = next(iter(oracle.decode_all(tmp_path / "out").items()))
    w = matrix(oracle.read(saved("llama")), module, "llama").numpy()
    d.codes[0, 0] += 1 if d.codes[0, 0] < 8 else -1
    with pytest.raises(AssertionError):
        oracle.assert_nearest(d, w, 4, True)


SPECIAL = {
    "zeros": torch.zeros(32, 64),
    "positive": torch.rand(32, 64) + 0.1,
    "negative": -torch.rand(32, 64) - 0.1,
    "constant": torch.full((32, 64), 0.3),
    "tie of both sides": torch.tensor([-1.0, 1.0]).repeat(32, 32),
    "tiny": torch.randn(32, 64) * 1e-7,
    "one outlier": torch.nn.functional.pad(torch.full((32, 1), 50.0), (0, 63)) + 1e-3,
}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_weights(kind: str, sym: bool, saved: Saved, tmp_path: Path) -> None:
    source = saved("llama")
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    assert tensors[key].shape == SPECIAL[kind].shape
    tensors[key] = SPECIAL[kind]
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_bytes((source / "config.json").read_bytes())
    rtn(model, tmp_path / "out", sym=sym)
    d = oracle.decode_all(tmp_path / "out")[key.removesuffix(".weight")]
    oracle.assert_nearest(d, SPECIAL[kind].numpy(), 4, sym)


def test_scale_beyond_fp16_is_refused(saved: Saved, tmp_path: Path) -> None:
    source = saved("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = 1e7
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj.*scale exceeds f16.*ignore"):
        rtn(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- tuned runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma3", "zamba2"])
def test_tuned_codes_differ_and_kept_tensors_do_not(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    source = saved(name)
    run = tune(source, tmp_path / "tuned", bits=3)
    rtn(source, tmp_path / "rtn", bits=3)
    a, b = oracle.read(tmp_path / "tuned"), oracle.read(tmp_path / "rtn")
    assert {k: (t.dtype, t.shape) for k, t in a.items()} == {
        k: (t.dtype, t.shape) for k, t in b.items()
    }
    moved = [key for key in a if not torch.equal(a[key], b[key])]
    assert moved
    assert {key.rpartition(".")[2] for key in moved} <= {"qweight", "scales", "qzeros"}
    assert all(r.loss > 0 and r.loss_rtn > 0 for r in run.blocks)
    # A tuned code is at most V's travel away from the nearest, plus what the scale moved.
    codes = [oracle.decode_all(tmp_path / n) for n in ("tuned", "rtn")]
    travel = sum(0.05 * (1 - t / 4) for t in range(3))
    for module, d in codes[0].items():
        w = matrix(oracle.read(source), module, name).double().numpy()
        at = torch.arange(w.shape[1]) // d.group
        ratio = w / d.scale[:, at] + d.zero[:, at]
        assert (abs(d.codes - ratio.clip(0, 7)) <= 0.5 + travel + 1e-4).all()


@pytest.mark.parametrize("run", [rtn, tune], ids=["rtn", "tuned"])
@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe"])
def test_two_runs_give_the_same_bytes(
    name: str, run: Callable[..., Any], saved: Saved, tmp_path: Path
) -> None:
    for out in ("a", "b"):
        run(saved(name), tmp_path / out, bits=3)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    run(saved(name), tmp_path / "c", **({"bits": 4} if run is rtn else {"bits": 3, "seed": 1}))
    a, c = (digest(tmp_path / out)["model.safetensors"] for out in "ac")
    assert a != c


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_memory_modes_give_the_same_bytes(name: str, saved: Saved, tmp_path: Path) -> None:
    source = saved(name)
    for mode in (False, True):
        small = {"nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32}
        where = pipeline.Source(source, CPU, low_cpu_mem_usage=mode)
        pipeline.quantize(
            build_recipe("autoround", small | {"iters": 2}),
            where,
            tmp_path / str(mode),
            dataset=ROWS,
        )
    assert digest(tmp_path / "True") == digest(tmp_path / "False")


def test_record_tells_what_was_done(saved: Saved, tmp_path: Path) -> None:
    run = tune(saved("deepseek_v3"), tmp_path / "out")
    record = json.loads((tmp_path / "out/autoround.json").read_text())
    assert record["tensors"] == run.plan.fates
    assert record["recipe"]["iters"] == 4
    assert record["calibration"]["shape"] == [8, 16]
    assert [b["name"] for b in record["blocks"]] == [f"model.layers.{i}" for i in range(3)]
    assert any("kv_a_proj" in name for name in record["kept"])


# ---- the directory ---------------------------------------------------------------------------


def test_config_is_the_source_s_plus_one_key(saved: Saved, tmp_path: Path) -> None:
    source = saved("qwen3")
    rtn(source, tmp_path / "out")
    own = oracle.config(tmp_path / "out")
    beside = json.loads((tmp_path / "out/quantization_config.json").read_text())
    assert own.pop("quantization_config") == beside
    assert own == oracle.config(source)
    assert beside == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    }


def test_companions_travel(tmp_path: Path) -> None:
    rtn(PGDOC, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (PGDOC / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_several_shards(tmp_path: Path) -> None:
    """Shards of at most 1 MB, an index that agrees, tensors as in one file."""
    rtn(PGDOC, tmp_path / "one")
    rtn(PGDOC, tmp_path / "many", max_shard_size="1MB")
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    files = sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) >= 4
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    seen: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 10**6 or len(tensors) == 1
        assert {name for name, f in index["weight_map"].items() if f == file} == set(tensors)
        seen |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(seen) == set(whole)
    assert all(torch.equal(seen[name], whole[name]) for name in whole)


def test_bytes_are_those_planned(saved: Saved, tmp_path: Path) -> None:
    run = rtn(saved("mixtral"), tmp_path / "out")
    data = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    assert head.pop("__metadata__") == {"format": "pt"}
    at = 0
    for planned, (name, row) in zip(run.plan.targets[0].stored, head.items(), strict=True):
        assert (planned.name, planned.dtype, list(planned.shape)) == (
            name, row["dtype"], row["shape"],
        )  # fmt: skip
        assert row["data_offsets"] == [at, at + planned.nbytes]
        at += planned.nbytes
    assert len(data) == 8 + length + at
    assert at == run.plan.nbytes


# ---- shapes that do not fit ------------------------------------------------------------------


def test_ragged_layers_are_kept_and_listed(saved: Saved, tmp_path: Path) -> None:
    """intermediate 80: rows of gate and up, columns of down are no multiple of 32."""
    source = saved("llama", intermediate_size=80)
    run = rtn(source, tmp_path / "out")
    own = oracle.config(tmp_path / "out")["quantization_config"]["extra_config"]
    ragged = {f"model.layers.{i}.mlp.{x}_proj" for i in range(3) for x in ("gate", "up", "down")}
    fused = {f"model.layers.{i}.mlp.gate_up_proj" for i in range(3)}  # as engines build them
    assert own == {name: {"bits": 16, "data_type": "float"} for name in ragged | fused}
    assert set(oracle.packed_modules(oracle.read(tmp_path / "out"))) == {
        f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qkvo"
    }
    assert "not a multiple of 32" in run.plan.kept_because["model.layers.0.mlp.up_proj"]


def test_smaller_group_where_the_columns_want_one(saved: Saved, tmp_path: Path) -> None:
    """down_proj has 96 columns: group 64 does not divide them, 32 does."""
    source = saved("llama")
    run = rtn(source, tmp_path / "out", group_size=64)
    own = oracle.config(tmp_path / "out")["quantization_config"]
    downs = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert own["extra_config"] == {name: {"group_size": 32} for name in downs}
    assert all("group_size 32 instead" in run.plan.kept_because[name] for name in downs)
    before = oracle.read(source)
    for module, d in oracle.decode_all(tmp_path / "out").items():
        assert d.group == (32 if module in downs else 64)
        oracle.assert_nearest(d, matrix(before, module, "llama").numpy(), 4, True)


def test_row_narrower_than_a_group(saved: Saved, tmp_path: Path) -> None:
    """64 columns and group 128: one group a row, in the file as in the reader's arithmetic."""
    source = saved("llama")
    rtn(source, tmp_path / "out", group_size=128)
    before = oracle.read(source)
    for module, d in oracle.decode_all(tmp_path / "out").items():
        w = matrix(before, module, "llama")
        assert d.group == w.shape[1]
        oracle.assert_nearest(d, w.numpy(), 4, True)


@pytest.mark.parametrize("chosen", ["layers.1", r"layers\.[1]$", "model.layers.1"])
@pytest.mark.parametrize("run", [rtn, tune])
def test_chosen_blocks(run: Any, chosen: str, saved: Saved, tmp_path: Path) -> None:
    made = run(saved("llama"), tmp_path / "o", to_quant_block_names=(chosen,))
    fates = made.plan.fates
    quantized = {key for key, fate in fates.items() if fate.startswith("quantized")}
    assert len(quantized) == 7
    assert all(".layers.1." in key for key in quantized)
    assert fates["model.layers.0.mlp.up_proj.weight"] == "copied: asked for"


def test_chosen_blocks_that_are_not_there(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'visual' matches no layer; .*'model.layers.0'"):
        rtn(saved("llama"), tmp_path / "o", to_quant_block_names=("visual",))


def test_nothing_to_quantize(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no layer would be quantized \(asked for\)"):
        rtn(saved("llama"), tmp_path / "out", ignore_layers=("layers",))
    assert not (tmp_path / "out").exists()


# ---- head, experts, shared weights -----------------------------------------------------------


@pytest.mark.parametrize("run", [rtn, tune], ids=["rtn", "tuned"])
@pytest.mark.parametrize(
    "changes",
    [{"quant_lm_head": True}, {"layer_config": {"lm_head": {"bits": 8, "group_size": 64}}}],
    ids=["option", "layer_config"],
)
def test_head(
    changes: dict[str, Any], run: Callable[..., Any], saved: Saved, tmp_path: Path
) -> None:
    source = saved("llama")
    run(source, tmp_path / "out", **changes)
    own = oracle.config(tmp_path / "out")["quantization_config"]
    bits, group = (8, 64) if "layer_config" in changes else (4, 32)
    full = {"bits": bits, "group_size": group, "sym": True, "data_type": "int"}
    assert own["extra_config"] == {"lm_head": full}
    head = oracle.decode_all(tmp_path / "out")["lm_head"]
    oracle.assert_nearest(head, oracle.read(source)["lm_head.weight"].numpy(), bits, True)


@pytest.mark.parametrize(
    "changes", [{"quant_lm_head": True}, {"layer_config": {"lm_head": "W8A16"}}]
)
def test_tied_head_is_refused(changes: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lm_head is tied to the embeddings"):
        rtn(saved("qwen3_tied"), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3_tied", "gpt2"])  # by names, through the model
def test_tied_head_is_named(name: str, saved: Saved, tmp_path: Path) -> None:
    run = rtn(saved(name), tmp_path / "out")
    key = {"qwen3_tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[name]
    assert run.plan.fates[key] == "copied: lm_head.weight is this tensor too"


def test_experts_need_one_scheme(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experts of .* are one tensor and need one scheme"):
        rtn(saved("qwen3_moe"), tmp_path / "out", layer_config={"experts.1": {"bits": 8}})
    rtn(saved("qwen3_moe"), tmp_path / "out", layer_config={r"experts\.\d+\.down": {"bits": 8}})
    own = oracle.config(tmp_path / "out")["quantization_config"]
    for module, d in oracle.decode_all(tmp_path / "out").items():
        wanted = 8 if "experts" in module and "down" in module else 4
        assert oracle.scheme_of(own, module)[0] == wanted
        assert d.codes.max() < 2**wanted


def test_experts_kept_for_two_reasons(saved: Saved, tmp_path: Path) -> None:
    """Kept by --ignore-layers and by a layer_config of another group: still all kept."""
    rtn(
        saved("qwen3_moe"), tmp_path / "out", layer_config={r"experts\.[01]": {"bits": 16}},
        ignore_layers=(r"experts\.[23]",),
    )  # fmt: skip
    assert not [m for m in oracle.decode_all(tmp_path / "out") if "experts" in m]


def test_stacked_experts_are_split_where_they_are_quantized(saved: Saved, tmp_path: Path) -> None:
    """Those that stay are the one tensor that they were; a dense model would want it whole."""
    source, gone = saved("granitemoe"), "layers.0.block_sparse_moe.experts"
    run = rtn(source, tmp_path / "out", ignore_layers=(gone,))
    stored, before = oracle.read(tmp_path / "out"), oracle.read(source)
    stack = "model.layers.{}.block_sparse_moe.input_linear.weight"
    assert torch.equal(stored[stack.format(0)], before[stack.format(0)])
    assert stack.format(1) not in stored
    assert run.plan.fates[stack.format(0)] == "copied: asked for"
    assert run.plan.fates["model.layers.1.block_sparse_moe.experts.3.w2.weight"].startswith("quant")
    record = json.loads((tmp_path / "out" / "autoround.json").read_text())
    assert record["tensors"] == run.plan.fates
    with pytest.raises(InputError, match=r"format fake: the model has its experts as one tensor"):
        rtn(source, tmp_path / "fake", format="fake")
    with pytest.raises(InputError, match=r"format mlx: mlx-lm has the experts of gpt_oss"):
        rtn(saved("gpt_oss"), tmp_path / "mlx", format="mlx")


def test_router_cannot_be_quantized(saved: Saved, tmp_path: Path) -> None:
    config = {"mlp.gate": {"bits": 4}}
    with pytest.raises(InputError, match=r"mlp\.gate cannot be quantized: gate keeps"):
        rtn(saved("qwen3_moe"), tmp_path / "out", layer_config=config)


def test_weights_shared_between_blocks_are_kept(saved: Saved, tmp_path: Path) -> None:
    """Zamba2: one transformer in two blocks. Its weights stay, under both names."""
    run = rtn(saved("zamba2"), tmp_path / "out")
    modules = oracle.packed_modules(oracle.read(tmp_path / "out"))
    assert modules
    assert not [m for m in modules if "shared_transformer" in m]
    extra = oracle.config(tmp_path / "out")["quantization_config"]["extra_config"]
    for block in (1, 3):
        name = f"model.layers.{block}.shared_transformer.self_attn.q_proj"
        assert run.plan.kept_because[name] == "shared between blocks"
        assert extra[name]["bits"] == 16


def test_block_kept_whole_passes_samples_on(saved: Saved, tmp_path: Path) -> None:
    run = tune(saved("llama"), tmp_path / "out", ignore_layers=("layers.0",))
    assert run.blocks[0].loss == 0  # nothing rounded yet
    assert 0 < run.blocks[1].loss < run.blocks[1].loss_rtn
    modules = oracle.packed_modules(oracle.read(tmp_path / "out"))
    assert modules
    assert not [m for m in modules if m.startswith("model.layers.0.")]


def test_block_that_text_never_reaches_is_rounded(tmp_path: Path) -> None:
    """Mllama without an image skips its cross-attention block; it is quantized all the same."""
    text = {key: zoo.BASE[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    layers = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "attention_heads": 2, "image_size": 28}
    vision |= {"num_hidden_layers": 2, "num_global_layers": 1, "patch_size": 14}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [1]}
    config = transformers.MllamaConfig(text_config=text | heads | layers, vision_config=vision)
    transformers.MllamaForConditionalGeneration(config).save_pretrained(tmp_path / "mllama")
    run = tune(tmp_path / "mllama", tmp_path / "out")
    assert [b.index for b in run.blocks] == [0, 2, 1]
    assert math.isnan(run.blocks[2].loss)
    record = (tmp_path / "out" / "autoround.json").read_text()
    assert "NaN" not in record  # no JSON, whatever Python's own reader thinks of it
    assert list(json.loads(record)["blocks"][2]) == ["name"]
    before, after = oracle.read(tmp_path / "mllama"), oracle.read(tmp_path / "out")
    own = oracle.config(tmp_path / "out")["quantization_config"]
    decoded = {m: d for m, d in oracle.decode_all(tmp_path / "out").items() if ".layers.1." in m}
    assert len(decoded) == len([m for m in oracle.packed_modules(after) if ".layers.1." in m]) > 0
    for module, d in decoded.items():
        bits, _, sym = oracle.scheme_of(own, module)
        oracle.assert_nearest(d, before[f"{module}.weight"].numpy(), bits, sym)


def test_float_model_that_overflows_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llama").half()
    with torch.no_grad():
        for weight in model.model.layers[1].mlp.parameters():
            weight.fill_(6e4)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"layers\.1 puts out NaN or infinity in torch\.float16"):
        tune(tmp_path / "model", tmp_path / "out")
    assert not [*(tmp_path / "out").rglob("config.json")]


# ---- failure ---------------------------------------------------------------------------------


class Broken(Exception):
    pass


def break_at(monkeypatch: pytest.MonkeyPatch, block: int, error: BaseException) -> None:
    """Raise when the stages of a block have run, or its first weight is rounded without a model."""
    original = engine.Engine._run_stages

    def stages(self: Any, task: Any) -> None:
        original(self, task)
        if task.index == block:
            raise error

    monkeypatch.setattr(engine.Engine, "_run_stages", stages)
    rounding = stream._round

    def rounded(layer: Any, *rest: Any) -> None:
        rounding(layer, *rest)
        if f"layers.{block}." in layer.view.param:
            raise error

    monkeypatch.setattr(stream, "_round", rounded)


@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("run", [rtn, tune], ids=["rtn", "tuned"])
@pytest.mark.parametrize("where", ["new", "new/deep/er", "empty"])
def test_failed_run_leaves_nothing(
    where: str, run: Callable[..., Any], error: BaseException, saved: Saved, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    break_at(monkeypatch, 0, error)  # nothing is committed yet
    with pytest.raises(type(error)):
        run(saved("llama"), tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    run(saved("llama"), tmp_path / where)
    assert (tmp_path / where / "config.json").is_file()


def test_disk_that_fills_while_companions_are_copied(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "write_companions", full)
    with pytest.raises(InputError, match=r"No space left.*free some space or choose another -o"):
        rtn(saved("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_is_written_last(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until everything else is there, no reader takes the directory for a model."""
    original = artefact._write_config

    def check(export: Export) -> None:
        found = {p.name for p in export.directory.iterdir()}
        assert {"model.safetensors", "autoround.json"} <= found
        assert "config.json" not in found
        original(export)

    monkeypatch.setattr(artefact, "_write_config", check)
    rtn(saved("llama"), tmp_path / "out")


# ---- the sink --------------------------------------------------------------------------------


def stored(name: str, tensor: torch.Tensor, dtype: str) -> Stored:
    return Stored(name, dtype, tuple(tensor.shape), tensor.nbytes)


def test_sink_claims_all_space_first_and_writes_in_any_order(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(50, 10 + i).to(torch.bfloat16) for i in range(6)}
    rows = [stored(name, t, "BF16") for name, t in tensors.items()]
    with ShardSink(tmp_path, rows, 2500) as sink:
        claimed = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
        assert all(name.endswith(".safetensors.partial") for name in claimed)
        assert sum(claimed.values()) > sum(t.nbytes for t in tensors.values())
        blocks = sum(p.stat().st_blocks * 512 for p in tmp_path.iterdir())
        assert blocks >= sum(t.nbytes for t in tensors.values())  # not sparse
        for name in reversed(tensors):
            sink.put(name, tensors[name])
        assert claimed == {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    found = oracle.read(tmp_path)
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


def fill(sink: ShardSink, tensors: dict[str, torch.Tensor], names: tuple[str, ...]) -> None:
    with sink:
        for name in names:
            sink.put(name, tensors[name])


def test_sink_refuses_what_was_not_planned(tmp_path: Path) -> None:
    row = torch.zeros(4, 4)
    plan = [stored("a", row, "F32"), stored("b", row, "F32")]
    for names, error in {("a",): "never written: \\['b'\\]", ("c",): "c"}.items():
        with pytest.raises((AssertionError, KeyError), match=error):
            fill(ShardSink(tmp_path, plan, 10**6), dict.fromkeys(names, row), names)

    def other_bytes() -> None:
        with ShardSink(tmp_path, plan, 10**6) as sink:
            sink.put("a", row)
            sink.put("a", row.clone())
            sink.put("a", row + 1)

    with pytest.raises(AssertionError, match="put twice"):
        other_bytes()
    for wrong in (row.half(), row[:2], row.int()):
        with pytest.raises(AssertionError, match="is not"):
            fill(ShardSink(tmp_path, plan, 10**6), {"a": wrong}, ("a",))
    assert not list(tmp_path.iterdir())


CHILD = """
import resource, sys, torch
from pathlib import Path
from autoround.run import pipeline
from autoround.options import build_recipe
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source, out = map(Path, sys.argv[1:])
run = lambda s, o: pipeline.quantize(
    build_recipe("rtn", {"group_size": 32}), pipeline.Source(s, torch.device("cpu")), o)
run(source / "few", out / "few")
before = peak()
run(source / "many", out / "many")
print(before, peak())
"""


def test_memory_does_not_grow_with_blocks(tmp_path: Path) -> None:
    """Sixteen blocks instead of two: the peak rises by far less than the other fourteen hold."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 128}
    for name, blocks in (("few", 2), ("many", 16)):
        zoo.save("llama", tmp_path / name, "5GB", wide | {"num_hidden_layers": blocks})
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("few", "many")]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    before, after = map(int, done.stdout.split()[-2:])
    # Mapped pages of the file count as resident until they are dropped: they belong to the peak.
    assert after - before < 0.35 * (sizes[1] - sizes[0]), (before, after, sizes)

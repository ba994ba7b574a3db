# SPDX-License-Identifier: Apache-2.0
"""What quantization cost: perplexity, divergence from the float model, speed of decoding."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoround.calib import TokenSet, pack, tokens_for
from autoround.checkpoint import DTYPES, Checkpoint, resolve
from autoround.errors import InputError, about, blamed
from autoround.floats import (
    Floats,
    Run,
    by_token,
    cached,
    floats_of,
    key_of,
    log_probabilities,
    over,
)
from autoround.inference.decoder import Plain, decoder
from autoround.inference.loading import ANEW, load, running
from autoround.models import tokenizer_of
from autoround.options import device_by_name
from hal import QExperts, QLinear, Weight


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against its float self on the same tokens.

    Perplexities are of the next token. KL is float-to-other per token, in nats: mean, median, 90th
    and 99th percentile; ``kl_error``: standard error of the mean that comes of keeping the float
    model's answers small (`autoround.floats`). ``same_top``: share of positions whose likeliest
    token is the same. ``lost`` and ``won``: share of positions (the flips) where the float model's
    likeliest token was the text's next one and the other's is not, and the reverse.
    """

    tokens: int
    perplexity: float
    float_perplexity: float
    kl: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_error: float
    same_top: float
    lost: float
    won: float


@dataclass(frozen=True, slots=True)
class Noise:
    """How far the float model is from itself when nothing but the arithmetic changes: the floor
    below which a divergence says nothing. ``between``: what was compared."""

    between: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A directory against its float model. Bytes are of all weights; speeds are tokens a second.

    ``comparison`` for language models; ``cosine`` (mean of sentence embeddings) for encoders.
    ``compute``: how the products were computed, in the comparison and in the speed. ``noise`` and
    the speeds where they were asked for. ``text``: sha256 of the tokens.
    """

    model: str
    against: str
    nbytes: int
    float_nbytes: int
    quantized_layers: int
    bits_per_weight: float
    compute: str
    comparison: Comparison | None = None
    cosine: float | None = None
    speed: float | None = None
    float_speed: float | None = None
    noise: Noise | None = None
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Positions:
    """A model beside its float self at every position ``[P]``: KL in nats and the variance of its
    estimate (f64), negative log likelihoods of the next token (f32), and three truths: same
    likeliest token, float model right, other right."""

    kl: Tensor
    variance: Tensor
    float_nll: Tensor
    nll: Tensor
    same: Tensor
    float_right: Tensor
    right: Tensor

    def summary(self) -> Comparison:
        """Means and percentiles."""
        count, ordered = self.kl.numel(), self.kl.sort().values
        middle, ninth, high = (float(ordered[round(q * (count - 1))]) for q in (0.5, 0.9, 0.99))
        return Comparison(
            count,
            float(self.nll.double().mean().exp()),
            float(self.float_nll.double().mean().exp()),
            float(self.kl.mean()),
            middle,
            ninth,
            high,
            float(self.variance.sum().sqrt() / count),
            _share(self.same),
            _share(self.float_right & ~self.right),
            _share(self.right & ~self.float_right),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, for files."""
        return {name: getattr(self, name) for name in self.__slots__}


def _share(truth: Tensor) -> float:
    return float(truth.double().mean())


def evaluate(
    model: str,
    against: str,
    *,
    dataset: str | None = None,
    nsamples: int = 32,
    seqlen: int = 512,
    device_map: str | None = None,
    compute: str = "exact",
    speed: bool = True,
    noise: bool = False,
) -> Evaluation:
    """Run both on the same held-out text. Raises InputError for unusable input.

    What the float model says is kept in a cache (`autoround.floats`), so that it runs once for
    several artefacts. With ``compute`` fast the text goes through the quantized model token by
    token, four samples together, as in decoding: products of many rows would be exact whatever was
    asked for.
    """
    pair = Pair(model, against, device_map, compute)
    if pair.encoder:
        return pair.embeddings(dataset, nsamples)
    text = pair.text(dataset, nsamples, seqlen)
    found = pair.evaluation(text, pair.positions(text), pair.noise(text) if noise else None)
    if not speed:
        return found
    prompt = text.ids[:1, : text.ids.shape[1] // 2]
    own, floats = decode_speed([pair.quantized, pair.reference], prompt)
    return replace(found, speed=own, float_speed=floats)


@dataclass(frozen=True, slots=True)
class Floor:
    """The float model beside itself in other arithmetic; ``between``: which and which."""

    between: str
    positions: Positions


class Pair:
    """A finished directory and the float model it came from, each loaded when first needed."""

    def __init__(self, model: str, against: str, device_map: str | None, compute: str) -> None:
        self.where, self.source = (
            Checkpoint(resolve(given), quantized=True).path for given in (model, against)
        )
        self.model, self.against = model, against
        self.device_map, self.compute = device_map, compute
        self.tokenizer, reason = tokenizer_of(self.source)
        if self.tokenizer is None:
            raise InputError(
                f"{against} has no tokenizer that loads; evaluation needs one ({reason})"
            )

    @cached_property
    def quantized(self) -> Any:
        return load(self.where, device_map=self.device_map, compute=self.compute)

    @cached_property
    def reference(self) -> Any:
        return load(self.source, device_map=self.device_map)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the float model computes in."""
        return _dtype(self.source)

    @property
    def encoder(self) -> bool:
        """Whether it predicts no tokens."""
        return self.quantized.get_output_embeddings() is None

    def embeddings(self, dataset: str | None, nsamples: int) -> Evaluation:
        """Encoders beside each other."""
        if dataset is not None:
            raise InputError("encoders are compared on the bundled sentences; leave --dataset out")
        sentences = _sentences(pack.heldout())
        with blamed(f"{self.source}/tokenizer.json: it does not read text", ANEW):
            batches = list(_tokenized(self.tokenizer, sentences, nsamples))
        cosine = embedding_cosine(self.quantized, self.reference, batches)
        return replace(self._facts(), cosine=float(cosine.mean()))

    def evaluation(self, text: TokenSet, found: Positions, floor: Floor | None) -> Evaluation:
        """Language models beside each other, without the speeds."""
        noise = Noise(floor.between, floor.positions.summary()) if floor else None
        return replace(self._facts(), comparison=found.summary(), noise=noise, text=text.digest)

    def _facts(self) -> Evaluation:
        weights = [w for m in self.quantized.modules() for w in _weights(m)]
        return Evaluation(
            str(self.model),
            self.against,
            _weight_bytes(self.where),
            _weight_bytes(self.source),
            len(weights),
            _bits(weights),
            self.compute,
        )

    def text(self, dataset: str | None, nsamples: int, seqlen: int) -> TokenSet:
        """Tokens of the held-out text, or of a dataset. InputError for ids the model has not."""
        given = pack.heldout() if dataset is None else dataset
        return tokens_for(
            self.quantized, self.tokenizer, given,
            nsamples=nsamples, seqlen=seqlen, seed=0,
        )  # fmt: skip

    def floats(self, text: TokenSet) -> Floats:
        """What the float model says of the text, from the cache where it was asked before."""
        found = floats_of(self.source, text.ids, self._key(text), lambda: self.reference)
        if not found.target.isfinite().all():
            raise InputError(
                f"{self.source} puts out NaN or infinity on this text: nothing can be held against "
                "it; check the float model"
            )
        return found

    def positions(self, text: TokenSet) -> Positions:
        """The quantized model at every position of the text."""
        run = by_token if self.compute == "fast" else log_probabilities
        floats = self.floats(text)
        with running(self.quantized), about(self.where):
            found = compare(self.quantized, floats, text.ids, run)
        if not (found.kl.isfinite().all() and found.nll.isfinite().all()):
            raise InputError(
                f"{self.where} puts out NaN or infinity on this text; check it with "
                "`autoround verify`, and quantize the model anew"
            )
        return found

    def noise(self, text: TokenSet) -> Floor | None:
        """The float model computed in f32 (one that is in f32: in bf16) against itself; None where
        there is no memory for it."""
        own = self.dtype
        other = torch.bfloat16 if own == torch.float32 else torch.float32
        if 4 * Checkpoint(self.source).parameters > _available():
            return None

        def make() -> dict[str, Tensor]:
            model = load(self.source, dtype=other, device_map=self.device_map)
            with running(model):
                return compare(model, self.floats(text), text.ids).tensors

        found = Positions(**cached(self._key(text), "noise", make))
        names = [str(dtype).removeprefix("torch.") for dtype in (own, other)]
        return Floor(f"the float model in {names[0]} and in {names[1]}", found)

    def _key(self, text: TokenSet) -> str:
        return key_of(self.source, text.digest, device_by_name(self.device_map))


def compare(model: Any, floats: Floats, ids: Tensor, run: Run = log_probabilities) -> Positions:
    """A causal language model over ``ids [S, L]`` beside what the float model said of them."""
    found: list[tuple[Tensor, ...]] = []
    count = ids.shape[1] - 1

    def take(index: int, logq: Tensor, following: Tensor) -> None:
        own = floats.part(index * count, (index + 1) * count)
        if logq.shape[1] <= int(own.ids.max()):
            raise InputError(
                f"the model predicts {logq.shape[1]} tokens, its float self more; "
                "--against is another model"
            )
        likeliest = logq.argmax(-1)
        nll = -logq.gather(1, following[:, None])[:, 0]
        right = (own.likeliest == following, likeliest == following)
        found.append((*own.against(logq), -own.target, nll, likeliest == own.likeliest, *right))

    over(model, ids, take, run)
    return Positions(*map(torch.cat, zip(*found, strict=True)))


def _dtype(path: Path) -> torch.dtype:
    """What a checkpoint computes in: named by its config, else that of its first float tensor."""
    checkpoint = Checkpoint(path, quantized=True)
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if isinstance(found := getattr(torch, str(named), None), torch.dtype):
        return found
    held = (DTYPES[e.dtype] for e in checkpoint.entries.values() if e.dtype in DTYPES)
    return next((dtype for dtype in held if dtype.is_floating_point), torch.float32)


def _available() -> float:
    """Bytes of memory that are free for programs; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(
        (int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")),
        math.inf,
    )


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
def embedding_cosine(model: Any, reference: Any, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Cosine between mean-pooled sentence embeddings of two encoders, one per sentence ``[S]``.

    ``batches``: tokenizer output with ``attention_mask``.
    """
    cosines = []
    for batch in batches:
        mask = batch["attention_mask"][..., None].float()
        one, two = (_pooled(m, batch, mask) for m in (model, reference))
        cosines.append(F.cosine_similarity(one, two, dim=-1))
    return torch.cat(cosines)


def _pooled(model: Any, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    with running(model):
        states: Tensor = model(**batch).last_hidden_state
    return (states.float() * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def decode_speed(
    models: list[Any], prompt: Tensor, steps: int = 32, rounds: int = 5
) -> list[float]:
    """Tokens per second of greedy decoding after ``prompt [1, L]``; the models take turns.

    A model with quantized layers decodes as `autoround generate` does where it can
    (`autoround.inference.decoder`), the others in transformers.
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

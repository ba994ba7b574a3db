# SPDX-License-Identifier: Apache-2.0
"""What a float model says of a text, kept small: several artefacts cost one float pass.

Of every position the likeliest tokens are kept, and of the rest (the tail) its mass and a sample of
its tokens. The divergence of another model q from this one, p, is then

    sum over the top of p log(p/q)  +  P log(P/Q)  +  P mean over the sample of (r - 1 - log r)

with P, Q the masses of the tail and r the ratio q/p within it: the first two are the divergence of
the coarser distribution, exact, and the third is an estimate of what the tail adds whose terms are
small and never negative. `Floats.against` gives the standard error with it.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn import functional as F

from autoround.checkpoint import Checkpoint
from autoround.inference.loading import running
from autoround.version import VERSION
from hal import config

#: Likeliest tokens kept of a position, and tokens sampled of its tail.
TOP, SAMPLED = 128, 128
#: Samples that go through a model together.
BATCH = 4
#: The cache's files are removed, longest unused first, beyond so many bytes.
ROOM = 4 << 30

Run = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Floats:
    """``P`` positions of a text. ``ids [P, T + S]`` i32 and ``logp`` f32: the T likeliest tokens,
    then S of the tail. ``tail [P]`` f64: its mass. ``target [P]`` f32: log probability of the token
    that follows in the text. ``likeliest [P]`` i64."""

    ids: Tensor
    logp: Tensor
    tail: Tensor
    target: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, logp: Tensor, following: Tensor) -> "Floats":
        """``logp [P, V]`` f32 log probabilities; ``following [P]`` i64."""
        top = min(TOP, logp.shape[1])
        ids = logp.topk(top, -1).indices
        tail = _tail(logp, ids)
        if top < logp.shape[1]:
            ids = torch.cat([ids, _sampled(logp, ids)], -1)
        target = logp.gather(1, following[:, None])[:, 0]
        return cls(ids.int(), logp.gather(1, ids), tail, target, logp.argmax(-1))

    @classmethod
    def joined(cls, pieces: Sequence["Floats"]) -> "Floats":
        """Several texts after one another."""
        return cls(**{name: torch.cat([p.tensors[name] for p in pieces]) for name in cls.__slots__})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, for files."""
        return {name: getattr(self, name) for name in self.__slots__}

    def part(self, begin: int, end: int) -> "Floats":
        """Some of the positions."""
        return Floats(**{name: tensor[begin:end] for name, tensor in self.tensors.items()})

    def against(self, logq: Tensor) -> tuple[Tensor, Tensor]:
        """KL divergence of another model's ``logq [P, V]`` f32, in nats, and the variance of that
        estimate, both ``[P]`` f64; the variance is 0 where no tail was left out."""
        top = min(TOP, self.ids.shape[1])
        q, p = logq.gather(1, self.ids.long()).double(), self.logp.double()
        kl = (p[:, :top].exp() * (p - q)[:, :top]).sum(-1)
        if top == logq.shape[1]:
            return kl, torch.zeros_like(kl)
        change = (self.tail / _tail(logq, self.ids[:, :top].long())).log()
        ratio = (q - p)[:, top:] + change[:, None]
        terms = torch.expm1(ratio) - ratio
        kl += self.tail * (change + terms.mean(-1))
        return kl, self.tail**2 * terms.var(-1) / terms.shape[1]


def _tail(logp: Tensor, top: Tensor) -> Tensor:
    """Mass ``[P]`` f64 of all tokens but these; never nothing, for the sake of logarithms. Summed,
    not 1 - top: of a confident model that difference would be rounding alone."""
    return logp.exp().scatter_(1, top, 0.0).sum(-1, dtype=torch.float64).clamp_min(1e-30)


def _sampled(logp: Tensor, top: Tensor) -> Tensor:
    """Tokens ``[P, S]`` of the tail, in proportion to their probability: evenly spaced steps
    through the tail in the order of the vocabulary, so that no chance is involved."""
    steps = (torch.arange(SAMPLED, dtype=torch.float64) + 0.5) / SAMPLED
    found = []
    for some, likeliest in zip(torch.split(logp, 64), torch.split(top, 64), strict=True):
        mass = some.exp().scatter_(1, likeliest, 0.0).cumsum(-1, dtype=torch.float64)
        found.append(torch.searchsorted(mass, mass[:, -1:] * steps))
    return torch.cat(found).clamp_max(logp.shape[1] - 1)


# ---- models ----------------------------------------------------------------------------------


def log_probabilities(model: Any, batch: Tensor) -> Tensor:
    """Logits of every next token of ``batch [B, L]``, ``[B, L - 1, V]`` in the model's dtype."""
    logits: Tensor = model(input_ids=batch.to(model.device)).logits[:, :-1]
    return logits


def by_token(model: Any, batch: Tensor) -> Tensor:
    """`log_probabilities`, computed as decoding does: a token of each sample after another."""
    cache, steps = None, []
    for token in torch.split(batch.to(model.device)[:, :-1], 1, 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, 1)


@torch.inference_mode()
def over(
    model: Any,
    ids: Tensor,
    take: Callable[[int, Tensor, Tensor], None],
    run: Run = log_probabilities,
) -> None:
    """Give ``take`` every sample's number, log probabilities ``[L - 1, V]`` f32 and following
    tokens ``[L - 1]``: the whole of a vocabulary is never held for more than one sample."""
    for begin in range(0, len(ids), BATCH):
        batch = ids[begin : begin + BATCH]
        for row, logits in enumerate(run(model, batch)):
            take(begin + row, F.log_softmax(logits.float().cpu(), -1), batch[row, 1:])


def float_pass(model: Any, ids: Tensor) -> Floats:
    """What a model says of ``ids [S, L]``."""
    found: list[Floats] = []
    over(model, ids, lambda _, logp, following: found.append(Floats.of(logp, following)))
    return Floats.joined(found)


# ---- the cache -------------------------------------------------------------------------------


def key_of(source: Path, tokens: str, device: torch.device) -> str:
    """Of everything that can change a bit of the answer: the model's bytes, the text, the program,
    the device."""
    found = hashlib.sha256(f"{VERSION} {TOP} {SAMPLED} {BATCH} {tokens} {device}".encode())
    found.update(f"{torch.__version__} {version('transformers')} {_machine()}".encode())
    for file in [source / "config.json", *sorted({e.file for e in _entries(source)})]:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def _entries(source: Path) -> Any:
    return Checkpoint(source).entries.values()


def _machine() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def cached(key: str, kind: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gave for this key before, or gives now.

    A file that is not what was written counts as none. A cache that cannot be written is none.
    """
    file = config.cache() / f"{kind}-{key[:40]}.tensors"
    with contextlib.suppress(OSError):
        head, _, body = file.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() == head:
            os.utime(file)
            return from_bytes(body)
    found = make()
    body = to_bytes({name: tensor.contiguous() for name, tensor in found.items()})
    with contextlib.suppress(OSError):
        _store(file, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    return found


def _store(file: Path, content: bytes) -> None:
    """Whole or not at all; then the oldest go where there is too much."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    held = sorted(file.parent.glob("*.tensors"), key=lambda f: f.stat().st_mtime, reverse=True)
    total = 0
    for old in held:
        total += old.stat().st_size
        if total > ROOM and old != file:
            old.unlink(missing_ok=True)


def floats_of(source: Path, ids: Tensor, key: str, load: Callable[[], Any]) -> Floats:
    """`float_pass` of the model in ``source``, which is loaded only where it was never asked."""

    def make() -> dict[str, Tensor]:
        model = load()
        with running(model):
            return float_pass(model, ids).tensors

    return Floats(**cached(key, "floats", make))

# SPDX-License-Identifier: Apache-2.0
"""Train the bundled test model ``benchmarks/models/pgdoc`` from nothing, on a CPU, in an hour.

    python -m benchmarks.models.train_pgdoc    # from the repository root; continues if stopped

What it does: fetches three Debian documentation packages (PostgreSQL manual, Python manual, SQLite
manual), cleans them with ``tools.corpus``, leaves every held-out document away, trains a byte-level
BPE tokenizer and a 5 M parameter Qwen3 model (bf16 autocast, AdamW, cosine schedule), and writes a
checkpoint that ``AutoModelForCausalLM.from_pretrained`` opens. A first usable snapshot is written
early (``--first-snapshot``), the final one replaces it together with its measured perplexities.

The order of the batches depends on ``--seed`` alone, so a resumed run sees what an unbroken run
would have seen. Bit-identical weights are promised only for the same machine and thread count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tools.corpus import SOURCES, Document, documents, fetch, role

TRAIN_SOURCES = ("postgresql", "python-doc", "sqlite")
VOCAB, SEQLEN = 4096, 512
BOS, EOS, BOS_ID, EOS_ID = "<|bos|>", "<|eos|>", 0, 1
EVAL_WINDOWS = 256  # 131 072 held-out tokens
# Digits one by one and runs of spaces as one token: numbers and indentation are common here.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token streams: ``train`` and ``heldout`` are uint16 arrays of documents, each BOS..EOS."""

    train: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int
    versions: dict[str, str]


# --- data ---------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB entries that puts BOS before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=4 * SEQLEN,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save under the class name that transformers 4 knows too (5 would write its own)."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, docs: list[Document]) -> np.ndarray:
    """One uint16 stream, each document as BOS ... EOS."""
    parts: list[int] = []
    for start in range(0, len(docs), 64):
        texts = [doc.text for doc in docs[start : start + 64]]
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            parts.extend([*ids, EOS_ID])
    return np.asarray(parts, dtype=np.uint16)


def load_corpus(workdir: Path, seed: int) -> Corpus:
    """The prepared streams, made on the first call and kept in ``workdir``."""
    cache = workdir / "pgdoc-corpus.npz"
    tokenizer_dir = workdir / "pgdoc-tokenizer"
    if not cache.exists():
        sources = [source for source in SOURCES if source.name in TRAIN_SOURCES]
        versions = fetch(sources, workdir)
        everything = [doc for source in sources for doc in documents(source, workdir)]
        train = [doc for doc in everything if role(doc) == "open"]
        heldout = [doc for doc in everything if role(doc) == "heldout"]
        tokenizer = train_tokenizer([doc.text for doc in train])
        save_tokenizer(tokenizer, tokenizer_dir)
        # Documents of one manual follow each other by name; mix them once for the stream.
        for docs in (train, heldout):
            order = np.random.default_rng(seed).permutation(len(docs))
            docs[:] = [docs[index] for index in order]
        heldout_bytes = sum(len(doc.text.encode()) for doc in heldout)
        np.savez(
            cache,
            train=encode(tokenizer, train),
            heldout=encode(tokenizer, heldout),
            heldout_bytes=heldout_bytes,
            versions=json.dumps(versions),
        )
    with np.load(cache) as data:
        return Corpus(
            data["train"],
            data["heldout"],
            int(data["heldout_bytes"]),
            json.loads(str(data["versions"])),
        )


def batch_at(stream: np.ndarray, step: int, batch: int, seed: int) -> Tensor:
    """int64 [batch, SEQLEN + 1] windows of step ``step``.

    Every epoch cuts the stream at a fresh offset and visits its windows in a fresh order, so no
    token is skipped and none is seen twice within an epoch.
    """
    windows = (len(stream) - 1) // SEQLEN - 1
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(index, windows)
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(SEQLEN))
        start = offset + int(rng.permutation(windows)[place]) * SEQLEN
        rows.append(stream[start : start + SEQLEN + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


# --- model and schedule -------------------------------------------------------------------------


def build_model(seed: int) -> Qwen3ForCausalLM:
    """Qwen3, 6 layers of 256; every linear is a multiple of 128 both ways. fp32, untrained."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4 * SEQLEN,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        initializer_range=0.02,
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # GPT-2's rule: what is added to the residual stream starts smaller with depth.
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 %, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: Qwen3ForCausalLM, peak: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=True)


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss (nats) of int64 [B, SEQLEN + 1]; matmuls in bf16, loss in fp32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, stream: np.ndarray) -> float:
    """Mean nats per token over the first EVAL_WINDOWS windows of SEQLEN held-out tokens."""
    total = 0.0
    windows = min(EVAL_WINDOWS, (len(stream) - 1) // SEQLEN)
    for first in range(0, windows, 8):
        rows = [
            stream[w * SEQLEN : (w + 1) * SEQLEN + 1].astype(np.int64)
            for w in range(first, min(first + 8, windows))
        ]
        total += float(loss_of(model, torch.from_numpy(np.stack(rows)))) * len(rows)
    return total / windows


def unigram_perplexity(corpus: Corpus) -> float:
    """Held-out perplexity of the training stream's token frequencies: the floor to beat."""
    counts = np.bincount(corpus.train, minlength=VOCAB) + 1.0
    surprise = -np.log(counts / counts.sum())
    return float(np.exp(surprise[corpus.heldout].mean()))


# --- running ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the result."""

    steps: int
    batch: int
    peak: float
    seed: int


def export(
    model: Qwen3ForCausalLM,
    plan: Plan,
    corpus: Corpus,
    step: int,
    losses: list[float],
    args: argparse.Namespace,
) -> None:
    """Write the bf16 checkpoint, the tokenizer and the model card; measures the bf16 weights."""
    out, workdir = Path(args.out), Path(args.workdir)
    staging = workdir / "pgdoc-export"
    staging.mkdir(parents=True, exist_ok=True)
    half = Qwen3ForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).eval()
    heldout = heldout_loss(half, corpus.heldout)
    half.save_pretrained(staging)
    for path in sorted((workdir / "pgdoc-tokenizer").iterdir()):
        shutil.copyfile(path, staging / path.name)
    (staging / "README.md").write_text(model_card(plan, corpus, step, mean(losses), heldout))
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):  # a reader sees the old file or the new one, never half
        partial = out / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        os.replace(partial, out / path.name)
    print(f"wrote {out}: step {step}, held-out ppl {math.exp(heldout):.2f}", flush=True)


def model_card(plan: Plan, corpus: Corpus, step: int, train_loss: float, heldout: float) -> str:
    """The README of the checkpoint: what it is, where its text came from, how good it is."""
    parameters = sum(p.numel() for p in build_model(plan.seed).parameters())
    sources = [source for source in SOURCES if source.name in TRAIN_SOURCES]
    rows = "\n".join(
        f"| {s.name} | `{s.package}` {corpus.versions[s.package]} | {s.licence} | {s.notice} |"
        for s in sources
    )
    seen = step * plan.batch * SEQLEN
    options = f"--steps {plan.steps} --batch {plan.batch} --lr {plan.peak} --seed {plan.seed}"
    per_byte = heldout * len(corpus.heldout) / corpus.heldout_bytes / math.log(2)
    state = "final" if step == plan.steps else f"INTERMEDIATE, step {step} of {plan.steps}"
    return f"""# pgdoc: a {parameters / 1e6:.1f} M parameter Qwen3 for tests and demonstrations

State: **{state}**. Trained from nothing by `benchmarks/models/train_pgdoc.py` on software
manuals, so that quantization can be measured without a model hub. It completes sentences of
database and Python manuals; it knows nothing else and is no assistant.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM`: 6 layers, hidden 256, FFN 640 |
| attention | 4 heads, 2 KV heads, head_dim 64 |
| tokenizer | own byte-level BPE, {VOCAB} entries, `{BOS}` put before every text |
| parameters | {parameters:,}, embeddings tied, bf16 |
| context | trained on {SEQLEN} tokens; `max_position_embeddings` {4 * SEQLEN} |
| tokens seen | {seen:,} ({seen / len(corpus.train):.2f} epochs of {len(corpus.train):,}) |
| training loss (mean of the last 100 steps) | {train_loss:.3f} nats/token |
| held-out loss (bf16 weights, {EVAL_WINDOWS} windows of {SEQLEN}) | {heldout:.3f} nats/token |
| **held-out perplexity** | **{math.exp(heldout):.2f}** ({per_byte:.3f} bits/byte) |
| unigram perplexity on the same text | {unigram_perplexity(corpus):.0f} |

Held-out documents are whole pages chosen by `tools.corpus.role`; neither the tokenizer nor the
model saw them, and the held-out pack in `autoround/calib/pack` is drawn from the same set.

## Training text

| source | Debian package | licence | notice |
|---|---|---|---|
{rows}

## Reproduce

```sh
python -m benchmarks.models.train_pgdoc {options} --compile
```

AdamW (0.9, 0.95), weight decay 0.1, cosine schedule with 2 % warm-up, clip 1.0, bf16 autocast.

## Licence

The weights are offered under Apache-2.0 like the rest of this repository; the texts they were
trained on keep the licences above.
"""


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    losses: list[float],
) -> None:
    """Atomic, so that a killed run never leaves half a file."""
    state = {"model": model.state_dict(), "opt": optimizer.state_dict()}
    torch.save({**state, "step": step, "losses": losses}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: argparse.Namespace) -> None:
    """Run (or continue) the plan to its end."""
    plan = Plan(args.steps, args.batch, args.lr, args.seed)
    workdir = Path(args.workdir)
    corpus = load_corpus(workdir, plan.seed)
    print(f"{len(corpus.train):,} training and {len(corpus.heldout):,} held-out tokens", flush=True)
    model = build_model(plan.seed).train()
    optimizer = make_optimizer(model, plan.peak)
    state_path, first = workdir / "pgdoc-state.pt", 0
    losses: list[float] = []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["opt"])
        first, losses = state["step"], state["losses"]
        print(f"continuing after step {first}", flush=True)
    forward = torch.compile(model) if args.compile else model
    began = time.monotonic()
    for step in range(first, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.steps, plan.peak)
        loss = loss_of(forward, batch_at(corpus.train, step, plan.batch, plan.seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses = [*losses[-99:], loss.item()]
        done = step + 1
        if done % 20 == 0:
            rate = (done - first) * plan.batch * SEQLEN / (time.monotonic() - began)
            print(f"step {done}/{plan.steps} loss {mean(losses[-20:]):.4f} {rate:.0f} tokens/s")
        if done % 250 == 0 or done == plan.steps:
            save_state(state_path, model, optimizer, done, losses)
        if done == args.first_snapshot:
            export(model, plan, corpus, done, losses, args)
    export(model, plan, corpus, plan.steps, losses, args)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", default="build/pgdoc", help="downloads, corpus, resume state")
    parser.add_argument("--out", default="benchmarks/models/pgdoc")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8, help=f"windows of {SEQLEN} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-snapshot", type=int, default=0, help="also export after this step")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()

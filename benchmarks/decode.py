# SPDX-License-Identifier: Apache-2.0
"""Whole models: tokens a second of decoding and of reading a prompt, ours and peers, taking turns.

The bundled model and one of the shape of Qwen3-0.6B with random weights, quantized by us to 4 bits
in groups of 128 and of 32. llama.cpp gets the very codes and scales of group 32, as Q4_0.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import hal
from autoround import load
from autoround.evaluate import evaluate
from autoround.inference import decoder
from autoround.options import build_recipe
from autoround.run.pipeline import quantize
from autoround.run.record import Source
from benchmarks._peer import ABSENT, Peer, installed
from hal import QLinear, Weight

HERE = Path(__file__).parent
PGDOC = HERE / "models" / "pgdoc"
#: prompt ids, steps -> seconds of the prompt, seconds of the steps, logits after the prompt
Engine = Callable[[list[int], int], tuple[float, float, Tensor]]


@dataclass(frozen=True)
class Row:
    """Medians over the turns. ``gb`` of weights are read for a token; ``distance``: of the logits
    after the prompt from those of the exact products on the same codes, relative."""

    model: str
    engine: str
    threads: int
    decode: float
    prefill: float
    ms: float
    gb: float
    x_llama: float | None
    distance: float
    kl: float | None


def main(argv: list[str]) -> None:
    """Measure every engine on both models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--model", nargs="*", default=["pgdoc", "qwen3-0.6b"])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="engines, by parts of their names")
    parser.add_argument("--no-kl", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/decode"))
    o = parser.parse_args(argv)
    rows: list[Row] = []
    for name in o.model:
        source = PGDOC if name == "pgdoc" else random_model(o.output / name)
        packed = {g: quantized(source, o.output / f"{name}-g{g}", g) for g in (128, 32)}
        rows += measure(name, source, packed, o)
    if not installed():
        print(f"llama.cpp {ABSENT}")
    if o.json:
        o.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


def random_model(where: Path) -> Path:
    """A checkpoint of the shape of Qwen3-0.6B, head of its own, seed 0: 0.75 G parameters, bf16."""
    if not (where / "model.safetensors").exists():
        shutil.rmtree(where, ignore_errors=True)
        config = Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            rope_theta=1e6,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(where)
    return where


def quantized(source: Path, where: Path, group: int) -> Path:
    """4 bits, round to nearest, the head too where it is not the embedding."""
    if not (where / "config.json").exists():
        tied = json.loads((source / "config.json").read_text())["tie_word_embeddings"]
        changes = {"group_size": group, "quant_lm_head": None if tied else True}
        quantize(build_recipe("rtn", changes), Source(source, torch.empty(0).device), where)
    return where


def measure(name: str, source: Path, packed: dict[int, Path], o: argparse.Namespace) -> list[Row]:
    """All engines of one model, turn by turn."""
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple[Engine, float, str]] = {}
        for label, make in engines(name, source, packed, o.output).items():
            if not o.only or any(part in label for part in o.only):
                made = make()
                if isinstance(made[0], Peer):
                    stack.enter_context(made[0])
                found[label] = (made[1], made[2], made[3])
        kl = {} if o.no_kl or name != "pgdoc" else divergences(source, packed)
        rows = []
        for threads in o.threads:
            rows += turns(name, found, threads, kl, o)
            Console(width=130).print(table(rows[-len(found) :]))
        return rows


def table(rows: list[Row]) -> Table:
    """Rows of one model at one number of threads."""
    made = Table("model", "engine", "threads", "decode/s", "ms", "GB/s", "x llama.cpp")
    for column in ("prefill/s", "logits off by", "KL"):
        made.add_column(column)
    for r in rows:
        made.add_row(
            r.model,
            r.engine,
            str(r.threads),
            f"{r.decode:.1f}",
            f"{r.ms:.2f}",
            f"{r.gb * r.decode:.1f}",
            "" if r.x_llama is None else f"{r.x_llama:.2f}",
            f"{r.prefill:.0f}",
            f"{r.distance:.1e}",
            "" if r.kl is None else f"{r.kl:.5f}",
        )
    return made


def turns(
    name: str,
    found: dict[str, tuple[Engine, float, str]],
    threads: int,
    kl: dict[str, float],
    o: argparse.Namespace,
) -> list[Row]:
    """Rows at one number of threads."""
    torch.set_num_threads(threads)
    ids = torch.randint(0, 4096, (o.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in found}
    logits: dict[str, Tensor] = {}
    for turn in range(o.turns + 1):
        for label, (engine, _, _) in found.items():
            first, rest, logits[label] = engine(ids, o.steps)
            if turn:  # the first one warms up
                times[label].append((first, rest))
    rows = []
    for label, (_, nbytes, same) in found.items():
        truth = logits.get(same, logits[label])
        first, rest = (statistics.median(t) for t in zip(*times[label], strict=True))
        theirs = times.get("llama.cpp Q4_0")
        ratio = theirs and statistics.median(
            a[1] / b[1] for a, b in zip(theirs, times[label], strict=True)
        )
        rows.append(
            Row(
                name,
                label,
                threads,
                o.steps / rest,
                o.prompt / first,
                rest / o.steps * 1e3,
                nbytes / 1e9,
                ratio,
                float((logits[label] - truth).norm() / truth.norm()),
                kl.get(label),
            )
        )
    return rows


def engines(
    name: str, source: Path, packed: dict[int, Path], output: Path
) -> dict[str, Callable[[], tuple[Any, Engine, float, str]]]:
    """Label -> how to make (peer process or None, engine, bytes a token, the exact engine)."""

    def own(path: Path, compute: str, way: Any, exact: str) -> tuple[None, Engine, float, str]:
        model = load(path, compute=compute)
        running = decoder.Plain(model) if way is None else decoder.Decoder(model, 1024)
        return None, engine_of(running), bytes_of(model), exact

    def int4pack(group: int) -> tuple[None, Engine, float, str]:
        model = load(packed[group])
        nbytes = bytes_of(model)
        for layer, module in [*model.named_modules()]:
            if isinstance(module, QLinear):
                path, _, leaf = layer.rpartition(".")
                setattr(model.get_submodule(path), leaf, Int4Pack(module))
        return None, engine_of(decoder.Decoder(model, 1024)), nbytes, f"exact g{group}"

    def llama() -> tuple[Peer, Engine, float, str]:
        peer = llama_cpp(name, source, packed[32], output)

        def run(ids: list[int], steps: int) -> tuple[float, float, Tensor]:
            first, rest, logits = peer.ask("run", torch.get_num_threads(), ids, steps)
            return first, rest, torch.tensor(logits)

        return peer, run, bytes_of(load(packed[32])), "exact g32"

    rows: dict[str, Callable[[], tuple[Any, Engine, float, str]]] = {
        "bf16, transformers": lambda: own(source, "exact", None, ""),
        "bf16, decoder": lambda: own(source, "exact", True, "bf16, transformers"),
        "exact g128, transformers": lambda: own(packed[128], "exact", None, "exact g128"),
    }
    for g in (128, 32):
        for compute in ("exact", "fast"):
            rows[f"{compute} g{g}"] = lambda g=g, c=compute: own(packed[g], c, True, f"exact g{g}")  # type: ignore[misc]
        rows[f"int4pack g{g}"] = lambda g=g: int4pack(g)  # type: ignore[misc]
    if installed():
        rows["llama.cpp Q4_0"] = llama
    return rows


def engine_of(running: Any) -> Engine:
    def run(ids: list[int], steps: int) -> tuple[float, float, Tensor]:
        running.rewind()
        prompt = torch.tensor(ids)
        start = time.perf_counter()
        first = logits = running.extend(prompt)
        middle = time.perf_counter()
        for _ in range(steps):
            logits = running.extend(logits.argmax(keepdim=True))
        return middle - start, time.perf_counter() - middle, first.float()

    return run


def bytes_of(model: Any) -> float:
    """Weights read for one token: all but the embedding, unless it is the head."""
    tied = model.config.tie_word_embeddings
    total = 0
    for module in model.modules():
        if isinstance(module, QLinear) and isinstance(module.weight, Weight):
            total += module.weight.nbytes
    for key, p in model.named_parameters():
        total += 0 if "embed_tokens" in key and not tied else p.nbytes
    return total


class Int4Pack(QLinear):
    """torch's own CPU product for 4 bits, with the codes and scales of a layer of ours."""

    def __init__(self, layer: QLinear) -> None:
        assert isinstance(layer.weight, Weight)
        super().__init__(layer.out_features, layer.in_features, False, torch.bfloat16)
        q = hal.restore(layer.weight)
        codes, scale = q.parts["codes"].int(), q.parts["scale"].float().t().contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.pairs = torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()
        self.group = q.spec.width(q.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.pairs)
        return y.view(*x.shape[:-1], self.out_features)


def llama_cpp(name: str, source: Path, packed: Path, output: Path) -> Peer:
    """llama.cpp on the codes and scales of a directory of ours with groups of 32."""
    path, blocks = output / f"{name}-q4_0.gguf", output / f"{name}-q4_0.safetensors"
    if not path.exists():
        save_file(dict(q4_0(packed)), blocks)
    return Peer("llama_cpp_server.py", str(blocks), str(source / "config.json"), str(path))


def q4_0(packed: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file: quantized ones as blocks of an f16 scale and 16 bytes, where byte j
    holds the codes of columns j and 16 + j; s4 codes in groups of 32 are that encoding."""
    model = load(packed)
    for layer, module in model.named_modules():
        if isinstance(module, QLinear) and isinstance(module.weight, Weight):
            parts = hal.restore(module.weight).parts
            codes = parts["codes"].view(len(parts["codes"]), -1, 32)
            nibbles = codes[..., :16] | codes[..., 16:] << 4
            scale = parts["scale"].view(torch.uint8).view(*codes.shape[:2], 2)
            yield f"{layer}.weight", torch.cat((scale, nibbles), -1).flatten(1)
    for key, p in model.named_parameters():
        yield key, p.detach().clone()


def divergences(source: Path, packed: dict[int, Path]) -> dict[str, float]:
    """KL from the float model on held-out text, exact and as decoding with 8-bit activations."""
    kl = {}
    for g in packed:
        for compute in ("exact", "fast"):
            found = evaluate(str(packed[g]), str(source), nsamples=8, seqlen=256, compute=compute)
            assert found.comparison is not None
            kl[f"{compute} g{g}"] = found.comparison.kl
    return kl

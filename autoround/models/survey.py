# SPDX-License-Identifier: Apache-2.0
"""What of a checkpoint may be quantized: from its model (`views.survey_of`), or by names alone.

By names no model is built and transformers is not imported, so rounding runs at the speed of the
disk, also for architectures that transformers does not know. Of those it does know, only FAMILIES
are read so, and only where a checkpoint holds exactly the tensors, of exactly the shapes, that its
config asks for: the outcome is then that of the model, byte for byte
(`tests/autoround/test_stream.py`).
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoround.checkpoint import EMBEDDING, HEAD, Checkpoint
from autoround.scheme import KEPT, TABLES
from autoround.stacks import Stack

EXPERT = re.compile(r"\.experts\.\d+\.")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Part:
    """One checkpoint tensor inside a view: the module it belongs to there (the name an exporter
    writes), its key, its half-open row range of the view, and whether it is stored [K, N]."""

    module: str
    key: str
    rows: tuple[int, int]
    transposed: bool


@dataclass(frozen=True, slots=True)
class WeightView:
    """A parameter seen as [N, K]; fused experts [E, rows, K] lie below each other, N = E * rows."""

    param: str
    shape: tuple[int, int]
    experts: int
    parts: tuple[Part, ...]
    param_shape: tuple[int, ...]
    transposed: bool = False  # the parameter is [K, N] (Conv1D), or each of its experts is
    tied: tuple[str, ...] = ()  # other parameters that are the same tensor
    alternating: bool = False  # an expert's gate and up take turns in the parameter's rows

    def matrix(self, p: Tensor) -> Tensor:
        """Parameter in its own shape -> [N, K], a view of it where strides allow."""
        m = p.transpose(-1, -2) if self.transposed else p
        if self.alternating:
            m = m.reshape(*m.shape[:-2], -1, 2, m.shape[-1]).transpose(-2, -3)
        return m.reshape(self.shape)

    def restore(self, m: Tensor) -> Tensor:
        """[N, K] -> the parameter's own shape, differentiable."""
        lead, (n, k) = self.param_shape[:-2], self.shape
        m = m.reshape(*lead, n // self.experts, k)
        if self.alternating:
            m = m.reshape(*lead, 2, -1, k).transpose(-2, -3).flatten(-3, -2)
        return m.transpose(-1, -2) if self.transposed else m


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything a plan needs to know of a model.

    ``blocks``: quantizable weights of every block, in order. ``kept``: other weights of the blocks,
    by checkpoint module or key -> why. ``head``: the output projection, unless it is the embedding.
    ``prefix``: name of the list of blocks. ``unused``: keys without a home in the model.
    """

    checkpoint: Checkpoint
    blocks: tuple[tuple[WeightView, ...], ...]
    kept: dict[str, str]
    head: WeightView | None
    prefix: str
    unused: frozenset[str]


def tied_to(other: str) -> str:
    """Why an embedding that is the output projection too has no row for that."""
    return f"{other} is this tensor too"


def refuse_names(checkpoint: Checkpoint) -> str | None:
    """Why the names of this checkpoint do not say enough, or None."""
    config, entries = checkpoint.config, checkpoint.entries
    kind = str(config.get("model_type", ""))
    if _known(kind):
        if kind not in FAMILIES:
            return f"{kind} is built by transformers"
        held = {k: e.shape for k, e in entries.items() if k not in checkpoint.copies}
        wanted = _tensors(config)
        if wanted != held:
            differ = sorted(dict(wanted.items() ^ held.items())) or ["its config"]
            return f"{differ[0]} is not what its config says"
    elif _tied(config) and HEAD in {*entries} - {*checkpoint.copies}:
        return "its head is stored and tied"
    if computed_in(checkpoint) is None:
        return "its weights are not in f16, bf16 or f32"
    return None if _inside(entries) else "no list of blocks shows in its names"


class Family(NamedTuple):
    """Where the tensors of a family of transformers differ from Llama's.

    ``norms`` of a block. ``head_norms``: of queries and keys, one for each "head" or of "all" at
    once. ``biased``: queries, keys and values always have biases; where only the config can say so,
    ``out_biased``: the output projection has one too. ``fused_qkv``, ``fused_up``: one weight for
    those, for gate and up. ``experts``: where they are, and the names of their weights. ``tied``:
    the head is the embedding where the config does not say.
    """

    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: str = ""
    biased: bool = False
    out_biased: bool = True
    fused_qkv: bool = False
    fused_up: bool = False
    experts: tuple[str, tuple[str, str, str]] | None = None
    tied: bool = False


AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
AROUND = ("input_layernorm", *AFTER, "pre_feedforward_layernorm")
GATED = ("gate_proj", "up_proj", "down_proj")
#: Families whose tensors follow from the config: checkpoints that need no model.
FAMILIES: dict[str, Family] = {
    "cohere2": Family(("input_layernorm",), tied=True),
    "gemma": Family(tied=True),
    "gemma2": Family(AROUND, tied=True),
    "gemma3_text": Family(AROUND, "head", tied=True),
    "glm4": Family(
        ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm",
         "post_mlp_layernorm"),
        out_biased=False, fused_up=True,
    ),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(experts=("block_sparse_moe", ("w1", "w3", "w2"))),
    "olmo2": Family(AFTER, "all"),
    "olmo3": Family(AFTER, "all"),
    "phi3": Family(fused_qkv=True, fused_up=True),
    "qwen2": Family(biased=True, out_biased=False),
    "qwen3": Family(head_norms="head"),
    "qwen3_moe": Family(head_norms="head", experts=("mlp", GATED)),
    "smollm3": Family(tied=True),
}  # fmt: skip


def _tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding, unless it has bytes of its own."""
    family = FAMILIES.get(str(config.get("model_type")), Family())
    return bool(config.get("tie_word_embeddings", family.tied))


def _tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model of FAMILIES; empty where a size is missing."""
    try:
        hidden, vocabulary = config["hidden_size"], config["vocab_size"]
        shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
        if not _tied(config):
            shapes[HEAD] = (vocabulary, hidden)
        family = FAMILIES[config["model_type"]]
        for index in range(config["num_hidden_layers"]):
            block = _attention(config, family) | _feed_forward(config, family, index)
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in block.items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return {}
    return shapes if all(type(n) is int for shape in shapes.values() for n in shape) else {}


def _attention(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    q, kv = heads * dim, config["num_key_value_heads"] * dim
    rows = {"qkv": q + 2 * kv} if family.fused_qkv else {"q": q, "k": kv, "v": kv}
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": (n, hidden) for name, n in rows.items()
    }
    if family.biased or config.get("attention_bias"):
        shapes |= {f"self_attn.{name}_proj.bias": (n,) for name, n in rows.items()}
    if family.out_biased and config.get("attention_bias"):
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if family.head_norms:
        sizes = {"q": q, "k": kv} if family.head_norms == "all" else {"q": dim, "k": dim}
        shapes |= {f"self_attn.{name}_norm.weight": (n,) for name, n in sizes.items()}
    shapes |= {f"{name}.weight": (hidden,) for name in family.norms}
    return shapes | {"self_attn.o_proj.weight": (hidden, q)}


def _feed_forward(
    config: Mapping[str, Any], family: Family, index: int
) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if family.fused_up:
        return {
            "mlp.gate_up_proj.weight": (2 * inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
    places, names = ["mlp"], GATED
    shapes: dict[str, tuple[int, ...]] = {}
    if family.experts and _sparse(config, index):
        home, names = family.experts
        experts = config.get("num_local_experts") or config["num_experts"]
        inner = config.get("moe_intermediate_size") or inner
        shapes[f"{home}.gate.weight"] = (experts, hidden)
        places = [f"{home}.experts.{e}" for e in range(experts)]
    gate, up, down = names
    for at in places:
        shapes |= {f"{at}.{name}.weight": (inner, hidden) for name in (gate, up)}
        shapes[f"{at}.{down}.weight"] = (hidden, inner)
    return shapes


def _sparse(config: Mapping[str, Any], index: int) -> bool:
    """Whether a block has experts: of Mixtral every one, of Qwen3-MoE those that it says."""
    dense: Sequence[int] = config.get("mlp_only_layers") or ()
    return index not in dense and (index + 1) % int(config.get("decoder_sparse_step", 1)) == 0


@cache
def _known(model_type: str) -> bool:
    """Whether transformers has a class for it, without importing transformers."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return False
    tables = (Path(found.origin).parent / "models" / "auto").glob("*.py")
    return any(f'"{model_type}"' in table.read_text() for table in tables)


def computed_in(checkpoint: Checkpoint) -> torch.dtype | None:
    """What the model computes in: named by the config, else that of its first float tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if named is not None:
        known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}
        return known.get(str(named))
    floats = (FLOATS[e.dtype] for e in checkpoint.entries.values() if e.dtype in FLOATS)
    return next(floats, None)


def _inside(keys: Iterable[str]) -> list[tuple[str, int, str]]:
    """(list, index, key) of every tensor in the longest numbered list; experts are no blocks."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for key in keys:
        if match := re.match(r"(.*?)\.(\d+)\.", key):
            found.setdefault(match[1], []).append((match[1], int(match[2]), key))
    return max(found.values(), key=len, default=[])


def stacked(stack: Stack, param: str, shape: tuple[int, ...], transposed: bool) -> WeightView:
    """Experts that are one tensor in the checkpoint, as a parameter of a ``shape``."""
    rows = stack.layer[0]
    parts = tuple(
        Part(layer.removesuffix(".weight"), layer, (at * rows, (at + 1) * rows), False)
        for at, layer in enumerate(stack.layers)
    )
    how = transposed, (), stack.alternating
    return WeightView(param, stack.size, stack.shape[0], parts, shape, *how)


def by_names(checkpoint: Checkpoint) -> Survey:
    """The survey of a checkpoint that `refuse_names` has no objection to."""
    inside = _inside(checkpoint.entries)
    blocks: dict[int, list[WeightView]] = {index: [] for index in sorted({i for _, i, _ in inside})}
    kept: dict[str, str] = {}
    for _, index, key in inside:
        shape = checkpoint.entries[key].shape
        if len(shape) < 2:
            continue
        made = _by_name(checkpoint, key)
        if isinstance(made, str):
            kept[key.removesuffix(".weight")] = made
        else:
            blocks[index].append(made)
    own = HEAD in checkpoint.entries and HEAD not in checkpoint.copies
    if _tied(checkpoint.config) and not own:
        tables = (k for k in checkpoint.entries if k.endswith(f".{EMBEDDING}"))
        kept |= {key.removesuffix(".weight"): tied_to(HEAD) for key in tables}
    head = _by_name(checkpoint, HEAD) if own else ""
    return Survey(
        checkpoint,
        tuple(map(tuple, blocks.values())),
        kept,
        None if isinstance(head, str) else head,
        inside[0][0],
        frozenset(),
    )


def _by_name(checkpoint: Checkpoint, key: str) -> WeightView | str:
    entry, module = checkpoint.entries[key], key.removesuffix(".weight")
    if KEPT.search(module):
        return f"{module.rpartition('.')[2]} keeps the checkpoint's precision (router or state)"
    stack = checkpoint.stacks.get(key)
    plain = key.endswith(".weight") and len(entry.shape) == 2 and not TABLES.search(module)
    if stack is None and not plain:
        return f"{key} is not the weight of a linear layer"
    if entry.dtype not in FLOATS:
        return f"{key} is stored in {entry.dtype}"
    if stack is not None:
        return stacked(stack, key, stack.shape, stack.transposed)
    n, k = entry.shape
    return WeightView(key, (n, k), 1, (Part(module, key, (0, n), False),), (n, k))

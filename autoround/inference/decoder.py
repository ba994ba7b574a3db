# SPDX-License-Identifier: Apache-2.0
"""Token after token without the framework: a decoder-only model as the list of its products.

In transformers a token of a small model costs more in Python than in arithmetic (0.6 B parameters,
4 bits, one thread: 55 ms a token, of which the products take 36). Models of the Llama family need
eight calls a block; those that share an input are joined (`hal.join`), what stands between them is
`hal.block_ops`, and a single token goes through all of it in one call where the backend has one
(`BlockOps.chain`: 1.36 times as many tokens a second). Everything else runs as transformers has it:
`refuse` says why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hal
from autoround.errors import InputError
from autoround.inference.loading import running
from hal import Attention, QLinear, Weight
from hal.block import BLOCK, Block

#: Architectures whose blocks are: norm, attention, norm, gated SiLU, both added to the stream.
FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: Rotary tables of these are functions of the position alone.
ROPES = ("default", "linear", "llama3", "yarn")
#: Rows of a prompt that go through the blocks together.
CHUNK = 512

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Joined:
    """The product with one weight of ours."""

    weight: Weight
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return hal.qgemm(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Block:
    qkv: Product
    attention: Attention
    out: Product
    norm: Tensor
    gate_up: Product
    down: Product
    next_norm: Tensor


def refuse(model: Any) -> str | None:
    """Why this model cannot be decoded here, or None."""
    config, name = model.config, type(model).__name__
    if name not in FAMILIES:
        return f"{name} is not one of {', '.join(FAMILIES)}"
    if (act := config.hidden_act) != "silu":
        return f"its activation is {act}, not silu"
    if (rope := (config.rope_parameters or {}).get("rope_type", "default")) not in ROPES:
        return f"its rotary embedding is {rope}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or _window(config):
        return "it has sliding windows"
    dim = model.model.layers[0].self_attn.head_dim
    if dim % BLOCK or dim > 256:
        return f"its heads have {dim} columns, not a multiple of {BLOCK} up to 256"
    linears = [m for m in model.model.layers.modules() if hasattr(m, "in_features")]
    if wrong := {type(m).__name__ for m in linears if not isinstance(m, nn.Linear | QLinear)}:
        return f"it has layers of type {wrong.pop()}"
    return None


def _window(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window) and getattr(config, "use_sliding_window", True)


class Decoder:
    """A transformers model of FAMILIES, ready to extend one sequence of up to ``length`` tokens.

    Holds the model's own tensors, or ones the model's modules view, so both stay usable; moves the
    weights together (`hal.settle`). Numbers are
    those of the model but for the order of sums in norms and attention. Raises InputError for a
    model that `refuse` names a reason for.
    """

    def __init__(self, model: Any, length: int) -> None:
        if reason := refuse(model):
            raise InputError(f"{reason}; generate with transformers instead")
        self.length = -(-length // BLOCK) * BLOCK
        self.used = 0
        body = model.model
        self._ops = hal.block_ops(model.device)
        self._embedding = body.embed_tokens.weight.detach()
        positions = torch.arange(self.length, device=model.device)[None]
        with torch.no_grad():
            cos, sin = (t[0].contiguous() for t in body.rotary_emb(self._embedding[:1], positions))
        norms = [*(layer.input_layernorm for layer in body.layers[1:]), body.norm]
        self._first = body.layers[0].input_layernorm.weight.detach()
        self._eps = float(body.norm.variance_epsilon)
        weights: list[Weight] = []
        self._blocks = [
            _block(layer, after.weight.detach(), (cos, sin), weights)
            for layer, after in zip(body.layers, norms, strict=True)
        ]
        self._head = product([model.lm_head], weights)
        hal.settle(weights)
        ours = [block for b in self._blocks if (block := _chainable(b))]
        self._step = self._ops.chain(ours, self._eps) if len(ours) == len(self._blocks) else None

    @torch.inference_mode()
    def extend(self, ids: Tensor) -> Tensor:
        """Append ``ids [M]`` i64; logits ``[V]`` after the last. InputError when it gets full."""
        count = ids.shape[0]
        if not count or self.used + count > self.length:
            raise InputError(
                f"{self.used} + {count} tokens do not fit a decoder of {self.length}; give it a "
                "greater length"
            )
        for piece in torch.split(ids, CHUNK) if count > CHUNK else (ids,):
            x = self._forward(piece)
        return self._head(x[-1:])[0]

    def _forward(self, ids: Tensor) -> Tensor:
        """Final hidden states of more tokens ``[M, H]``."""
        ops, eps, at = self._ops, self._eps, self.used
        stream = self._embedding[ids]
        x = ops.norm(stream, None, self._first, eps)
        if self._step and len(ids) == 1:
            self._step(stream, x, at)
            self.used += 1
            return x
        for b in self._blocks:
            y = b.out(ops.attend(b.qkv(x), b.attention, at))
            x = ops.norm(stream, y, b.norm, eps)
            y = b.down(ops.gate(b.gate_up(x)))
            x = ops.norm(stream, y, b.next_norm, eps)
        self.used += ids.shape[0]
        return x

    def rewind(self) -> None:
        """Forget everything."""
        self.used = 0


class Plain:
    """The same two functions over transformers' own forward, for every other model."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None

    @torch.inference_mode()
    def extend(self, ids: Tensor) -> Tensor:
        """Append ``ids [M]`` i64; logits ``[V]`` after the last. InputError for a model that
        cannot run."""
        with running(self._model):
            out = self._model(input_ids=ids[None], past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        logits: Tensor = out.logits[0, -1]
        return logits

    def rewind(self) -> None:
        """Forget everything."""
        self._cache = None


def decoder(model: Any, length: int) -> Decoder | Plain:
    """`Decoder` for models it can run, else `Plain`."""
    return Plain(model) if refuse(model) else Decoder(model, length)


def continuation(
    model: Any, prompt: Tensor, limit: int, *, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """At most ``limit`` tokens after ``prompt [M]`` i64, ending where the model ends.

    ``temperature`` 0 takes the likeliest token; above, samples with ``seed``.
    """
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    chance = torch.Generator(prompt.device).manual_seed(seed)
    running = decoder(model, len(prompt) + limit)
    ids = prompt
    for _ in range(limit):
        logits = running.extend(ids)
        if temperature:
            shares = (logits.float() / temperature).softmax(-1)
            ids = torch.multinomial(shares, 1, generator=chance)
        else:
            ids = logits.argmax(keepdim=True)
        if int(ids) in stop:
            return
        yield int(ids)


def product(modules: Sequence[Any], used: list[Weight]) -> Product:
    """``x [M, K]`` times all of them, results side by side: one call where they can be joined.

    Adds the weights it multiplies with to ``used``.
    """
    biases = [m.bias for m in modules]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    weights = [m.weight for m in modules if isinstance(m.weight, Weight)]
    joined = hal.join(weights) if len(weights) == len(modules) else None
    used += weights if joined is None else [joined]
    if joined is not None:
        return _Joined(joined, bias)
    if len(modules) == 1:
        alone: Product = modules[0]
        return alone
    return lambda x: torch.cat([m(x) for m in modules], -1)


def _chainable(b: _Block) -> Block | None:
    """The block for `BlockOps.chain`, where all its products are ours."""
    products = [p for p in (b.qkv, b.out, b.gate_up, b.down) if isinstance(p, _Joined)]
    if len(products) < 4:
        return None
    qkv, out, gate_up, down = ((p.weight, p.bias) for p in products)
    return Block(qkv, b.attention, out, b.norm, gate_up, down, b.next_norm)


def _block(
    layer: Any, next_norm: Tensor, tables: tuple[Tensor, Tensor], used: list[Weight]
) -> _Block:
    a, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
    norms = [getattr(a, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if n is None else n.weight.detach() for n in norms)
    attention = Attention(
        config.num_attention_heads,
        config.num_key_value_heads,
        a.head_dim,
        a.scaling,
        *tables,
        q_norm,
        k_norm,
        float(config.rms_norm_eps),
    )
    return _Block(
        product([a.q_proj, a.k_proj, a.v_proj], used),
        attention,
        product([a.o_proj], used),
        layer.post_attention_layernorm.weight.detach(),
        product([mlp.gate_proj, mlp.up_proj], used),
        product([mlp.down_proj], used),
        next_norm,
    )

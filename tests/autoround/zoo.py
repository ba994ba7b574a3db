# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many families, saved the way their publishers save them."""

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
}
OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64}
TIED: dict[str, Any] = {"tie_word_embeddings": True}

# name -> (model class, overrides of BASE)
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3ForCausalLM", {"head_dim": 16} | TIED),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8} | TIED),
    "phi3": ("Phi3ForCausalLM", {}),
    "opt": ("OPTForCausalLM", OPT),
    "gpt2": ("GPT2LMHeadModel", GPT2 | TIED),
    "bloom": ("BloomForCausalLM", {"n_layer": 3, "n_head": 4} | TIED),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", EXPERTS | MLA),
}


def build(name: str, overrides: dict[str, Any] | None = None) -> Any:
    """A randomly initialised model; the same weights every time."""
    kind, own = ZOO[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(len(name))
    config = cls.config_class(**(BASE | own | (overrides or {})))
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases: ones and zeros hide mistakes
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    return model


def save(name: str, path: Path, shard: str = "5GB", overrides: dict[str, Any] | None = None) -> Any:
    """Build and save; returns the model."""
    model = build(name, overrides)
    model.save_pretrained(path, max_shard_size=shard)
    return model

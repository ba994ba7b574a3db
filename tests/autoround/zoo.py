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
FEW: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 16,
}
OPT: dict[str, Any] = {"ffn_dim": 96, "word_embed_proj_dim": 64, "tie_word_embeddings": True}
GPT2: dict[str, Any] = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 64}
XGLM: dict[str, Any] = {"d_model": 64, "ffn_dim": 96, "attention_heads": 4, "num_layers": 3}
ZAMBA2: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "hybrid_layer_ids": [1, 3],
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "use_mem_rope": True,
    "attention_head_dim": 32,
    "chunk_size": 8,
}
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
    # buffers that no checkpoint holds, computed by the attention's own _init_weights
    "gptj": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 8}),
    # its attention refuses a mask of one row for a batch
    "xglm": ("XGLMForCausalLM", XGLM | TIED),
    "bloom": ("BloomForCausalLM", {"n_layer": 3, "n_head": 4} | TIED),
    "mixtral": ("MixtralForCausalLM", FEW),
    "qwen3_moe": ("Qwen3MoeForCausalLM", EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1}),
    "zamba2": ("Zamba2ForCausalLM", ZAMBA2 | TIED),  # one transformer shared by two blocks
    # stored as one tensor for all experts: in rows, in columns, in columns that take turns
    "granitemoe": ("GraniteMoeForCausalLM", FEW),
    "gpt_oss": ("GptOssForCausalLM", FEW | {"head_dim": 16, "sliding_window": 8}),
    "llama4": ("Llama4ForCausalLM", FEW | LLAMA4),
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


def save(
    name: str,
    path: Path,
    shard: str = "5GB",
    overrides: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Build, cast and save; returns the path."""
    build(name, overrides).to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


def plain(name: str, path: Path) -> Any:
    """The saved model loaded by transformers itself."""
    return getattr(transformers, ZOO[name][0]).from_pretrained(path).eval()


def tokens(samples: int, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random inputs of one row each."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, BASE["vocab_size"], (samples, length), generator=generator)
    return [{"input_ids": row[None]} for row in rows]

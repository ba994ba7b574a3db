# SPDX-License-Identifier: Apache-2.0
"""llama.cpp on a Q4_0 file of given blocks: BLOCKS.safetensors CONFIG.json MODEL.gguf.

The file is written first when it is not there. Then questions on stdin, answers on stdout:
["run", threads, ids, steps] -> seconds of the prompt, of the steps, logits after the prompt.
"""

import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file

#: Our names -> the file's.
NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(key: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    own = key.removesuffix(".weight")
    if own.startswith("model.layers."):
        index, _, rest = own.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{NAMES[rest]}.weight"
    return f"{NAMES[own]}.weight"


def write(blocks: Path, config: dict, path: Path) -> None:
    """A Qwen3 GGUF without a vocabulary."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for key, t in load_file(blocks).items():
        if t.dtype == torch.uint8:
            writer.add_tensor(name_of(key), t.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        elif t.ndim == 1:
            writer.add_tensor(name_of(key), t.float().numpy())
        else:
            raw = t.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name_of(key), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """The loaded file and one context."""

    def __init__(self, path: Path, vocabulary: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_mmap = False  # or the weights would stay as the file has them
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 1024, 512, 512
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocabulary = vocabulary

    def decode(self, ids: list[int]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        batch = llama_cpp.llama_batch_get_one(tokens, len(ids))
        assert llama_cpp.llama_decode(self.context, batch) == 0

    def logits(self) -> np.ndarray:
        at = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(at, (self.vocabulary,))

    def run(self, threads: int, ids: list[int], steps: int) -> list:
        llama_cpp.llama_set_n_threads(self.context, threads, threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self.decode(ids)
        first = self.logits().copy()
        middle = time.perf_counter()
        token = int(first.argmax())
        for _ in range(steps):
            self.decode([token])
            token = int(self.logits().argmax())
        return [middle - start, time.perf_counter() - middle, first.tolist()]


def main() -> None:
    """Serve until stdin ends."""
    blocks, config, path = map(Path, sys.argv[1:])
    settings = json.loads(config.read_text())
    if not path.exists():
        write(blocks, settings, path)
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = Model(path, settings["vocab_size"])
    for line in sys.stdin:
        _, *values = json.loads(line)
        print(json.dumps(model.run(*values)), flush=True)


main()

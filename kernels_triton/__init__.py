# SPDX-License-Identifier: Apache-2.0
"""Portable kernels (NVIDIA, AMD, Intel GPUs) over plain tensors and numbers; torch and triton only.

Rules, each for a reason measured in the interpreter or in SASS:

- loads go to f32 (or to ``dot_dtype``) at once: arithmetic on bf16 is silently wrong in the
  interpreter, and rounding to bf16 truncates there, so `codec.stored` rounds by itself;
- no ``@triton.autotune``, no atomics: what runs is decided in Python, and sums have one order;
- no fused multiply-add in the codec (`codec.EXACT`): its results are the reference's, bit for bit.

With ``TRITON_INTERPRET=1`` in the environment before the first import they run on CPU tensors.
"""

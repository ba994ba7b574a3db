# SPDX-License-Identifier: Apache-2.0
"""How other projects' loaders reach our kernels."""

#: ``AutoRoundConfig(backend=FAST)``: products with activations in 8 bits where that is faster.
FAST = "hal:fast"

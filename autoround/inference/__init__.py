# SPDX-License-Identifier: Apache-2.0
"""Running what was quantized: loading it, and a decoder of its own."""

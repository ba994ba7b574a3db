# SPDX-License-Identifier: Apache-2.0
"""One run: decide, take up what is there, quantize block by block, prove, tell."""

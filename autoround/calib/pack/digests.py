# SPDX-License-Identifier: Apache-2.0
"""sha256 of the uncompressed packs; written by ``tools/build_packs.py``."""

CALIBRATION_SHA256 = "44b9faba743e4498cadb0bfe2ec21a6066beb9711fe67e0e4e372dba64936585"
HELDOUT_SHA256 = "30e9b2ac6027a6ba2c45f90eaba1679927b7a3388a07dd6a300787cbaf795dc5"

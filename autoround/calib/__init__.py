# SPDX-License-Identifier: Apache-2.0
"""Calibration: which text the quantizer sees, as token ids."""

from autoround.calib.data import TokenSet, load_tokens
from autoround.calib.fitting import tokens_for
from autoround.calib.spec import DatasetItem, parse_dataset

__all__ = ["DatasetItem", "TokenSet", "load_tokens", "parse_dataset", "tokens_for"]

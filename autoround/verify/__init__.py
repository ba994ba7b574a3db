# SPDX-License-Identifier: Apache-2.0
"""Reads finished files back and proves them against the run. Shares no code with the writers."""

from autoround.verify.check import prove, verify
from autoround.verify.verdict import Verdict

__all__ = ["Verdict", "prove", "verify"]

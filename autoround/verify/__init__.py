# SPDX-License-Identifier: Apache-2.0
"""Reads finished files back and proves them against the run. Shares no code with the writers."""

from autoround.verify.check import Verdict, prove, verify

__all__ = ["Verdict", "prove", "verify"]

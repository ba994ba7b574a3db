# SPDX-License-Identifier: Apache-2.0
"""The one error that means "your input, and here is what to do about it"."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line: the value and the remedy."""

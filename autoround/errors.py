# SPDX-License-Identifier: Apache-2.0
"""The one error that means "your input, and here is what to do about it"."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line with the value and the remedy."""

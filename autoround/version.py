# SPDX-License-Identifier: Apache-2.0
"""The version, in one place; and those of packages, for reports."""

import platform
from collections.abc import Iterable
from importlib import metadata

VERSION = "0.1.0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Our own, Python's, and those of packages; ``absent`` for one that is not installed."""
    found = {"autoround": VERSION, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found

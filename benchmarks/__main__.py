# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks NAME ...`` runs ``benchmarks.NAME.main``."""

import importlib
import pkgutil
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the benchmark named first with the other arguments; without a name, list them."""
    names = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name[0] != "_"]
    if not argv or argv[0] not in names:
        print(f"usage: python -m benchmarks {{{','.join(names)}}} ...")
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

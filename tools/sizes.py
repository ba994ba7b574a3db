# SPDX-License-Identifier: Apache-2.0
"""Lines of code by folder beside those aimed for: a reading aid, not a limit."""

import subprocess
from collections import Counter
from pathlib import Path

AIMS = {"hal": 2900, "autoround": 5000, "csrc": 2800, "tests": 3400, "benchmarks": 500}
CODE = {".py", ".cpp", ".h", ".inl", ".cmake", ".cu", ".pyi"}


def main() -> None:
    """Print folder totals, then the longest files."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    files = [Path(name) for name in listed.stdout.split()]
    lines = {f: len(f.read_text().splitlines()) for f in files if f.suffix in CODE and f.exists()}
    totals: Counter[str] = Counter()
    for file, count in lines.items():
        totals[file.parts[0]] += count
    print(f"{'folder':<16}{'lines':>8}{'aim':>8}")
    for folder, count in totals.most_common():
        print(f"{folder:<16}{count:>8}{AIMS.get(folder, ''):>8}")
    print(f"{'sum':<16}{sum(totals.values()):>8}\n")
    for file, count in sorted(lines.items(), key=lambda item: -item[1])[:12]:
        print(f"{count:>6}  {file}")


if __name__ == "__main__":
    main()

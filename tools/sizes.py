# SPDX-License-Identifier: Apache-2.0
"""Lines of code by folder beside those aimed for: a reading aid, not a limit."""

import shutil
import subprocess
from collections import Counter
from pathlib import Path

AIMS = {"hal": 2900, "autoround": 5000, "csrc": 2800, "tests": 3400, "benchmarks": 500}
CODE = {".py", ".cpp", ".h", ".inl", ".cmake", ".cu", ".pyi"}


def objects() -> None:
    """Bytes of each instruction set's object and of the module, where they were built here."""
    found = sorted(Path("build").glob("*/CMakeFiles/hal_isa_*/csrc/*.o"))
    for path in found:
        sized = subprocess.run(["size", str(path)], capture_output=True, text=True, check=True)
        text, data = sized.stdout.splitlines()[1].split()[:2]
        print(f"{int(text) + int(data):>10}  {path.name.removesuffix('.cpp.o')}")
    modules = Path("build").glob("*/_cpu*.so")
    for path in modules:
        print(f"{path.stat().st_size:>10}  {path.name}")


def main() -> None:
    """Print folder totals, then the longest files, then the bytes of native objects."""
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
    if shutil.which("size"):
        print("\nbytes")
        objects()


if __name__ == "__main__":
    main()

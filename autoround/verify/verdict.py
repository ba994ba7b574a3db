# SPDX-License-Identifier: Apache-2.0
"""What `verify` found."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class Verdict:
    """What was compared, and every difference found; none = verified.

    ``recorded``: with what the run recorded in the directory itself; ``against``: with other files.
    ``largest_error``: of a dequantized weight or a kept tensor against the run, as the format's
    readers see it; 0 = exact.
    """

    directory: Path
    format: str
    modules: int = 0
    kept: int = 0
    checksums: int = 0
    recorded: bool = False
    against: Path | None = None
    largest_error: float = 0.0
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if not self.ok:
            return f"NOT VERIFIED {self.directory}: {len(self.differences)} differences"
        if self.against is None and not self.recorded:
            return (
                f"VERIFIED {self.directory}: {self.checksums} checksums, {self.modules} modules as "
                "the config says; no run to compare with (--against RUN)"
            )
        loss = f"largest error {self.largest_error:.3g}" if self.largest_error else "exact"
        return (
            f"VERIFIED {self.directory} ({self.format}, {loss}): codes, scales and zero levels of "
            f"{self.modules} modules and {self.kept} other tensors, bit for bit"
        )

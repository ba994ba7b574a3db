# SPDX-License-Identifier: Apache-2.0
"""File formats: what they hold, how they are written, how they are read."""

from autoround.formats.contents import Contents, Module, Stored
from autoround.formats.export import Export, Target, target
from autoround.formats.read import (
    OF_FORMAT,
    RECORD,
    UNREADABLE,
    Quantized,
    own_files,
    record_of,
    run_of,
)
from autoround.formats.row import Format
from autoround.formats.table import CANONICAL, FORMATS, fit, formats_by_names

__all__ = [
    "CANONICAL",
    "FORMATS",
    "OF_FORMAT",
    "RECORD",
    "UNREADABLE",
    "Contents",
    "Export",
    "Format",
    "Module",
    "Quantized",
    "Stored",
    "Target",
    "fit",
    "formats_by_names",
    "own_files",
    "record_of",
    "run_of",
    "target",
]

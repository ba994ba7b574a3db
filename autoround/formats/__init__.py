# SPDX-License-Identifier: Apache-2.0
"""File formats: rows of a table, and the sink that writes shards."""

from autoround.formats.sink import ShardSink, Stored
from autoround.formats.table import FORMATS, Format, Packing, format_by_name, stored_parts

__all__ = [
    "FORMATS",
    "Format",
    "Packing",
    "ShardSink",
    "Stored",
    "format_by_name",
    "stored_parts",
]

"""Makes a new filesystem on a region.  It imports the format and the region, not the engine."""

from mkfs.initial import InitialFilesystem, Parameters, initial_filesystem
from mkfs.writer import format_region, refuse_used

__all__ = ["InitialFilesystem", "Parameters", "format_region", "initial_filesystem", "refuse_used"]

"""Making a new filesystem on a region: knows the format and the region, never the engine."""

from mkfs.image import Image, Parameters, make_image
from mkfs.writer import format_region, refuse_used

__all__ = ["Image", "Parameters", "format_region", "make_image", "refuse_used"]

"""Making a new filesystem on a region: knows the format and the region, never the engine."""

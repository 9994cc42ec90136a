"""A filesystem in memory that several machines share."""

#: The one place of the version: pyproject.toml reads it here.
__version__ = "0.1.0"

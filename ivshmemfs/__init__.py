"""A filesystem in memory that several machines share."""

#: As pyproject.toml says it; asking the installed package for it takes longer than mounting.
__version__ = "0.1.0"

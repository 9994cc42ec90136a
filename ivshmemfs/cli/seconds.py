"""The type of options that take seconds."""

from __future__ import annotations

import math
from typing import Any

import click

#: Thirty years, which the calls that sleep still take.
MOST = 1e9


class Seconds(click.FloatRange):
    """A number of seconds, at least `least`: neither NaN, which compares with nothing, nor endless.

    An option that is left out waits for ever.
    """

    def __init__(self, least: float = 0.0) -> None:
        super().__init__(min=least, max=MOST)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; raises BadParameter."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds

"""The one thing that tables of errors say: this call fails with that errno."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest


def fails(code: int | tuple[int, ...], call: Callable[..., object], *args: object) -> None:
    """Assert that ``call(*args)`` raises OSError with errno *code* (or one of them)."""
    codes = (code,) if isinstance(code, int) else code
    with pytest.raises(OSError) as caught:
        call(*args)
    got = errno.errorcode.get(caught.value.errno or 0, "?")
    wanted = [errno.errorcode[one] for one in codes]
    assert caught.value.errno in codes, f"{got}, not {' or '.join(wanted)}"

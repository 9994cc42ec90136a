"""Access lists are refused, not stored: a program that copies them must fall back on the mode."""

from __future__ import annotations

import errno

import pytest

from ivshmemfs.errors import FsError
from tests.support.regions import ROOT, new_region


@pytest.mark.parametrize("name", [b"system.posix_acl_access", b"other.thing", b""])
def test_names_that_would_have_to_be_obeyed_are_refused(name: bytes) -> None:
    with new_region() as region:
        fs = region.mount()
        with pytest.raises(FsError) as refused:
            fs.setxattr(1, name, b"x", 0, ROOT)
        assert refused.value.errno == errno.EOPNOTSUPP
        with pytest.raises(FsError) as refused:
            fs.getxattr(1, name)
        assert refused.value.errno == errno.EOPNOTSUPP
        assert fs.listxattr(1) == []

"""The root's number is the low part of the commit word that published it, also after fences."""

from __future__ import annotations

from ivshmemfs.format import words
from tests.regions import new_region, put


def test_fences_count_as_commits() -> None:
    with new_region() as region:
        fs = region.mount()
        for _ in range(3):
            fs.store.control.fence()
            put(fs, 1, b"file", b"x")
            view = fs.view()
            word = words.split_commit(view.word)[0]
            assert view.root.record.sequence & words.SEQUENCE_MASK == word

"""A shelf that may go away: failures are told from answers, and it is left alone for a while."""

import errno
import time

import pytest
import torch

from redknot_hf.reuse.encoding import SegmentFileError
from redknot_hf.reuse.remote import Remote, UnreachableError
from redknot_hf.reuse.segment import Segment
from redknot_hf.reuse.shelf import Entry, Shelf


def segment() -> Segment:
    return Segment("a", (1,), (), (None,), torch.zeros(0))


class Flaky(Shelf):
    """Raises what it is told to, or answers."""

    name, url = "remote", "test://here"

    def __init__(self):
        self.error, self.asked = None, 0

    def _answer(self, found):
        self.asked += 1
        if self.error is not None:
            raise self.error
        return found

    def write(self, segment, *, durable=True):
        return self._answer([])

    def read(self, wanted, buffer=None):
        return self._answer(wanted)

    def text_of(self, address):
        return self._answer(((1,), ()))

    def remove(self, address):
        self._answer(None)

    def __contains__(self, address):
        return self._answer(True)

    def entries(self):
        return self._answer([Entry("a", "remote", 1, 0.0)])


USES = {
    "write": lambda shelf: shelf.write(segment()), "read": lambda shelf: shelf.read(segment()),
    "remove": lambda shelf: shelf.remove("a"),
    "text": lambda shelf: shelf.text_of("a"), "contains": lambda shelf: "a" in shelf, "held": Shelf.held,
}  # fmt: skip


@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, RuntimeError])
def test_a_shelf_that_fails_is_left_alone_and_asked_again(kind):
    shelf = Flaky()
    remote = Remote(shelf, retry=0.02)
    for use in USES.values():
        use(remote)
        shelf.error = kind("reset")
        with pytest.raises(UnreachableError, match="test://here does not answer") as first:
            use(remote)
        asked = shelf.asked
        with pytest.raises(UnreachableError) as second:
            use(remote)
        assert (first.value.news, second.value.news) == (True, False)
        assert shelf.asked == asked  # nobody waited for it
        time.sleep(0.025)
        with pytest.raises(UnreachableError) as third:
            use(remote)
        assert not third.value.news
        assert shelf.asked == asked + 1
        shelf.error = None
        time.sleep(0.025)
        use(remote)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (FileNotFoundError, ("a",)),
        (SegmentFileError, ("a",)),
        (PermissionError, ("a",)),
        (OSError, (errno.ENOSPC, "")),
    ],
    ids=["missing", "damaged", "forbidden", "full"],
)
def test_answers_are_passed_on(kind, said):
    shelf = Flaky()
    remote = Remote(shelf)
    shelf.error = kind(*said)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            remote.read(segment())
        assert caught.value is shelf.error
    assert shelf.asked == 2

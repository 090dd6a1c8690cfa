"""What a scheduler asks of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from .scheduler import Sequence


@runtime_checkable
class Memory(Protocol):
    """What a scheduler asks of pages.

    Attributes:
        freed: Grows with every page that comes back, so that whoever did not fit need not ask again before.
    """

    freed: int

    def begin(self, sequence: Sequence) -> int:
        """Gives a sequence what it has in common with what is held, or nothing; how many tokens that is."""
        ...

    def fits(self, sequence: Sequence, tokens: int) -> bool:
        """Whether there are free pages for it to hold so many tokens."""
        ...

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Gives it pages for so many tokens."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Takes all pages of a sequence, on the device or the host."""
        ...

    def evict(self) -> bool:
        """Lets go of what is kept for later and was used least recently; `False` if there is nothing."""
        ...

    def swap_out(self, sequence: Sequence) -> bool:
        """Moves its pages to the host; `False` if there is no room for them."""
        ...

    def swap_in(self, sequence: Sequence) -> None:
        """Brings them back, to pages that `fits` has found."""
        ...

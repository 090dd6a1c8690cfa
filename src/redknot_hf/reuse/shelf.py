"""A shelf: a tier of the store that outlives the process, and what every one of them can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .encoding import Buffer, Text, plain_memory
from .segment import Segment


@dataclass(frozen=True)
class Entry:
    """A stored segment, of whichever model and plan.

    Attributes:
        address: What it is; the name that it is deleted by.
        tier: `"disk"` or `"remote"`.
        nbytes: Bytes that it takes there, header included.
        used: When it was written or read last, in seconds since 1970; 0 where the place does not say.
    """

    address: str
    tier: str
    nbytes: int
    used: float


class Shelf(ABC):
    """Segments by address, where several processes put and find them.

    A segment appears whole or not at all. Several processes may write the same one, and any may read.

    Attributes:
        name: Of the tier, `"disk"` or `"remote"`.
        url: Where it is, without passwords.
    """

    name: str
    url: str

    @abstractmethod
    def write(self, segment: Segment, *, durable: bool = True) -> list[str]:
        """Puts a segment of the host's memory here, in the place of one of the same address.

        Args:
            segment: What is put.
            durable: Whether it is to survive a power failure; a copy of what lies elsewhere need not.

        Returns:
            Addresses that had to leave for it; its own, if it is larger than all there may be.

        Raises:
            OSError: It cannot be written, to a full disk say; then nothing is left of it.
        """

    @abstractmethod
    def read(self, wanted: Segment, buffer: Buffer = plain_memory) -> Segment:
        """Reads a segment into the host's memory and checks it; it counts as used now.

        Args:
            wanted: What it has to be, without data (`outline`).
            buffer: Makes the memory to read into.

        Raises:
            FileNotFoundError: It is not here.
            SegmentFileError: It is cut short, altered, no segment, or that of another text, plan or model.
        """

    @abstractmethod
    def text_of(self, address: str) -> Text | None:
        """Tokens and prefix that the value of an address speaks of, unchecked; `None` if none can be read."""

    @abstractmethod
    def remove(self, address: str) -> None:
        """Deletes a segment, if it is here."""

    @abstractmethod
    def __contains__(self, address: str) -> bool: ...

    @abstractmethod
    def entries(self) -> list[Entry]:
        """What lies here, whoever wrote it, the least recently used first."""

    def held(self) -> tuple[int, int]:
        """Number and bytes of the segments that lie here, whoever wrote them."""
        found = self.entries()
        return len(found), sum(entry.nbytes for entry in found)

    def _make_room(self, address: str, nbytes: int, most: int | None) -> list[str]:
        """Deletes what was not used for longest, until a segment of so many bytes makes it no more than `most`."""
        if most is None:
            return []
        gone, entries = [], [entry for entry in self.entries() if entry.address != address]
        total = nbytes + sum(entry.nbytes for entry in entries)
        for entry in entries:
            if total <= most:
                break
            self.remove(entry.address)
            gone.append(entry.address)
            total -= entry.nbytes
        return gone

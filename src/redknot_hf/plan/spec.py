"""The rule of one KV head: what it keeps, and how."""

from dataclasses import dataclass

from .storage import HOT, PAGE_SIZE, STORAGES, cold_page_nbytes, cold_pages

_MOST_SINKS = 1 << 29  # kernels reckon a window and its sinks in 32 bits


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The rule of one KV head: a query at position q sees key k iff k <= q and (k > q - window or k < sink).

    Args:
        window: Tokens a query sees back, itself included. None makes a global head, which sees everything.
        sink: First tokens of the sequence that a local head keeps beside its window.
        storage: How a global head keeps what is no longer recent: `"model"` (as the model made it), `"int8"` or
            `"int4"`. In layers with a sliding window of the model's own it has no effect.

    Raises:
        ValueError: `window` is under 1, `sink` is negative or endless, one is no int, a global head has a sink, or the
            storage is unknown or a local head's.
    """

    window: int | None = None
    sink: int = 0
    storage: str = "model"

    def __post_init__(self) -> None:
        # bool is an int, and HeadSpec(True) is a mistake.
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"window is {self.window!r}: give an int of at least 1 token, or None for a global head")
        if type(self.sink) is not int or not 0 <= self.sink <= _MOST_SINKS:
            raise ValueError(f"sink is {self.sink!r}: give an int of at least 0 tokens, and {_MOST_SINKS} at most")
        if self.window is None and self.sink:
            raise ValueError(f"sink is {self.sink} and window is None: a global head keeps all, give it sink=0")
        if self.storage not in STORAGES:
            raise ValueError(f"storage is {self.storage!r}: choose one of {STORAGES}")
        if self.window is not None and self.storage != "model":
            raise ValueError(
                f"storage is {self.storage!r} and window is {self.window}: a local head overwrites its pages again "
                'and again, and keeps few; only global heads take a storage. Give it storage="model"'
            )

    @property
    def is_global(self) -> bool:
        """Whether the head keeps every token."""
        return self.window is None

    def kept(self, length: int) -> int:
        """Return how many tokens the head keeps of a sequence of `length` tokens."""
        if length < 0:
            raise ValueError(f"length is {length}: give at least 0 tokens")
        return length if self.window is None else min(length, self.sink + self.window)

    def nbytes(
        self, length: int, key_dim: int, value_dim: int, size: int, page_size: int = PAGE_SIZE, hot: int = HOT
    ) -> int:
        """Return the bytes of K and V that the head keeps of `length` tokens; see `HeadPlan.nbytes`."""
        kept, token = self.kept(length), (key_dim + value_dim) * size
        if self.storage == "model":
            return kept * token
        cold = cold_pages(length, page_size, hot)
        return (kept - cold * page_size) * token + cold * cold_page_nbytes(self.storage, page_size, key_dim, value_dim)

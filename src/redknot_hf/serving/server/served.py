"""What a server asks of an engine, which may be one of this process or stand for several elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from redknot_hf.serving.request import Request


@runtime_checkable
class Served(Protocol):
    """An engine as routes see it; `redknot_hf.serving.Engine` says what each of these is.

    Attributes:
        model: Of which `config` and `generation_config` are looked at.
        memory: Of which `ever_fits` and `sizes` are.
        words: Ids that the model knows.
        documents: `Documents`, or what names them; `None` where none are stored.
    """

    model: Any
    tokenizer: Any
    memory: Any
    max_len: int
    words: int
    documents: Any
    error: BaseException | None
    observe: Callable[[str, float], None]

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        ...

    @property
    def submit_many(self) -> Callable[..., list[Request]]:
        """Hands requests of one prompt in: takes the prompt, how many answers, how they are chosen, and options."""
        ...

    def add_segment(self, text: Any, prefix: Any = None) -> Any:
        """Stores a document, and gives what names it."""
        ...

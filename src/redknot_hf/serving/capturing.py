"""A captured step of a batch of one size: what it reads and writes stays where it is, and a replay is one launch."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from redknot_hf.decoding import capture_stream

from .memory import SeatMemory
from .stepping import Batch, BatchLayer, ColdCounts
from .tables import Views

Found = TypeVar("Found")
# The model on the next token of each seat: ids, positions and what it takes for its cache.
Forward = Callable[[Tensor, Tensor, Batch, Any], Float[Tensor, "seats words"]]


class Numbers(NamedTuple):
    """What is known of seats on the device.

    Attributes:
        last: The token of each that is read next.
        lengths: Tokens that its rows hold.
        cold: Cold pages of each of its stored rows.
        real: Whether it takes part in the next step.
    """

    last: Int[Tensor, " seats"]
    lengths: Int[Tensor, " seats"]
    cold: Int[Tensor, " seats"]
    real: Bool[Tensor, "seats 1"]

    @classmethod
    def of(cls, seats: int, device: torch.device) -> Numbers:
        """Of seats that nobody has."""
        last = torch.zeros(seats, dtype=torch.long, device=device)
        lengths, cold = (torch.zeros(seats, dtype=torch.int32, device=device) for _ in range(2))
        return cls(last, lengths, cold, torch.zeros(seats, 1, dtype=torch.bool, device=device))


class Graph(Generic[Found]):
    """A CUDA graph of what a function launches; on a device without graphs the function itself.

    Attributes:
        found: What it gave; a replay writes it anew.

    Args:
        run: Called twice before, first to compile what it calls, so that it must change nothing then.
        device: Where it runs.
    """

    def __init__(self, run: Callable[[], Found], device: torch.device) -> None:
        self._run, self.found = run, run()
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=capture_stream(device)):
                self.found = run()

    def replay(self) -> None:
        """Runs it."""
        if self._graph is None:
            self.found = self._run()
        else:
            self._graph.replay()

    def close(self) -> None:
        """Lets it go, and what the function holds."""
        vars(self).clear()


class CapturedReading:
    """Reading so many tokens of so many sequences, as a CUDA graph.

    Args:
        run: The model on tokens of seats, as `asked` says: the seat, and tokens behind as many -1 as there are others.
        rows, width: Of `asked`.
        device: Where the model takes tokens.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], rows: int, width: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._asked = torch.full((rows, width), -1, dtype=torch.long, device=device)
            self._asked[:, 0] = 0
        self._graph = Graph(lambda: run(self._asked), device)

    def replay(self, asked: Int[Tensor, "rows width"]) -> Float[Tensor, "rows words"]:
        """Reads what is asked; the logits are written anew by the next replay."""
        self._asked.copy_(asked, non_blocking=True)
        self._graph.replay()
        return self._graph.found

    def close(self) -> None:
        """Lets the graph go."""
        self._graph.close()


class CapturedStep:
    """A step of so many seats, as a CUDA graph; on a device without graphs it runs as it is.

    Those that take part read their next token, are a token longer then, and read the likeliest one next.

    Args:
        memory: Whose pages are read.
        tables: Of the seats, hot and cold, by layer.
        numbers: Of the seats; none of them takes part yet. Mutated by every step.
        forward: Runs the model.
        compiled: Compiles the model first (`torch.compile`), so that what lies between products of matrices and
            attention is a few kernels; that takes most of a minute.
    """

    def __init__(
        self, memory: SeatMemory, tables: tuple[Views, Views], numbers: Numbers, forward: Forward, compiled: bool
    ) -> None:
        device, size = numbers.last.device, len(numbers.last)
        self._memory, self._numbers = memory, numbers
        with torch.inference_mode(False):
            self._cold = ColdCounts(memory.layers, size, device)
            # Kernels advance counts, and compilers want what is written apart from all else: each layer has its own.
            self._counts = [torch.zeros(size + 1, dtype=torch.int32, device=device) for _ in memory.layers]
            self._frozen = {i: x.clone() for i, x in self._cold.of.items()}
        self._forward, self._batch = forward, Batch(memory, *tables, self._counts, self._frozen, numbers.real)
        self._model = memory.model
        if compiled:
            self._model = torch.compile(_of_its_own(memory.model.forward), fullgraph=True, dynamic=False)
        self._graph = Graph(self._run, device)

    @property
    def logits(self) -> Float[Tensor, "seats words"]:
        """What it has written, of all seats."""
        return self._graph.found[0]

    @property
    def likeliest(self) -> Int[Tensor, " seats"]:
        """The tokens of the largest logits."""
        return self._graph.found[1]

    def replay(self) -> None:
        """Does the step."""
        self._graph.replay()

    def close(self) -> None:
        """Lets the graph go and the pages that it reads, of which compilers may hold the batch for longer."""
        self._graph.close()
        for layer in self._batch.layers:
            if isinstance(layer, BatchLayer):
                vars(layer).clear()

    def _run(self) -> tuple[Float[Tensor, "seats words"], Int[Tensor, " seats"]]:
        last, lengths, cold, real = self._numbers
        here = real[:, 0]
        held = lengths * here
        torch._foreach_copy_(self._counts, [F.pad(held, (0, 1))] * len(self._counts))  # pyright: ignore[reportPrivateImportUsage]
        if self._frozen:
            self._cold.set(cold * here)
            frozen = list(self._frozen.values()), list(self._cold.of.values())
            torch._foreach_copy_(*frozen)  # pyright: ignore[reportPrivateImportUsage]
        logits = self._forward(last.clone()[:, None], held.long()[:, None], self._batch, self._model)
        likeliest = logits.argmax(-1)
        last.copy_(torch.where(here, likeliest, last))
        self._memory.count(lengths.add_(here), cold)
        return logits, likeliest


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function by a code of its own: what compilers make of it goes with it, and does not count for others.

    They keep what they have made with the code of the function, which that of a model's class shares with all engines
    of the process; and of one code they make eight variants at most.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)

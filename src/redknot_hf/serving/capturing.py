"""A captured step of a batch of one size: what it reads and writes stays where it is, and a replay is one launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .memory import SeatMemory
from .stepping import Batch, BatchLayer, ColdCounts

Tables = tuple[Mapping[int, Int[Tensor, "seats _heads _columns"]], Mapping[int, Int[Tensor, "seats _heads _columns"]]]
# The model on the next token of each seat: ids, positions and what it takes for its cache.
Forward = Callable[[Tensor, Tensor, Batch, Any], Float[Tensor, "seats words"]]


class CapturedStep:
    """A step of so many seats, as a CUDA graph; on a device without graphs it runs as it is.

    Attributes:
        ids, positions, lengths, real, counts, cold: What a replay reads, to be written before it.
        logits: What it has written.

    Args:
        memory: Whose pages are read.
        tables: Of the seats, hot and cold, by layer.
        size: Seats.
        forward: Runs the model.
        compiled: Compiles the model first (`torch.compile`), so that what lies between products of matrices and
            attention is a few kernels; that takes most of a minute.
    """

    def __init__(self, memory: SeatMemory, tables: Tables, size: int, forward: Forward, compiled: bool) -> None:
        device = next(iter(memory.layers.values())).device
        with torch.inference_mode(False):
            self.ids = torch.zeros(size, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros(size, 1, dtype=torch.long, device=device)
            self.lengths = torch.zeros(size, dtype=torch.int32, device=device)
            self.real = torch.zeros(size, 1, dtype=torch.bool, device=device)
            self.counts = torch.zeros(len(memory.layers), size + 1, dtype=torch.int32, device=device)
            self.cold = ColdCounts(memory.layers, size, device)
            # Kernels advance counts, and compilers want what is written apart from all else: so they get copies.
            self._counts = [x.clone() for x in self.counts]
            self._cold = {i: x.clone() for i, x in self.cold.of.items()}
        self._forward, self._batch = forward, Batch(memory, *tables, self._counts, self._cold, self.real)
        self._model = memory.model
        if compiled:
            self._model = torch.compile(_of_its_own(memory.model.forward), fullgraph=True, dynamic=False)
        self.logits = self._run()  # no seat is real, so this changes nothing but compiles what it calls
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.logits = self._run()

    def replay(self) -> None:
        """Does the step."""
        if self._graph is None:
            self.logits = self._run()
        else:
            self._graph.replay()

    def close(self) -> None:
        """Lets the graph go and the pages that it reads, of which compilers may hold the batch for longer."""
        self._graph = None
        for layer in self._batch.layers:
            if isinstance(layer, BatchLayer):
                vars(layer).clear()

    def _run(self) -> Float[Tensor, "seats words"]:
        torch._foreach_copy_(self._counts, list(self.counts))  # pyright: ignore[reportPrivateImportUsage]
        if self._cold:
            cold = list(self._cold.values()), list(self.cold.of.values())
            torch._foreach_copy_(*cold)  # pyright: ignore[reportPrivateImportUsage]
        return self._forward(self.ids, self.positions, self._batch, self._model)


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function by a code of its own: what compilers make of it goes with it, and does not count for others.

    They keep what they have made with the code of the function, which that of a model's class shares with all engines
    of the process; and of one code they make eight variants at most.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)

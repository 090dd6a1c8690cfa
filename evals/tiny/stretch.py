"""What is counted between two reports of a training."""

import time

import torch
from torch import Tensor


class Stretch:
    """The steps between two reports: their losses, their tokens, their time."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.steps, self.tokens, self.waited = 0, 0, 0.0
        self.started = time.monotonic()
        self._since = self.started

    def wait(self) -> None:
        self._since = time.monotonic()

    def go(self) -> None:
        self.waited += time.monotonic() - self._since

    def add(self, loss: Tensor, tokens: int) -> None:
        self.loss += loss
        self.steps += 1
        self.tokens += tokens

    def figures(self) -> dict[str, float]:
        """Mean loss, tokens a second, and the share of time spent waiting for texts; waits for the device."""
        loss = self.loss.item() / self.steps
        seconds = time.monotonic() - self.started
        return {"loss": loss, "tokens_per_second": self.tokens / seconds, "waited": self.waited / seconds}

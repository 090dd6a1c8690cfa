"""What decides a training of the bundled model."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides a training. A restart must agree in everything but the budget.

    Attributes:
        minutes: Time for the training, compilation and reports included, the final evaluation not.
        steps: Ends the training after so many steps instead, whatever the time.
        plain: Never apply the plan's mask.
        rate: Peak learning rate.
        tokens: Tokens a step.
        max_length: Leaves out longer texts of the curriculum.
        seed: Of the first weights and of all texts.
        skip: Share of the curriculum to leave out at its start, for weights that already retrieve.
    """

    minutes: float | None
    steps: int | None
    plain: bool
    rate: float
    tokens: int
    max_length: int
    seed: int
    skip: float = 0.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError(f"minutes={self.minutes}, steps={self.steps}: give one of the two")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip is {self.skip}: give a share of the curriculum, at least 0 and below 1")
        if self.max_length < 256 or self.tokens % self.max_length:
            raise ValueError(
                f"tokens={self.tokens}, max_length={self.max_length}: a step must hold whole texts of at least 256"
            )

    def check_same(self, other: dict[str, Any]) -> None:
        """Refuse to go on from a training with other settings.

        Raises:
            ValueError: They differ in more than the budget.
        """
        mine = asdict(self)
        differing = {k: (other.get(k), mine[k]) for k in mine if k not in ("minutes", "steps") and other[k] != mine[k]}
        if differing:
            raise ValueError(f"the checkpoint has other settings (its, yours): {differing}; give another --out")

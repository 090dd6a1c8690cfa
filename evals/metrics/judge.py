"""What every metric here is: an `evaluate` module that gives each answer a score between 0 and 1."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import datasets
import evaluate


class Judge(evaluate.Metric, ABC):
    """A metric that judges answers one by one, so that two methods can be compared answer by answer.

    `evaluate.load("evals/metrics/exact_match.py")` makes one, and so does its class.
    """

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        """Return how good an answer is, from 0 to 1.

        Args:
            prediction: What the model answered.
            references: Right answers.
            choices: All answers that were offered, where the question offers some.
        """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
        return evaluate.MetricInfo(description=self.__doc__ or "", citation="", features=features)

    def _compute(  # pyright: ignore[reportIncompatibleMethodOverride]: evaluate passes the features by name
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, float | list[float]]:
        """Return the mean as `score`, and `scores` in the order of the answers."""
        offered = [()] * len(predictions) if choices is None else choices
        scores = [self.score(*judged) for judged in zip(predictions, references, offered, strict=True)]
        return {"score": sum(scores) / len(scores), "scores": scores}

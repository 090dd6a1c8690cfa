"""What judges a plan of the bundled models: held-out texts, and the texts that heads are profiled on."""

from __future__ import annotations

from typing import Any

import torch

from evals.fidelity import fidelity
from evals.tiny.corpus import Exam
from evals.tiny.examination import Part, set_exams
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.profiling import Prompt

JUDGEMENT = 13  # seed of `set_exams`; profiles are made and confirmed on others


class Judge:
    """Held-out texts of one length, and what the dense model says of them."""

    def __init__(self, model: Any, length: int, answers: int) -> None:
        self.model = model
        self.exams = exams(length, answers, JUDGEMENT)
        self.dense = [self.predict(HeadPlan.uniform(model.config, HeadSpec()), exam) for exam in self.exams]

    def __call__(self, plan: HeadPlan) -> dict[str, float | int]:
        """Share of answer tokens that are right under a plan, the dense model's share, and the mean divergence."""
        right, dense_right, kl = [], [], []
        for exam, dense in zip(self.exams, self.dense, strict=True):
            mine, expected = self.predict(plan, exam), torch.from_numpy(exam.ids)[places(exam)]
            right.append(mine.argmax(-1) == expected)
            dense_right.append(dense.argmax(-1) == expected)
            kl += fidelity(dense, mine, expected.tolist()).kl
        shares = {"accuracy": right, "dense_accuracy": dense_right, "kl": [torch.tensor(kl)]}
        means = {name: round(float(torch.cat(found).float().mean()), 8) for name, found in shares.items()}
        return means | {"tokens": sum(map(len, right)), "texts": len(self.exams)}

    @torch.inference_mode()
    def predict(self, plan: HeadPlan, exam: Exam) -> torch.Tensor:
        """Log-probabilities at the answer tokens."""
        ids = torch.from_numpy(exam.ids)[None].to(self.model.device)
        rows = (places(exam) - 1).to(self.model.device)
        cache = RedKnotCache(self.model.config, plan)
        out = self.model(ids, logits_to_keep=rows, **cache_argument(self.model, cache))
        return out.logits[0].float().log_softmax(-1).cpu()


def places(exam: Exam) -> torch.Tensor:
    """Places of the answer tokens."""
    return torch.cat([torch.arange(start, stop) for _, start, stop in exam.answers])


def exams(length: int, answers: int, seed: int) -> list[Exam]:
    """Texts with questions, half of them about facts that run through several documents."""
    parts: tuple[Part, ...] = ("plain", "dependent")
    return [exam for part in parts for exam in set_exams(length, part, -(-answers // 2), seed)]


def prompts(length: int, answers: int, seed: int) -> list[Prompt]:
    """Texts to profile on, whose answers are scored."""
    found = []
    for exam in exams(length, answers, seed):
        scored = torch.zeros(len(exam.ids), dtype=torch.bool)
        scored[places(exam)] = True
        found.append(Prompt(torch.from_numpy(exam.ids), scored, "answers"))
    return found

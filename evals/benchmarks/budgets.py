"""Plans of windows and storages on the bundled models, for budgets of bytes: what the answers lose."""

from __future__ import annotations

import torch

from evals.benchmarks.judge import Judge, places
from evals.tiny.corpus import Exam
from redknot_hf import HeadPlan
from redknot_hf.attention.watching import restricted, watching

CALIBRATION = 11  # seed of the texts that are profiled; `judge` has its own


class InChunks(Judge):
    """Judges what a cache gives that reads in chunks; one that reads a text in a step finds no page of it cold."""

    @torch.inference_mode()
    def predict(self, plan: HeadPlan, exam: Exam) -> torch.Tensor:
        """Log-probabilities at the answer tokens."""
        ids = torch.from_numpy(exam.ids)[None].to(self.model.device)
        with watching(self.model, restricted(plan)):
            out = self.model(ids, logits_to_keep=(places(exam) - 1).to(self.model.device), use_cache=False)
        return out.logits[0].float().log_softmax(-1).cpu()

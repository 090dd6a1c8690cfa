"""Questions for methods, and records of their answers."""

import torch
from families import VOCABULARY

from evals.answering import Question
from evals.measuring import Asked
from evals.method import Context
from evals.records import Records, Run

LENGTH, NEW = 150, 5
MODEL = {"name": "m", "type": "llama", "dtype": "float32", "weights": "0"}


def run(name: str, **identity) -> Run:
    return Run("tiny/plain", 4096, 0, MODEL, {"name": name, **identity}, {"torch": "2"}, {"device": "cpu", "batch": 1})


def records(**scores_by_method) -> Records:
    """Answers of methods with these scores, ten to a context."""
    found = Records({}, {})
    for name, scores in scores_by_method.items():
        one = run(name)
        found.runs[one.key] = one
        for i, score in enumerate(scores):
            near = {
                "tokens": 4, "top1": 4 if score else 1, "top10": 1.0, "kl": [0.0 if score else 1.0] * 4, "nll": 2.0,
                "dense_nll": 1.0, "first_divergence": None if score else 1, "same_answer": bool(score),
            }  # fmt: skip
            cost = {
                "prepare_s": 1.0, "question_s": 0.5, "token_s": 0.01, "resident_bytes": 100 if name == "dense" else 40,
                "peak_bytes": None, "context_tokens": 9, "batch": 1,
            }  # fmt: skip
            found.answers[one.key, str(i)] = {
                "run": one.key, "id": str(i), "context": str(i // 10), "kind": "ab"[i % 2], "answer": "x",
                "score": float(score), "audited": True, "audit_gap": 0.0, "answer_ids": [1], "fidelity": near,
                "cost": cost,
            }  # fmt: skip
    return found


def asked(lengths=(LENGTH,), rows=(0, 0, 0), seed=0) -> Asked:
    """Questions of unequal length about random contexts."""
    generator = torch.Generator().manual_seed(seed)
    contexts = tuple(torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths)
    questions = tuple(
        Question(torch.randint(1, VOCABULARY, (3 + i,), generator=generator), NEW, lambda ids: ids[-1] == 0)
        for i in range(len(rows))
    )
    return Asked(Context(contexts, ((),) * len(contexts), 3 + len(rows) + NEW), questions, tuple(rows))

"""Answers with presses of kvpress, in its virtual environment: token ids come in as JSON lines, records go out.

`evals.peer` starts it. Nothing here may import redknot_hf, which needs a newer transformers. What measures is the same
code as for all other methods.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from evals.answering import Question
from evals.measuring import Asked, measure
from evals.method import Context, Method, by_name, dense

PRESSES = {
    "adakv-expected-attention": lambda ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(compression_ratio=ratio, epsilon=1e-2)
    ),
    "adakv-snapkv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
}


@dataclass(frozen=True)
class Pressed(Method):
    """A dense cache of which a press hides all but a share. The hidden part stays in memory."""

    press: Any = None

    def prepare(self, model: Any, context: Context) -> Cache:
        # A press chooses when it has seen the whole context, so that is read in one step.
        ids = context.ids
        with self.press(model):
            cache = DynamicCache(config=model.config)
            model(input_ids=ids, logits_to_keep=1, **by_name(cache))
        return cache


class Worker:
    """A model and its presses."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        dtype = getattr(torch, job["dtype"])
        model: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
        self.model = model.to(job["device"]).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(job["model"])
        self.end = set(job["end"])
        self.methods = {
            press["name"]: Pressed(press["name"], press=PRESSES[press["press"]](1 - press["kept"]))
            for press in job["presses"]
        }

    def answer(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """Return for each press that has open questions its records, by id."""
        wanted = [id for id in job["questions"] if any(id in ids for ids in job["left"].values())]
        reference = measure(self.model, dense(), self._asked(job, wanted), 1)[1]
        by_id = dict(zip(wanted, reference, strict=True))
        results = []
        for name, ids in job["left"].items():
            held = [by_id[id] for id in ids]
            records, _ = measure(self.model, self.methods[name], self._asked(job, ids), 1, held)
            results.append(dict(zip(ids, records, strict=True)))
        return results

    def _asked(self, job: dict[str, Any], ids: list[str]) -> Asked:
        questions = tuple(self._question(job["questions"][id]) for id in ids)
        room = max(len(question.ids) + question.max_new_tokens for question in questions)
        context = Context((torch.tensor(job["context"]),), ((),), room)
        return Asked(context, questions, (0,) * len(questions)).to(self.model.device)

    def _question(self, job: dict[str, Any]) -> Question:
        stop = job["stop"]

        def done(ids: list[int]) -> bool:
            return ids[-1] in self.end or (stop is not None and stop in self.tokenizer.decode(ids).lstrip("\n"))

        return Question(torch.tensor(job["ids"]), job["max_new_tokens"], done, tuple(job["given"]))


def main() -> None:
    """Serves jobs until there are no more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where it disturbs nothing
    transformers.utils.logging.disable_progress_bar()
    worker = Worker(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        for records in worker.answer(json.loads(line)):
            print(json.dumps(records), file=out, flush=True)


if __name__ == "__main__":
    main()

"""Store documents once, then answer questions about them in any order without reading them again.

Run it from anywhere: `python examples/reuse_documents.py`. The model comes with the repository.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from redknot_hf import HeadPlan, SegmentRef, SegmentStore, assemble, cache_argument, prompt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals/ lies beside examples/, outside the package

from evals.tiny.corpus import Corpus
from evals.tiny.facts import Question
from evals.tiny.lexicon import Lexicon

MODEL = Path(__file__).resolve().parents[1] / "evals" / "tiny"


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the same questions over the documents in several orders; return 1 if reading all is not reproduced."""
    args = parse(argv)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="redknot")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    plan = HeadPlan.load(MODEL / "plan.json", model.config)
    bos, documents, questions = texts(args.documents, args.tokens, args.questions, args.seed)

    store = SegmentStore(model, plan, path=args.store)
    start = time.perf_counter()
    opening = store.add(bos)
    stored = store.add_all(documents, prefix=bos)
    print(f"stored {len(documents)} documents in {time.perf_counter() - start:.2f} s: {store}")

    table = Table("order", "boundary", "built in", "recomputed", "answers right", box=SIMPLE_HEAD)
    right: dict[Any, int] = {}
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.orders):
        order = torch.randperm(len(stored), generator=generator).tolist()
        segments = [opening, *(stored[i] for i in order)]
        for boundary in ("all", args.boundary, 0):
            start = time.perf_counter()
            cache = assemble(model, segments, boundary=boundary)
            seconds = time.perf_counter() - start
            good = sum(answer(model, tokenizer, cache, segments, question) for question in questions)
            right[boundary] = right.get(boundary, 0) + good
            share = cache.recomputed_tokens / cache.get_seq_length()
            table.add_row(
                " ".join(map(str, order)),
                str(boundary),
                f"{seconds:.2f} s",
                f"{share:.0%}",
                f"{good}/{len(questions)}",
            )
    Console().print(table)
    print(store)
    # Reading all again is what the others are judged by; an example that cannot do that shows nothing.
    return 0 if right["all"] > 0 else 1


def texts(documents: int, tokens: int, questions: int, seed: int) -> tuple[list[int], list[list[int]], list[Question]]:
    """Return the token that begins every text, documents, and questions about single facts in them."""
    lexicon = Lexicon()
    made = Corpus(lexicon, seed).collection(documents * tokens, questions, ("code", "place"), documents)
    starts = [i for i, token in enumerate(made.context) if token == lexicon.id["<doc>"]]
    ends = [*starts[1:], len(made.context)]
    return made.context[:1], [made.context[a:b] for a, b in zip(starts, ends, strict=True)], made.questions


def answer(model: Any, tokenizer: Any, cache: Any, segments: list[SegmentRef], question: Question) -> bool:
    """Ask one question on a fork of the cache, by plain `generate`; tell whether the answer is right."""
    inputs = prompt(segments, question.prompt, model.device)
    end = tokenizer.convert_tokens_to_ids(".")
    fork = copy.deepcopy(cache)
    output = model.generate(
        **inputs, **cache_argument(model, fork), max_new_tokens=len(question.answer) + 1, eos_token_id=end
    )
    return output[0, inputs["input_ids"].shape[1] :].tolist() == [*question.answer, end]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of a document (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--orders", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--boundary", type=float, default=0.1, help="share recomputed (default: %(default)s)")
    parser.add_argument("--store", type=Path, help="folder to keep the documents in, for the next run too")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

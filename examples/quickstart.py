"""Answer questions about 8K tokens of documents with a dense KV cache and with a head-aware one, and compare.

Run it from anywhere: `python examples/quickstart.py`. The model comes with the repository.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils.logging import disable_progress_bar

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # evals/ lies beside examples/, outside the package

from evals.tiny.corpus import Collection, Corpus
from evals.tiny.lexicon import Lexicon

MODEL = Path(__file__).resolve().parents[1] / "evals" / "tiny"
CHUNK = 1024  # tokens the model reads at once
MIB = 2**20

AnyCache = DynamicCache | RedKnotCache


@dataclass(frozen=True)
class Run:
    """What one cache did with the documents and the questions."""

    name: str
    nbytes: dict[int, int]  # resident bytes at each length read
    read_seconds: float
    answers: list[list[int]]
    answer_seconds: float

    def right(self, collection: Collection, end: int) -> int:
        return sum(a == [*q.answer, end] for a, q in zip(self.answers, collection.questions, strict=True))

    def same(self, other: "Run") -> int:
        pairs = zip(self.answers, other.answers, strict=True)
        return sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the caches; return 1 when RedKnot with all heads global is not exact."""
    args = parse(argv)
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    dense, model = load("sdpa", device), load("redknot", device)

    collection = Corpus(Lexicon(), args.seed).collection(args.length, args.questions)
    end = tokenizer.convert_tokens_to_ids(".")
    all_global = HeadPlan.uniform(model.config, HeadSpec())
    plan = HeadPlan.load(MODEL / "plan.json", model.config)
    print(f"{len(collection.context)} tokens of documents, {args.questions} questions, on {device}.")
    print(plan)

    runs = [
        run("DynamicCache", dense, lambda: DynamicCache(config=dense.config), collection, end),
        run("RedKnot, all global", model, lambda: RedKnotCache(model.config, all_global), collection, end),
        run("RedKnot, plan.json", model, lambda: RedKnotCache(model.config, plan), collection, end),
    ]
    Console().print(table(runs, collection, end))
    question, answers = collection.questions[0], [tokenizer.decode(one.answers[0]) for one in runs]
    print(f"The first {tokenizer.decode(question.prompt)} {' | '.join(answers)}")
    draw(runs, args.figure)
    print(f"KV bytes over length: {args.figure}")
    if args.json:
        args.json.write_text(json.dumps(summary(runs, collection, end), indent=1) + "\n")
    if runs[1].answers != runs[0].answers:
        print("With all heads global the tokens must be those of DynamicCache, and they are not.", file=sys.stderr)
        return 1
    return 0


def load(attn_implementation: str, device: str) -> Any:
    """Load the bundled model."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation=attn_implementation
    )
    return model.to(device)


def run(name: str, model: Any, new_cache: Callable[[], AnyCache], collection: Collection, end: int) -> Run:
    """Read the documents once, then answer each question on a fork of the cache."""
    read(model, new_cache(), collection.context[:CHUNK])  # warm up
    cache = new_cache()
    start = now()
    sizes = read(model, cache, collection.context)
    read_seconds = now() - start
    if isinstance(cache, RedKnotCache):
        print(cache)

    answers, answer_seconds = [], 0.0
    for question in track(collection.questions, description=name):
        fork = copy.deepcopy(cache)  # a RedKnotCache shares its pages with its forks, a DynamicCache copies all
        start = now()
        answers.append(answer(model, fork, collection.context + question.prompt, end))
        answer_seconds += now() - start
    return Run(name, sizes, read_seconds, answers, answer_seconds)


@torch.no_grad()
def read(model: Any, cache: AnyCache, context: list[int]) -> dict[int, int]:
    """Prefill the cache with the context, in chunks, and return its resident bytes after each."""
    ids = torch.tensor([context], device=model.device)
    sizes = {}
    for chunk in ids.split(CHUNK, dim=1):
        model(input_ids=chunk, logits_to_keep=1, **cache_argument(model, cache))
        sizes[cache.get_seq_length()] = resident(cache)
    return sizes


def answer(model: Any, cache: AnyCache, prompt: list[int], end: int) -> list[int]:
    """Generate up to the end of the sentence. The cache holds the context, so only the question is read."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=end, **cache_argument(model, cache)
    )
    return output[0, len(prompt) :].tolist()


def now() -> float:
    """Return the time when the device is done with all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(cache: AnyCache) -> int:
    """Return the bytes of keys and values that a cache holds."""
    if isinstance(cache, RedKnotCache):
        return cache.nbytes
    return sum(tensor.nbytes for keys, values, *_ in cache for tensor in (keys, values) if tensor is not None)


def table(runs: list[Run], collection: Collection, end: int) -> Table:
    """Put the runs side by side. The first is what the others are measured against."""
    dense = runs[0]
    n_tokens = sum(map(len, dense.answers))
    length = len(collection.context)
    names = ("answers right", "same tokens", "KV bytes", "of dense", "reading", "per answer")
    numbers = (Column(name, justify="right", min_width=8) for name in names)
    result = Table(Column("cache", no_wrap=True), *numbers, box=SIMPLE_HEAD, padding=(0, 0))
    for one in runs:
        result.add_row(
            one.name,
            f"{one.right(collection, end)}/{len(collection.questions)}",
            f"{one.same(dense)}/{n_tokens}",
            f"{one.nbytes[length] / MIB:.1f} MiB",
            f"{one.nbytes[length] / dense.nbytes[length]:.0%}",
            f"{one.read_seconds:.1f} s",
            f"{1e3 * one.answer_seconds / len(one.answers):.0f} ms",
        )
    return result


def summary(runs: list[Run], collection: Collection, end: int) -> dict[str, Any]:
    """Put the figures of the table, and what they were taken on, in a form for files."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "tokens": len(collection.context),
        "caches": {
            one.name: {
                "right": one.right(collection, end),
                "same_tokens": one.same(runs[0]),
                "answer_tokens": sum(map(len, one.answers)),
                "kv_bytes": one.nbytes[len(collection.context)],
                "read_s": round(one.read_seconds, 3),
                "answer_s": round(one.answer_seconds / len(one.answers), 4),
            }
            for one in runs
        },
    }


def draw(runs: list[Run], path: Path) -> None:
    """Draw resident bytes over length into an image file."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for one, style in zip(runs, ("-", "--", "-"), strict=True):
        axes.plot(list(one.nbytes), [n / MIB for n in one.nbytes.values()], style, label=one.name)
    axes.set(xlabel="tokens read", ylabel="resident KV (MiB)", xlim=0, ylim=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8448, help="most tokens of documents (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of documents and questions (default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("quickstart.png"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the figures of the table")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

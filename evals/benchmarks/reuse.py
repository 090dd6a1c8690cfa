"""What reusing stored documents costs in quality, and saves in time, by how much of them is recomputed.

    python -m evals bench reuse --out evals/results/reuse.jsonl --figure evals/results/reuse.png

Every context is 8 documents of 1K tokens in the bundled model's language, and 24 questions; single facts, with the
documents in random order, and facts that run through several documents, in theirs, are reported apart. All methods
see the same questions. `read whole` is what they are held against: the whole context read under the same plan. Answers
are judged under their true beginning, so an answer is right if greedy decoding would have written it. Intervals are
95 %, by bootstrap over contexts. Times are of building the cache: `cold` with storing all documents, `hot` with them
in memory.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from evals.benchmarks.options import DEVICE, Device, Out, command
from evals.intervals import check_intervals, mean
from evals.result_file import write_line
from evals.tiny.corpus import Corpus
from evals.tiny.facts import DEPENDENT_KINDS, KINDS, Question
from evals.tiny.lexicon import Lexicon
from redknot_hf import (
    AssembledCache,
    HeadPlan,
    RedKnotCache,
    SegmentRef,
    SegmentStore,
    assemble,
    cache_argument,
    refresh,
)

app = command()

TINY = Path(__file__).parents[1] / "tiny"
PARTS = {"single facts": KINDS, "dependent facts": DEPENDENT_KINDS}
# Seeds of texts that the model was not trained on.
SEED = 20_000
WHOLE = "read whole"


@dataclass(frozen=True)
class Case:
    """A context and what is asked about it.

    Attributes:
        part: Of `PARTS`.
        documents: Token ids; the first is the `<bos>` that every text begins with.
    """

    part: str
    documents: list[list[int]]
    questions: list[Question]

    @property
    def ids(self) -> list[int]:
        return [token for document in self.documents for token in document]


@dataclass
class Scores:
    """What a method did, question by question.

    Attributes:
        context: Which context the question is of.
        kind: Kind of the question.
        right: The answer was.
        kl: Of the reference's next tokens against the method's, in nats, mean over the answer.
        cold, hot: Seconds to build each context's cache.
        recomputed: Share of each context's tokens that went through the model.
    """

    context: list[int] = field(default_factory=list)
    kind: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)


Build = Callable[[Any, list[SegmentRef]], RedKnotCache]


@dataclass(frozen=True)
class Method:
    """A way to a context's cache: from which store, behind which prefix, and how."""

    keep: str | None
    prefix: bool
    build: Build


def only_prefix(ref: SegmentRef, start: int) -> Any:
    """Reuses what a prefix cache would: segments behind exactly what they were stored behind."""
    return "all"


def methods() -> dict[str, Method]:
    """All methods by name, from least to most recomputing."""
    return {
        "naive, no prefix": Method("plan", False, lambda m, refs: assemble(m, refs, boundary=0)),
        "naive": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=0)),
        "boundary 16 tokens": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=16)),
        "boundary 5 %": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=0.05)),
        "boundary 10 %": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=0.1)),
        "boundary 20 %": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=0.2)),
        "boundary 50 %": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=0.5)),
        "deviation 15 %": Method("full", True, lambda m, refs: refresh(m, refs, share=0.15)),
        "attention 15 %": Method("full", True, lambda m, refs: refresh(m, refs, share=0.15, by="attention")),
        "prefix cache only": Method("plan", True, lambda m, refs: assemble(m, refs, boundary=only_prefix)),
        "boundary all": Method("plan", True, lambda m, refs: assemble(m, refs, boundary="all")),
    }


def cases(part: str, count: int, documents: int, tokens: int, questions: int) -> Iterator[Case]:
    """Contexts of one part, always the same."""
    lexicon = Lexicon()
    begin = lexicon.id["<doc>"]
    for i in range(count):
        seed = SEED + i + 1000 * list(PARTS).index(part)
        made = Corpus(lexicon, seed).collection(documents * tokens, questions, PARTS[part], documents)
        seams = [0, *(at for at, token in enumerate(made.context) if token == begin), len(made.context)]
        bos, *parts = [made.context[a:b] for a, b in pairwise(seams)]
        if part == "single facts":
            np.random.default_rng(seed).shuffle(parts)
        yield Case(part, [bos, *parts], made.questions)


def answers(model: Any, cache: Any, case: Case, *, shared: bool = True) -> list[Tensor]:
    """Log-probabilities of the tokens of each answer, `[answer tokens, vocabulary]`, all questions in one batch.

    Args:
        model: Runs on what the cache is of.
        cache: Holds the context once, which all questions share, or once for each question.
        case: The context and its questions.
        shared: Which of both.
    """
    cache = copy.deepcopy(cache)
    if shared:
        cache.batch_repeat_interleave(len(case.questions))
    texts = [[*q.prompt, *q.answer] for q in case.questions]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=model.device)
    length = len(case.ids)
    real = torch.tensor([[1] * (length + len(text)) + [0] * (longest - len(text)) for text in texts])
    places = length + torch.arange(longest).expand(len(texts), -1)
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=real.to(model.device), position_ids=places.to(model.device),
            **cache_argument(model, cache),
        ).logits  # fmt: skip
    return [
        row[len(q.prompt) - 1 : len(q.prompt) + len(q.answer) - 1].float().log_softmax(-1).cpu()
        for row, q in zip(logits, case.questions, strict=True)
    ]


def score(scores: Scores, index: int, case: Case, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Judges the answers to one context's questions."""
    for question, mine, theirs in zip(case.questions, found, wanted, strict=True):
        scores.context.append(index)
        scores.kind.append(question.kind)
        scores.right.append(mine.argmax(-1).tolist() == question.answer)
        scores.kl.append(max(0.0, float((theirs.exp() * (theirs - mine)).sum(-1).mean())))


def read_whole(model: Any, cache: Any, case: Case) -> float:
    """Reads a context into a cache; returns the seconds it took."""
    start = time.perf_counter()
    ids = torch.tensor([case.ids], device=model.device)
    with torch.no_grad():
        for chunk in ids.split(2048, 1):
            model(input_ids=chunk, logits_to_keep=1, **cache_argument(model, cache))
    _synchronize(model)
    return time.perf_counter() - start


def measure(model: Any, plan: HeadPlan, all_cases: Sequence[Case], chosen: dict[str, Method]) -> dict[str, Scores]:
    """Runs all methods on all contexts."""
    results = {name: Scores() for name in ["dense", WHOLE, *chosen]}
    for index, case in enumerate(track(all_cases, description="contexts")):
        whole, dense = RedKnotCache(model.config, plan), DynamicCache(config=model.config)
        seconds = {WHOLE: read_whole(model, whole, case)}
        model.set_attn_implementation("sdpa")
        seconds["dense"] = read_whole(model, dense, case)
        found = {"dense": answers(model, dense, case)}
        model.set_attn_implementation("redknot")
        found[WHOLE] = answers(model, whole, case)
        for name in ("dense", WHOLE):
            _note(results[name], seconds[name], seconds[name], 1.0)
        stores: dict[tuple[str | None, bool], tuple[list[SegmentRef], float]] = {}
        for name, method in chosen.items():
            key = method.keep, method.prefix
            if key not in stores:
                stores[key] = _stored(model, plan, case, method)
            refs, storing = stores[key]
            start = time.perf_counter()
            cache = method.build(model, refs)
            _synchronize(model)
            hot = time.perf_counter() - start
            assert isinstance(cache, AssembledCache)
            _note(results[name], storing + hot, hot, cache.recomputed_tokens / len(case.ids))
            found[name] = answers(model, cache, case)
        for name, mine in found.items():
            score(results[name], index, case, mine, found[WHOLE])
    return results


def _note(scores: Scores, cold: float, hot: float, recomputed: float) -> None:
    scores.cold.append(cold)
    scores.hot.append(hot)
    scores.recomputed.append(recomputed)


def _stored(model: Any, plan: HeadPlan, case: Case, method: Method) -> tuple[list[SegmentRef], float]:
    """The documents in a store, and the seconds it took; the store's check of the model is not part of it."""
    store = SegmentStore(model, plan, keep=method.keep or "plan", identity="evaluated")
    store.verdict()
    start = time.perf_counter()
    bos, *documents = case.documents
    refs = [store.add(bos), *store.add_all(documents, bos if method.prefix else None)]
    _synchronize(model)
    return refs, time.perf_counter() - start


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def summary(results: dict[str, Scores], part: str, about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a method: figures with their intervals, and what they were taken on."""
    whole = results[WHOLE]
    records = []
    for name, scores in results.items():
        right, reference = np.array(scores.right, float), np.array(whole.right, float)
        by_kind = {
            kind: f"{int(right[(which := np.array(scores.kind) == kind)].sum())}/{which.sum()}"
            for kind in dict.fromkeys(scores.kind)
        }
        records.append(
            {
                "part": part,
                "method": name,
                "questions": len(right),
                "accuracy": mean(scores.context, right.tolist()).to_json(),
                "accuracy_minus_whole": mean(scores.context, (right - reference).tolist()).to_json(),
                "kl": mean(scores.context, scores.kl).to_json(),
                "recomputed": float(np.mean(scores.recomputed)),
                "cold_s": float(np.median(scores.cold)),
                "hot_s": float(np.median(scores.hot)),
                "by_kind": by_kind,
                **about,
            }
        )
    return records


def table(records: Sequence[dict[str, Any]], part: str) -> Table:
    """The records of one part, for people."""
    made = Table("method", title=part)
    for name in ("right", "minus whole, points", "KL", "recomputed", "cold", "hot"):
        made.add_column(name, justify="right")
    for record in records:
        made.add_row(
            record["method"],
            f"{100 * record['accuracy'][0]:.1f} %",
            _with_ends([None if x is None else 100 * x for x in record["accuracy_minus_whole"]], "+.1f"),
            _with_ends(record["kl"], ".2g"),
            f"{record['recomputed']:.0%}",
            f"{record['cold_s']:.2f} s",
            f"{record['hot_s']:.2f} s",
        )
    return made


def _with_ends(estimate: Sequence[float | None], form: str) -> str:
    """A figure with its interval, if there are contexts enough for one."""
    value, low, high = (None if x is None else format(x, form) for x in estimate)
    return f"{value} ({low} to {high})" if low else f"{value}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """KL and accuracy over the share of tokens that are recomputed."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for part, colour in zip(PARTS, ("tab:blue", "tab:red"), strict=False):
        mine = [r for r in records if r["part"] == part and r["method"] not in ("dense", WHOLE)]
        lines = [r for r in mine if r["method"].startswith(("naive", "boundary")) and "no prefix" not in r["method"]]
        for axes, name, scale in ((left, "kl", 1), (right, "accuracy_minus_whole", 100)):
            x, y = (
                [100 * r["recomputed"] for r in lines],
                [[scale * (r[name][0] if v is None else v) for v in r[name]] for r in lines],
            )
            middle, low, high = zip(*y, strict=True)
            axes.plot(x, middle, "o-", color=colour, label=f"boundary, {part}")
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            for method, marker in (("deviation 15 %", "s"), ("attention 15 %", "^"), ("naive, no prefix", "x")):
                for r in (r for r in mine if r["method"] == method):
                    label = f"{method}, {part}"
                    axes.plot(100 * r["recomputed"], scale * r[name][0], marker, color=colour, label=label)
    left.set(xlabel="recomputed tokens, %", ylabel="KL(read whole, reused), nats")
    left.set_yscale("symlog", linthresh=1e-5)
    right.set(xlabel="recomputed tokens, %", ylabel="answers right, points above reading whole")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


@app.command(help=__doc__)
def main(
    contexts: Annotated[int, typer.Option(help="contexts of single facts")] = 21,
    dependent: Annotated[int, typer.Option(help="contexts of dependent facts")] = 21,
    documents: Annotated[int, typer.Option(help="a context")] = 8,
    tokens: Annotated[int, typer.Option(help="a document")] = 1024,
    questions: Annotated[int, typer.Option(help="a context")] = 24,
    names: Annotated[list[str], typer.Option("--method", help="by name; all, unless said otherwise")] = [],
    plan: Annotated[Path, typer.Option(help="head plan")] = TINY / "plan.json",
    device: Device = DEVICE,
    out: Out = None,
    figure: Annotated[Path | None, typer.Option(help="file for the figure")] = None,
) -> None:
    """Measures, prints tables, and writes what was asked for; the records are appended."""
    check_intervals(max(contexts, dependent))
    disable_progress_bar()
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    model.to(device)
    held = HeadPlan.load(plan, model.config)
    chosen = {name: method for name, method in methods().items() if not names or name in names}
    about = {
        "documents": documents, "tokens": tokens, "plan": plan.name, "global": held.num_global,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    records = []
    for part, count in zip(PARTS, (contexts, dependent), strict=True):
        made = list(cases(part, count, documents, tokens, questions))
        if made:
            found = summary(measure(model, held, made, chosen), part, about)
            Console(width=130).print(table(found, part))
            records += found
    for record in records if out else ():
        write_line(out, record, torch.device(device))
    if figure:
        draw(records, figure)

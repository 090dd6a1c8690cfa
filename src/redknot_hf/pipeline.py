"""`pipeline("redknot-text-generation")`: text in, text out; a context is read once for all its questions.

Importing the package registers it. The call is that of kvpress' pipeline: a context, and a question or several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Pipeline, TextIteratorStreamer
from transformers.pipelines import PIPELINE_REGISTRY

from redknot_hf.cache.argument import cache_argument
from redknot_hf.cache.cache import RedKnotCache
from redknot_hf.plan.formats import AnyPath
from redknot_hf.plan.plan import HeadPlan, as_plan
from redknot_hf.reuse.ask import answers
from redknot_hf.text.seams import Seams

TASK = "redknot-text-generation"
# Tokens of a context that run through the model at once.
_CHUNK = 8192


class RedKnotPipeline(Pipeline):
    """Answers questions about long contexts, with a cache that keeps what a plan says.

    `pipeline("redknot-text-generation", model=..., plan="plan.json")(context, question="Who?", max_new_tokens=20)`

    Args:
        plan: What each head keeps: a plan or the file of one.
        budget: In place of a plan the share of the dense cache's bytes to keep, 0 to 1: the model's heads are then
            profiled before the first text, which takes minutes. Beside a `plan` that is a file the profile's plan is
            written there, and read from there where the file is there already.
        profile_length: Tokens of the prompts that a budget's profile is measured on.
        chat, system, separator: How texts become tokens, as `Seams` has them.
        page_size, impl: Of the caches.
        kwargs: As any pipeline's: `model`, `tokenizer`, `device` and so on.

    Raises:
        ValueError: Neither a plan nor a budget is given; or a budget beside a plan that is no file, that the file's
            plan was not made for, or whose file has no folder; or the plan does not fit the model.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def __init__(
        self,
        *args: Any,
        plan: HeadPlan | AnyPath | None = None,
        budget: float | None = None,
        profile_length: int = 4096,
        chat: bool | None = None,
        system: str | None = None,
        separator: str = "\n\n",
        page_size: int = 64,
        impl: str | None = None,
        **kwargs: Any,
    ) -> None:
        if plan is None and budget is None:
            raise ValueError(
                "give a plan, or a budget, such as plan='plan.json', budget=0.3: the file is written where it is not "
                "there yet; redknot profile MODEL --out plan.json makes one too"
            )
        if isinstance(plan, HeadPlan) and budget is not None:
            raise ValueError(f"plan={plan!r} and budget={budget}: a plan keeps what it says; leave the budget out")
        super().__init__(*args, **kwargs)
        if self.model.config._attn_implementation != "redknot":
            self.model.set_attn_implementation("redknot")
        self.seams = Seams(self.tokenizer, chat=chat, system=system, separator=separator)
        self.cache_options = {"page_size": page_size, "impl": impl}
        self.plan = self._planned(plan, budget, profile_length)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        context: str | Sequence[str],
        question: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> Any:
        """Answers a question about a context, or several, of which the context is read once.

        Args:
            context: What the questions are about; or a list of contexts, each read and asked in turn.
            question: One.
            questions: Several.
            batch_size: Questions that are answered together.
            options: Of `generate`.

        Returns:
            `{"answer": text}`, or `{"answers": [texts]}` where there are `questions`; a list of these for a list of
            contexts.

        Raises:
            ValueError: There is not one of `question` and `questions`, or one is no text.
        """
        if not isinstance(context, str):
            return [self(one, question, questions=questions, batch_size=batch_size, **options) for one in context]
        if (question is None) == (questions is None):
            raise ValueError("give a question, or a list of questions")
        asked = [question] if questions is None else questions
        if isinstance(asked, str) or not asked:
            raise ValueError(f"questions={asked!r:.40}: give a list with a question in it, or question=...")
        found = self.run_single(context, {"asked": asked}, {"batch_size": batch_size, "options": options}, {})
        return {"answer": found[0]} if questions is None else {"answers": found}

    def stream(self, context: str, question: str, **options: Any) -> Iterator[str]:
        """Yields the answer to a question piece by piece, while it is made; as the pipeline's call."""
        streamer: Any = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore

        def run() -> None:
            try:
                self(context, question, streamer=streamer, **options)
            finally:
                streamer.end()  # whoever listens must not wait for a call that failed

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run)
            yield from streamer
            running.result()

    def preprocess(self, input_: str, asked: Sequence[str]) -> dict[str, Any]:  # pyright: ignore
        """Makes tokens of a context and of what is asked."""
        ids = torch.tensor([[*self.seams.head, *self.seams.document(input_)]])
        return {"context": ids, "suffixes": [self.seams.question(text) for text in asked]}

    def _forward(self, input_tensors: dict[str, Any], batch_size: int, options: dict[str, Any]) -> dict[str, Any]:  # pyright: ignore
        context, suffixes = input_tensors["context"], input_tensors["suffixes"]
        cache = RedKnotCache(self.model.config, self.plan, **self.cache_options)
        for chunk in context.split(_CHUNK, 1):
            self.model(input_ids=chunk, logits_to_keep=1, **cache_argument(self.model, cache))
        return {"answers": list(answers(self.model, cache, context, suffixes, batch_size, **options))}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[str]:  # pyright: ignore
        """Makes texts of answers."""
        return [self.seams.answer(ids) for ids in model_outputs["answers"]]

    def _sanitize_parameters(self, **pipeline_parameters: Any) -> tuple[dict[str, Any], ...]:  # pyright: ignore
        if pipeline_parameters:
            raise TypeError(
                f"{', '.join(pipeline_parameters)}: no option of {TASK}; options of generate go with the question"
            )
        return {}, {}, {}

    def _planned(self, plan: HeadPlan | AnyPath | None, budget: float | None, length: int) -> HeadPlan:
        """What was given, or what a profile of the model finds for a budget, written to the file that was named."""
        path = None if plan is None or isinstance(plan, HeadPlan) else Path(plan)
        if budget is None or (path is not None and path.exists()):
            found = as_plan(plan, self.model.config)
            made_for = found.provenance.get("budget")
            if budget is not None and made_for != budget:
                raise ValueError(f"{plan} was made for budget={made_for}, not {budget}: name another file")
            return found
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"plan={str(path)!r}: there is no folder {path.parent} to write the plan to: make it")
        from redknot_hf.profiling import calibration_prompts, profile_heads

        prompts = calibration_prompts(self.tokenizer, length=length, count=8)
        found = profile_heads(self.model, prompts, budget=budget).plan()
        if path is not None:
            found.save(path)
        return found


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=RedKnotPipeline, pt_model=AutoModelForCausalLM)

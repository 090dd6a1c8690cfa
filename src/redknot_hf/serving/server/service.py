"""What all routes share: the engine, its words, its limits, and what is counted."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redknot_hf.serving.load import Load
from redknot_hf.serving.sizes import longest
from redknot_hf.serving.stops import ends_of

from .answers import Answers
from .bodies import Asked
from .errors import RequestError
from .library import Context, Library
from .metrics import Metrics
from .post import Post
from .prompts import Prompts
from .sampling import model_defaults, sampling_of
from .served import Served
from .settings import Settings
from .wording import Wording


@dataclass(frozen=True)
class Question:
    """One prompt of a request.

    Attributes:
        ids: Of the prompt.
        new: Tokens of an answer at most.
        context: What stands before it.
    """

    ids: Sequence[int]
    new: int
    context: Context


class Service:
    """An engine as routes see it.

    Attributes:
        longest: Tokens of a prompt and its answer, at most.
        draining: What is under way is finished, and nothing new is taken.

    Args:
        engine: With a tokenizer.
        settings: Of the server.
        load: Tells what the engine has to do and holds.

    Raises:
        ValueError: The engine has no tokenizer.
    """

    def __init__(self, engine: Served, settings: Settings, load: Callable[[Any], Load] = Load.of) -> None:
        if engine.tokenizer is None:
            raise ValueError("a server reads and writes text: make the engine with tokenizer=")
        self.engine, self.settings = engine, settings
        self.load = partial(load, engine)
        self.prompts = Prompts(engine.tokenizer, settings.chat_template)
        self.library = Library(engine, self.prompts)
        self.metrics = Metrics(engine, load)
        self.defaults = model_defaults(engine.model.generation_config)
        self.longest = longest(engine.memory.ever_fits, engine.max_len)
        self.started = time.time()
        self.draining = False
        self._ends = ends_of(engine.model)
        self._post: Post | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are taken now."""
        return self.engine.alive and not self.draining

    def check_model(self, name: str | None) -> None:
        """Checks that a client means the model that is served here.

        Raises:
            RequestError: It means another one.
        """
        if name not in (None, self.settings.name):
            raise RequestError(
                404, f"the model here is {self.settings.name}: see /v1/models", "model_not_found", "model"
            )

    def room(self, ids: Sequence[int], new: int | None, usual: int | None = None, before: int = 0) -> int:
        """New tokens that an answer to a prompt may have.

        Args:
            ids: The prompt.
            new: That were asked for.
            usual: Where none were asked for; else as many as fit.
            before: Tokens of segments that stand before it.

        Raises:
            RequestError: The prompt and so many do not fit.
        """
        tokens = before + len(ids)
        left = self.longest - tokens + 1  # the last token of an answer is not read
        if left < 1 or (new is not None and new > left):
            wanted = "" if new is None else f" and {new} new ones"
            raise RequestError(
                400, f"{tokens} tokens of prompt{wanted} are more than the {self.longest} that fit: ask for less",
                "context_length_exceeded",
            )  # fmt: skip
        return new if new is not None else min(left, usual or left)

    def ask(
        self,
        number: str,
        questions: Sequence[Question],
        n: int,
        asked: Asked,
        logprobs: int | None = None,
        parser: Any = None,
    ) -> Answers:
        """Asks the engine.

        Args:
            number: Of the HTTP request.
            questions: That are asked.
            n: Answers to each.
            asked: How they are chosen.
            logprobs: Of how many tokens beside the chosen one.
            parser: Tells thoughts and calls from text; copied for each answer.

        Raises:
            RequestError: It is refused.
        """
        if (count := n * len(questions)) > self.settings.max_answers:
            raise RequestError(
                400, f"{count} answers are more than the {self.settings.max_answers} of a request", param="n"
            )
        if self._post is None or self._post.loop is not asyncio.get_running_loop():
            self._post = Post()
        answers = Answers(self.engine, self._post, number)
        for one in questions:
            sampling = sampling_of(asked, self.defaults, one.new, logprobs)
            ends = [*sampling.stop_ids, *(() if sampling.ignore_eos else self._ends)]
            words = [Wording(self.prompts.tokenizer, sampling.stop, ends, copy.deepcopy(parser)) for _ in range(n)]
            more: dict[str, Any] = {"timeout": self.settings.timeout}
            if one.context.refs:
                more |= {"segments": one.context.refs, "boundary": one.context.boundary}
            try:
                answers.ask(one.ids, sampling, words, **more)
            except RequestError as e:
                if e.status_code == 429:
                    e.headers = {"retry-after": str(self.metrics.seconds_to_a_place)}
                raise
        return answers

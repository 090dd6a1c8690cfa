"""RULER's words to count: the most common of a list, and the most frequent of a coded text."""

from string import ascii_lowercase

import numpy as np

from evals.task import Example
from evals.tasks.vocabulary import distinct, letters, listed_words

COMMON = 10
LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
LIST_QUESTION = "Question: What are the 10 most common words in the above list?"
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
# Prompts below this length repeat their words less, and so does the list that shows how to answer.
SHORT = 4096


def common_words(rng: np.random.Generator, index: int, size: int, length: int) -> Example:
    """See `Draw`: ten words often, `size` others seldom, after a smaller list with its answer."""
    often, seldom, shown = (6, 1, (3, 1, 10)) if length < SHORT else (30, 3, (10, 3, 30))
    words = listed_words(rng, 2 * COMMON + shown[2] + size)
    example, words = words[: COMMON + shown[2]], words[COMMON + shown[2] :]
    answer = " ".join(f"{i + 1}. {word}" for i, word in enumerate(example[:COMMON]))
    return Example(
        id="",
        context=_listed(rng, example, *shown[:2])
        + f"{LIST_QUESTION}{LIST_PREFIX} {answer}\n"
        + _listed(rng, words, often, seldom),
        question=LIST_QUESTION,
        answers=tuple(words[:COMMON]),
        max_new_tokens=120,
        answer_prefix=LIST_PREFIX,
    )


def _listed(rng: np.random.Generator, words: list[str], often: int, seldom: int) -> str:
    repeated = words[:COMMON] * often + words[COMMON:] * seldom
    order = rng.permutation(len(repeated))
    return LIST + " ".join(f"{i + 1}. {repeated[j]}" for i, j in enumerate(order)) + "\n"


def frequent_words(rng: np.random.Generator, index: int, size: int, length: int) -> Example:
    """See `Draw`: `size` coded words, the k-th most frequent about `size / k ** 2` times (Zipf with exponent 2).

    The most frequent of all is noise ("..."), the three after it are asked for.
    """
    vocabulary = ["...", *distinct(rng, lambda rng: letters(rng, 6, ascii_lowercase), max(50, length // 50))]
    shares = 1 / np.arange(1, len(vocabulary) + 1) ** 2
    counts = (size * shares * 6 / np.pi**2).astype(int)
    text = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
    return Example(
        id="",
        context="Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. " + " ".join(text[i] for i in rng.permutation(len(text))) + "\n",
        question="Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        answers=tuple(vocabulary[1:4]),
        max_new_tokens=50,
        answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    )

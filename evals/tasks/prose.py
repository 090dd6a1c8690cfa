"""Plain prose without end, about nothing that is asked for: what needles are hidden in.

Written for this project. A text file may take its place, as RULER hides its needles in essays.
"""

import re
from pathlib import Path

import numpy as np

from evals.tasks.vocabulary import adjectives, listed, nouns, pick, with_articles

PEOPLE = listed(
    "my aunt,my neighbor,the old clerk,the new teacher,her brother,his sister,the miller,the woman next door,"
    "the doctor,the man at the station,our guide,the youngest child,the librarian,the gardener,a friend of mine"
)
PLACES = listed(
    "by the river,near the old mill,on the hill,behind the school,at the market,in the upper valley,"
    "along the north road,at the edge of the forest,beside the harbor,in the courtyard,under the bridge,"
    "across the meadow,at the end of the lane,in the back room,on the far shore"
)
TIMES = listed(
    "in the morning,late in autumn,after the rain,before supper,on market days,in a cold spring,once a year,"
    "during the holidays,at dusk,when the roads were bad,all through the winter,on the first warm day,"
    "years ago,that same week,as soon as the bells had rung"
)
TEMPLATES = (
    "{Time}, {person} used to walk {place} and think about nothing in particular.",
    "There was a {adjective} {noun} {place}, and nobody could say who had left it there.",
    "{Person} always said that a {adjective} {noun} is worth more than a {adjective2} one.",
    "It is easy to forget how much patience a {noun} asks of those who look after it.",
    "{Time}, the whole street smelled of bread and wet leaves.",
    "If you had asked {person}, you would have heard the story of the {adjective} {noun} from the beginning.",
    "The {noun} {place} had been painted twice, but the first color still showed at the corners.",
    "Nothing happens quickly {place}, and most people there would not want it otherwise.",
    "{Person} kept a {noun} in the cupboard, wrapped in paper, for reasons that were never explained.",
    "A good habit is like a {adjective} {noun}: it does not ask to be admired.",
    "{Time}, we sat {place} and watched the clouds pull the light across the fields.",
    "What {person} remembered best was not the {noun}, but the silence that came after it.",
    "You can learn a great deal about a place from its {noun}, and almost as much from what it lacks.",
    "The road bends {place}, and for a moment the {adjective} roofs disappear behind the trees.",
    "Some questions are like a {noun} without a handle; they are hard to pick up.",
    "{Person} wrote long letters {time}, and seldom sent more than half of them.",
    "Between the {noun} and the {noun2} there was just enough room for a chair.",
    "We were told to wait {place}, so we waited, and talked about the price of the {noun}.",
    "To mend a {noun} properly, {person} explained, you must first find out how it was meant to break.",
    "The weather changed {time}, and with it the plans that {person} had made.",
    "Every town has its {adjective} {noun}, and every town believes that there is no other.",
    "There is a difference between a {adjective} day and a wasted one, though it is not always visible.",
    "{Time}, a cart came past with a {noun} tied to its roof.",
    "Whoever built the wall {place} took care to leave a gap for the cats.",
    "I have never understood why the {noun} was kept {place}, where it was always in the way.",
    "The children called it the {adjective} {noun}, and after a while so did everyone else.",
    "{Person} laughed, put down the {noun}, and said that there would be time enough tomorrow.",
    "A map shows the river, but not how {adjective} the water looks {time}.",
    "They argued about the {noun} for an hour, and agreed about it in a minute.",
    "Work that is done {time} has a way of lasting longer than work done in haste.",
    "From the window you could see a {noun}, two {adjective} trees, and a corner of the sky.",
    "When the lamp was lit, the {noun} threw a shadow that reached to the door.",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Prose:
    """Sentences to fill a context with.

    Args:
        source: A text file to take them from, in order and again from the start when they run out; without one they
            are made up.

    Raises:
        ValueError: The file holds no sentence.
    """

    def __init__(self, source: str | None = None) -> None:
        self.read: list[str] = []
        if source is not None:
            self.read = [part.strip() for part in _SENTENCE_END.split(Path(source).read_text()) if part.strip()]
            if not self.read:
                raise ValueError(f"{source} holds no text to hide needles in")

    def sentences(self, rng: np.random.Generator, n: int) -> list[str]:
        """Return `n` sentences; those of a file begin at a random place of it."""
        if self.read:
            start = int(rng.integers(len(self.read)))
            return [self.read[(start + i) % len(self.read)] for i in range(n)]
        return [_sentence(rng) for _ in range(n)]


def _sentence(rng: np.random.Generator) -> str:
    person, time = pick(rng, PEOPLE), pick(rng, TIMES)
    sentence = TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(
        person=person,
        Person=person[0].upper() + person[1:],
        time=time,
        Time=time[0].upper() + time[1:],
        place=pick(rng, PLACES),
        adjective=pick(rng, adjectives),
        adjective2=pick(rng, adjectives),
        noun=pick(rng, nouns),
        noun2=pick(rng, nouns),
    )
    return with_articles(sentence)


def scatter(rng: np.random.Generator, filler: list[str], facts: list[str]) -> list[str]:
    """Return the filler with the facts at random places in it, in their own order."""
    places = np.sort(rng.integers(len(filler) + 1, size=len(facts)))
    scattered = list(filler)
    for place, fact in zip(places[::-1], reversed(facts), strict=True):
        scattered.insert(int(place), fact)
    return scattered

"""How much of a summary's wording is in a right one, in its order."""

from collections.abc import Sequence

from evals.metrics.judge import Judge


class RougeL(Judge):
    """F1 of ROUGE-L of summaries (Lin 2004), of the reference that gives most.

    Sentences end with full stops, words with space, and each word counts once: so counts the `rouge` package, with
    which LongBench is judged. It adds 1e-8 to the denominator, this does not.
    """

    def score(self, prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max(_rouge_l(_sentences(prediction), _sentences(reference)) for reference in references)


def _sentences(text: str) -> list[list[str]]:
    return [words for sentence in text.split(".") if (words := sentence.split())]


def _rouge_l(predicted: list[list[str]], expected: list[list[str]]) -> float:
    """Return 2 |common| / (|predicted| + |expected|), of the words they share in order, and of each."""
    common = {word for reference in expected for sentence in predicted for word in _common(reference, sentence)}
    words = [{word for sentence in text for word in sentence} for text in (predicted, expected)]
    return 2 * len(common) / max(1, len(words[0]) + len(words[1]))


def _common(first: list[str], second: list[str]) -> list[str]:
    """Return a longest common subsequence; of several the one with words from the end of `first`."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        above, row = lengths[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append(first[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found

"""Numbers in a text, as they are written."""

import re


def integers(text: str) -> list[str]:
    """Return the runs of digits."""
    return re.findall(r"\d+", text)


def decimals(text: str) -> list[float]:
    """Return the numbers without sign, with or without a fraction."""
    return [float(found) for found in re.findall(r"\d+\.\d+|\d+", text)]

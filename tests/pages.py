"""The pages that say what to type, and what they say, for the tests that run it."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))),
    *(ROOT / "evals" / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "CARD.md"),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Line:
    """What a page says to type into a shell: its words, without the comment."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page in one language, in its order."""
    return [code for kind, code in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def lines(page: Path) -> Iterator[Line]:
    """The shell lines of a page, in their order; quotations and backslashes go on in the next."""
    for code in blocks(page, "sh"):
        held = ""
        for text in code.replace("\\\n", " ").splitlines(keepends=True):
            held += text
            try:
                words = shlex.split(held, comments=True)
            except ValueError:
                continue
            held = ""
            if words:
                yield Line(tuple(words))
        assert not held, f"{page.name}: a quotation has no end: {held}"


def line_of(beginning: str) -> Line:
    """The one line that is this or begins so, on however many pages it stands."""
    found = {line for page in PAGES for line in lines(page) if str(line).startswith(beginning)}
    found = {line for line in found if str(line) == beginning} or found
    assert len(found) == 1, f"{beginning!r} begins {len(found)} lines of the pages"
    return found.pop()


def typed(beginning: str, instead: Mapping[str, object] = MappingProxyType({})) -> list[str]:
    """The words of the one line that is this or begins so, some of them replaced.

    Whoever calls it runs the line: `test_shell.py` runs what no test asks for.
    """
    return [str(instead.get(word, word)) for word in line_of(beginning).words]


def recipe(*targets: str) -> list[list[str]]:
    """What `make TARGETS` runs once its environments are there, as words of which the first is a program's name."""
    made = (".venv/.torch", *(f".venv{name}/.ready" for name in ("", "-kvpress", "-oldest", "-previous")))
    words = ["make", "--dry-run", "--no-print-directory", *(f"--old-file={file}" for file in made), *targets]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in said.replace("\\\n", " ").replace(".venv/bin/", "").splitlines()]

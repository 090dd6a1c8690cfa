"""What MkDocs is told beside mkdocs.yml: pages and files that lie elsewhere in the repository, and links between them.

A link is written as it works in the repository. Here it becomes one that works in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that lie elsewhere, and what the site calls them.
ELSEWHERE = {
    "README.md": "index.md",
    "evals/README.md": "evaluation.md",
    "kernels/CARD.md": "kernels.md",
    "kernels/MEASUREMENTS.md": "kernel-measurements.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# A picture of two themes, as GitHub takes it.
_PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)">\s*<img src="(?P<light>[^"]+)"(?P<more>[^>]*)>\s*</picture>'
)
_LINK = re.compile(r"(?P<before>\]\(|\b(?:src|srcset|href)=\")(?P<to>[^)#\s\"]+)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie elsewhere, and every file that a page links to."""
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    known = {file.src_uri for file in files}
    for file in list(files.documentation_pages()):
        source = _source(file.src_uri)
        for link in _LINK.finditer((ROOT / source).read_text(encoding="utf-8")):
            target = _target(source, link["to"])
            if target is not None and _place(target) not in known:
                known.add(_place(target))
                files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads the links of a page to where the site has what they name."""
    source = _source(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        target = _target(source, link["to"])
        if target is None:
            return link[0]
        return link["before"] + posixpath.relpath(_place(target), posixpath.dirname(page.file.src_uri) or ".")

    return _PICTURE.sub(_themed, _LINK.sub(led, markdown))


def _themed(picture: re.Match[str]) -> str:
    """Two pictures; the site shows that of its own theme, which a reader may have changed."""
    return "".join(f'<img src="{picture[theme]}#only-{theme}"{picture["more"]}>' for theme in ("light", "dark"))


def _source(name: str) -> str:
    """Where the page of this name lies in the repository."""
    return next((source for source, of_site in ELSEWHERE.items() if of_site == name), f"docs/{name}")


def _place(target: str) -> str:
    """Where the site has a file of the repository."""
    return ELSEWHERE.get(target, target.removeprefix("docs/"))


def _target(source: str, link: str) -> str | None:
    """The file of the repository that a page's link names; none if it is a place elsewhere."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return target if "://" not in link and (ROOT / target).is_file() else None

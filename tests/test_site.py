"""The documentation's site: every public name has its place, and links lead where the site has what they name."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import redknot_hf
import redknot_hf.profiling
import redknot_hf.serving

ROOT = Path(__file__).parents[1]
site = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "site.py")))


def test_every_public_name_has_a_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)$", pages, re.M)}
    for package in (redknot_hf, redknot_hf.profiling, redknot_hf.serving):
        assert set(package.__all__) <= shown, package.__name__


def test_every_page_is_in_the_menu():
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w/-]+\.md", str(menu)))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages | set(site.ELSEWHERE.values())


@pytest.mark.parametrize(
    ("page", "written", "led"),
    [
        ("index.md", "[a](docs/plans.md)", "[a](plans.md)"),
        ("index.md", '<img src="docs/figures/heads-light.png">', '<img src="figures/heads-light.png">'),
        ("plans.md", "[a](../evals/README.md#methods)", "[a](evaluation.md#methods)"),
        ("plans.md", "[a](../evals/results/real/drift.json)", "[a](evals/results/real/drift.json)"),
        ("reference/cache.md", "[a](../plans.md)", "[a](../plans.md)"),
        ("kernels.md", "[a](MEASUREMENTS.md)", "[a](kernel-measurements.md)"),
        ("plans.md", "[a](https://arxiv.org/abs/2606.06256)", "[a](https://arxiv.org/abs/2606.06256)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, written, led):
    assert site.on_page_markdown(written, SimpleNamespace(file=SimpleNamespace(src_uri=page))) == led


def test_a_picture_of_two_themes_follows_the_sites_own():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    shown = site.on_page_markdown((ROOT / "README.md").read_text(), page)
    assert re.findall(r'<img src="figures/heads-(light|dark)\.png#only-(light|dark)" alt="Heads', shown) == [
        ("light", "light"), ("dark", "dark"),
    ]  # fmt: skip
    assert "<picture>" not in shown

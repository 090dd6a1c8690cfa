"""What is shipped: one wheel with both packages, an import that changes nothing for others, a test for each module."""

import ast
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import redknot_hf

ROOT = Path(__file__).parents[1]
SOURCES = ("src", "kernels/torch-ext", "evals", "examples")
HARNESS = "redknot_hf/harness/"  # where the wheel has `evals`
# What torch and transformers bring.
COME_ALONG = {"triton", "tokenizers", "huggingface_hub", "packaging", "tqdm"}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The wheel and the sdist, and the names of the files in each."""
    folder = tmp_path_factory.mktemp("shipped")
    wheel = Path(next(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    sdist = Path(next(SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    return {"wheel": (wheel, set(zipfile.ZipFile(wheel).namelist())), "sdist": (sdist, inside)}


def test_the_wheel_holds_the_library_its_kernels_and_the_harness(shipped):
    wheel, names = shipped["wheel"]
    sources = [
        ROOT / "src" / "redknot_hf",
        ROOT / "src" / "redknot_cli",
        ROOT / "kernels" / "torch-ext" / "redknot_kernels",
        ROOT / "evals",
    ]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        source.name for source in sources[:3]
    }
    expected = {str(path.relative_to(source.parent)) for source in sources for path in source.rglob("*.py")}
    assert {HARNESS + name if name.startswith("evals/") else name for name in expected} <= names
    assert {"redknot_hf/py.typed", "redknot_kernels/py.typed", f"{HARNESS}evals/page.html.jinja"} <= names
    assert "redknot_hf/serving/server/page.html" in names
    heavy = f"{HARNESS}evals/results", f"{HARNESS}evals/tiny/"
    assert not [name for name in names if name.startswith(heavy) and name[-3:] != ".py"]
    assert wheel.stat().st_size < 1e6


def test_the_wheels_harness_goes_beside_another_package_of_its_name(shipped, tmp_path):
    zipfile.ZipFile(shipped["wheel"][0]).extractall(tmp_path)
    (tmp_path / "evals.py").write_text("raise RuntimeError('another')")
    program = "from redknot_cli import app; app(['eval', 'run', '--help'])"
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "examples of each task" in told.stdout


def test_the_sdist_holds_what_a_wheel_is_built_of_and_no_weights(shipped):
    sdist, names = shipped["sdist"]
    assert sdist.stat().st_size < 2e6
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO"} <= names
    harness = {name.removeprefix(HARNESS) for name in shipped["wheel"][1] if name.startswith(HARNESS)}
    assert harness
    assert harness <= names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_the_metadata_names_the_version_of_the_package(shipped):
    archive = zipfile.ZipFile(shipped["wheel"][0])
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode()
    assert f"\nVersion: {redknot_hf.__version__}\n" in metadata
    for line in ("License-Expression: Apache-2.0", "Classifier: Typing :: Typed", "Project-URL: Paper, https://arxiv"):
        assert line in metadata
    assert f"version: {redknot_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {redknot_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def plain(name):
    return name.lower().replace("_", "-")


def test_what_is_imported_is_declared():
    """By the dependencies or an extra; so that whoever installs the extra has what its code imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    declared = {plain(Requirement(line).name) for line in wanted}
    of_import = packages_distributions()
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    roots = {name.split(".")[0] for name in names}
    own = {"redknot_hf", "redknot_cli", "redknot_kernels", "evals", "kvpress"}  # kvpress has an environment of its own
    foreign = sorted(roots - set(sys.stdlib_module_names) - own - COME_ALONG)
    missing = [name for name in foreign if not declared & set(map(plain, of_import.get(name, [name])))]
    assert missing == []


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_registers_redknot_and_leaves_the_rest_alone():
    program = """
from transformers import AttentionInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import AttentionMaskInterface
from transformers.pipelines import SUPPORTED_TASKS
maps = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping, DYNAMIC_LAYER_TYPE_MAPPING
maps += (SUPPORTED_TASKS,)
before = [dict(m) for m in maps]
import redknot_hf
after = [dict(m) for m in maps]
assert after[0].pop("redknot") is redknot_hf.redknot_attention
assert after[1].pop("redknot").__module__ == "redknot_hf.attention.mask"
assert after[3].pop("redknot-text-generation")["impl"] is redknot_hf.RedKnotPipeline
assert before == after
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def imported(path):
    """Names of the modules that a file imports, and of what it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_every_module_is_named_by_a_test():
    """By an import from it, or by a file of tests of its name."""
    files = list((ROOT / "tests").glob("test_*.py"))
    named = {name for path in files for name in imported(path)}
    titles = {path.stem.removeprefix("test_") for path in files}
    source = ROOT / "src"
    modules = [path for path in source.rglob("*.py") if path.stem != "__init__"]
    assert len(modules) > 50
    names = {path: ".".join(path.relative_to(source).with_suffix("").parts) for path in modules}
    assert [name for path, name in names.items() if name not in named and path.stem not in titles] == []

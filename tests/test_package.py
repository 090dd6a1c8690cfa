"""What is shipped: one wheel with both packages, an import that changes nothing for others, a test for each module."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"redknot_hf", "redknot_kernels"}
    sources = [ROOT / "src" / "redknot_hf", ROOT / "kernels" / "torch-ext" / "redknot_kernels"]
    expected = {f"{source.name}/{path.name}" for source in sources for path in source.glob("*.py")}
    assert expected <= set(names)


def test_kernels_folder_does_not_shadow_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_registers_redknot_and_leaves_the_rest_alone():
    program = """
from transformers import AttentionInterface
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.masking_utils import AttentionMaskInterface
maps = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping, DYNAMIC_LAYER_TYPE_MAPPING
before = [dict(m) for m in maps]
import redknot_hf
after = [dict(m) for m in maps]
assert after[0].pop("redknot") is redknot_hf.redknot_attention
assert after[1].pop("redknot").__module__ == "redknot_hf.attention.mask"
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

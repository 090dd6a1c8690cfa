"""What is shipped: one wheel with both packages, and an import that changes nothing for others."""

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

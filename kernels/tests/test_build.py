"""The build is a kernel that the `kernels` library loads and benchmarks."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import redknot_kernels
import torch
from kernels.cli.benchmark import run_benchmark

from kernels import get_local_kernel

KERNELS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A kernel repository as it would be published."""
    folder = tmp_path_factory.mktemp("redknot-kernels")
    built = runpy.run_path(str(KERNELS / "build.py"))["build"](folder / "build")
    assert [path.name for path in built] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    shutil.copytree(KERNELS / "benchmarks", folder / "benchmarks")
    return folder


def test_the_build_is_loaded_beside_the_package(repository):
    kernel = get_local_kernel(repository)
    assert kernel.__all__ == redknot_kernels.__all__
    assert kernel.__name__ != "redknot_kernels"
    assert Path(kernel.__file__).is_relative_to(repository)
    assert kernel.HeadRules is not redknot_kernels.HeadRules
    keys, angles = torch.randn(1, 2, 5, 16), torch.randn(5, 8)
    turned = [k.rotate(keys, k.Rotation(angles.cos(), angles.sin())) for k in (kernel, redknot_kernels)]
    assert torch.equal(*turned)


def test_the_card_says_what_runs(repository):
    """Its blocks, in their order; a first token attends itself alone."""
    names = {"device": "cpu"}
    blocks = re.findall(r"^```python\n(.*?)^```$", (KERNELS / "CARD.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    for code in blocks:
        exec(code.replace('Path("kernels")', f'Path("{repository}")'), names)
    assert torch.equal(names["out"], names["values"].repeat_interleave(2, 1).transpose(1, 2))
    assert names["counts"].tolist() == [1, 1]
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", (KERNELS / "CARD.md").read_text(), re.M)))
    assert set(listed) <= {*redknot_kernels.__all__, *redknot_kernels.implementation("torch")._fields}


def test_its_triton_side_is_its_own(repository):
    pytest.importorskip("triton")
    kernel = get_local_kernel(repository)
    ours, theirs = kernel.implementation("triton"), redknot_kernels.implementation("triton")
    assert ours.captured is not theirs.captured
    assert sys.modules[ours.captured.__module__].captured_step._qualname == f"{kernel.__name__}::step"
    named = {name for name in sys.modules if name.startswith(kernel.__name__)}
    assert f"{kernel.__name__}.triton.decode" in named
    configuration = sys.modules[f"{kernel.__name__}.triton.configurations"].configuration
    assert configuration("decode", "sm90", "rows", 2, 128, 4)["keys"] > 0


def test_its_benchmarks_run_and_are_right(repository, capsys):
    result = run_benchmark(str(repository), branch=None, version=None, iterations=1, warmup=0)
    assert set(result.timing_results) == {
        "DecodeBenchmark.all_global", "DecodeBenchmark.one_global", "PlaceBenchmark.document",
        "PrefillBenchmark.one_global",
    }  # fmt: skip
    assert all(timing.verified for timing in result.timing_results.values())
    assert "Match" in capsys.readouterr().err

"""Two accelerators, a process each, over NCCL: the tokens of one, level bytes, and caches that travel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from gpu_ranks_worker import MEMORY, SECONDS, SENT
from parallel_worker import served
from services import free_port

from redknot_hf import HeadPlan, HeadSpec

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two accelerators"),
]  # fmt: skip
WORKER = Path(__file__).with_name("gpu_ranks_worker.py")


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=98)


@pytest.fixture(scope="module")
def plan(model):
    """All global heads are of the first rank, unless they are balanced."""
    return HeadPlan.with_global(model.config, [(i, h) for i in range(2) for h in (0, 1)], HeadSpec(7, 2))


@pytest.fixture(scope="module")
def found(model, plan, tmp_path_factory):
    """What each of two ranks has left."""
    folder = tmp_path_factory.mktemp("ranks")
    model.save_pretrained(folder)
    plan.save(folder / "plan.json")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    env = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *launch, f"--master-port={free_port()}", str(WORKER), str(folder)],
        env=env, capture_output=True, text=True, timeout=SECONDS + 20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_serve_the_tokens_of_one(model, plan, found):
    alone = served(model.cuda(), plan, 2 * MEMORY)
    first, second = (rank["served"] for rank in found)
    assert first["tokens"] == alone["tokens"]
    assert first["reasons"] == alone["reasons"]
    assert first["preempted"]
    assert first["captured"] > 1
    assert second["captured"] == first["captured"]
    assert first["free"]
    assert second["free"]


def test_ranks_hold_as_many_bytes(found):
    levels = [max(rank["served"]["used"]) for rank in found]
    assert max(levels) <= 1.05 * min(levels)


@pytest.mark.parametrize("family", SENT)
def test_caches_travel_between_accelerators(found, family):
    left, come = (rank["sent"][family] for rank in found)
    assert come["exact"] == [True, True]
    assert come["tokens"]
    assert come["wire"] == left["wire"]

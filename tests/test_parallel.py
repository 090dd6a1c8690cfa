"""Tensor parallelism: each of two processes holds half of the KV heads, and the rules of just those."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model
from oracle import random_plan
from parallel_worker import run
from safetensors.torch import load_file, save_file
from texts import prompts

from redknot_hf import HeadPlan, HeadSpec

WORKER = Path(__file__).with_name("parallel_worker.py")
LOCAL = HeadSpec(window=7, sink=2)
PLANS = {
    "global": lambda config: HeadPlan.uniform(config, HeadSpec()),
    "first rank global": lambda config: HeadPlan.with_global(
        config, [(i, h) for i in range(4) for h in (0, 1)], LOCAL
    ),
    "second rank global": lambda config: HeadPlan.with_global(
        config, [(i, h) for i in range(4) for h in (2, 3)], LOCAL
    ),
    "mixed": random_plan,
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=98)  # the output layer is split by vocabulary


@pytest.fixture(scope="module")
def prompt():
    ids, mask = prompts(2, 60, (0, 9))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def folder(model, prompt, tmp_path_factory):
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("parallel")
    model.save_pretrained(folder)
    save_file(prompt, folder / "prompt.safetensors")
    for name, make in PLANS.items():
        make(model.config).save(folder / f"{name}.plan")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(folder)], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", PLANS)
def test_two_processes_find_what_one_does(model, prompt, folder, name):
    alone, _ = run(model, PLANS[name](model.config), prompt)
    for rank in range(2):
        found = load_file(folder / f"{name}.{rank}.safetensors")
        for what, expected in alone.items():
            if what.endswith("tokens"):
                assert torch.equal(found[what], expected)
            else:
                torch.testing.assert_close(found[what], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_each_process_holds_the_pages_of_its_own_heads(model, prompt, folder, name):
    _, alone = run(model, PLANS[name](model.config), prompt)
    assert [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)] == [alone[:2], alone[2:]]

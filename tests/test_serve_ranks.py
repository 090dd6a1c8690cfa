"""`redknot serve` under torchrun: two processes share the model, one listens, and both end together."""

import asyncio
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
from listening import make_served
from pages import typed
from typer.testing import CliRunner

from redknot_cli import app, ranks
from redknot_hf.serving.server import Settings, app_for
from redknot_hf.serving.server.running import Server, bound

ROOT = Path(__file__).parents[1]
TINY = ROOT / "evals" / "tiny"
ASK = json.loads(typed("curl")[-1])


def alive(group):
    """Whether a process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_answer_and_end_when_torchrun_is_told(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = {"meta-llama/Llama-3.1-8B-Instruct": TINY, "plan.json": TINY / "plan.json"}
    words = typed("torchrun --no-python", given)
    served = words.index("redknot")
    launch = [sys.executable, "-m", "torch.distributed.run", "--master-port", port, *words[1:served]]
    serve = [sys.executable, "-c", "from redknot_cli import app; app()", *words[served + 1 :]]
    options = ["--port", "0", "--max-len", "512", "--memory", "32MiB", "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [str(word) for word in launch + serve + options], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found, (said.seek(0), said.read())
            address, events = f"{found.group()}/v1/completions", []
            short = httpx.post(address, json=ASK | {"stream": False}, timeout=60).json()
            with httpx.stream("POST", address, json=ASK | {"max_tokens": 60}, timeout=60) as answer:
                for line in filter(None, answer.iter_lines()):
                    if not events:
                        process.send_signal(signal.SIGTERM)
                    events.append(line.removeprefix("data: "))
            assert process.wait(40) != 0, "torchrun was ended by a signal"
            assert not alive(process.pid), "a rank is left"
        finally:
            if alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        said.seek(0)
        assert "no longer in step" not in said.read()
    assert events.pop() == "[DONE]", "what was under way was finished"
    assert short["choices"][0]["text"].startswith("3 0 5 3 ."), "the right answer"
    texts = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(texts).startswith(short["choices"][0]["text"])


def test_what_ranks_cannot_do_is_said_before_a_model_is_loaded(monkeypatch):
    run = lambda *more: CliRunner().invoke(app, ["serve", str(TINY), "--plan", str(TINY / "plan.json"), *more])  # noqa: E731
    alone = run("--balance")
    assert alone.exit_code == 2
    assert "start it with torchrun" in alone.output
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (ranks.number(), ranks.count()) == (1, 2)
    for option, value in (("--store", "memory"), ("--device", "cpu")):
        found = run(option, value)
        assert found.exit_code == 2
        assert f"{option} {value}: " in found.output


def test_a_rank_that_is_lost_ends_the_server(byte_tokenizer):
    engine = make_served(copy.deepcopy(byte_tokenizer)).start()
    server = Server(app_for(engine, Settings(name="tiny")), engine, lost=lambda: True, log_level="error")
    asyncio.run(server.serve([bound("127.0.0.1", 0)]))
    assert not engine.alive

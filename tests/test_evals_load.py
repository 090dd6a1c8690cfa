"""The load generator asks a server that speaks OpenAI's protocol what it was told to, and counts what comes back."""

import asyncio
import json
import random
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pages import typed
from services import free_port

from evals.__main__ import main
from evals.load import command
from evals.load.figures import percentiles, summed_up, table_of
from evals.load.sending import Answer, Server, send
from evals.load.workload import Asked, Shared, Workload, draw_workload, length, lengths_of

FIRST_S, NEXT_S = 0.05, 0.01


class Fake:
    """A server that answers with as many words as it is asked for, and remembers what that was."""

    def __init__(self):
        self.asked, self.stored, self.segments = [], [], True
        app = FastAPI()

        @app.get("/v1/models")
        async def models():
            return {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "me"}]}

        @app.post("/v1/segments")
        async def segments(request: Request):
            if not self.segments:
                return JSONResponse({"error": {"message": "no store"}}, 404)
            self.stored = (await request.json())["input"]
            return {"data": [{"id": f"segment-{i}"} for i in range(len(self.stored))]}

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            self.asked.append(body)
            if 13 in body["prompt"]:
                return JSONResponse({"error": {"message": "an unlucky number"}}, 400)
            return StreamingResponse(self.words(body), media_type="text/event-stream")

        config = uvicorn.Config(app, port=free_port(), log_level="error")
        self.server, self.url = uvicorn.Server(config), f"http://127.0.0.1:{config.port}/v1"
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    async def words(self, body):
        base = {"id": "x", "object": "text_completion", "created": 0, "model": "fake"}
        for i in range(body["max_tokens"]):
            await asyncio.sleep(NEXT_S if i else FIRST_S)
            ends = "length" if i + 1 == body["max_tokens"] else None
            yield line({**base, "choices": [{"index": 0, "text": "word ", "finish_reason": ends, "logprobs": None}]})
        cached = {"cached_tokens": 7} if body.get("segments") else None
        counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        usage = {**counts, "total_tokens": sum(counts.values()), "prompt_tokens_details": cached}
        yield line({**base, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def stop(self):
        self.server.should_exit = True
        self.thread.join()


def line(part):
    return f"data: {json.dumps(part)}\n\n"


@pytest.fixture(scope="module")
def fake():
    made = Fake()
    yield made
    made.stop()


def test_lengths_are_drawn_or_read(tmp_path):
    draw = random.Random(0)
    assert {length("7")(draw) for _ in range(9)} == {7}
    assert {length("3-5")(draw) for _ in range(99)} == {3, 4, 5}
    drawn = [length("~40")(draw) for _ in range(2000)]
    assert 36 < sum(drawn) / len(drawn) < 44
    assert min(drawn) >= 1
    for told in ("", "0", "5-3", "~0", "x"):
        with pytest.raises(ValueError, match="give 512, 128-2048, or ~512"):
            length(told)
    file = tmp_path / "lengths.jsonl"
    file.write_text('{"prompt": 5, "new": 2}\n{"prompt": 6, "new": 3}\n')
    assert lengths_of(file) == [(5, 2), (6, 3)]
    for text in ('{"prompt": 5}', '{"prompt": 0, "new": 1}', "[]", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match="lengths"):
            lengths_of(file)


def test_requests_are_drawn_as_told_and_the_same_for_a_seed():
    sizes = [(5, 2)] * 2000
    drawn = lambda seed: draw_workload(  # noqa: E731
        sizes, 50.0, 100, seed, prefixes=Shared(0.5, 3, 11), segments=Shared(0.25, 4, 20, 2)
    )
    load = drawn(1)
    assert load == drawn(1) != drawn(2)
    times = [x.at for x in load.requests]
    assert times == sorted(times)
    assert 36 < times[-1] < 44  # 2000 of 50 a second
    headed = [x for x in load.requests if x.shared]
    assert 0.45 < len(headed) / 2000 < 0.55
    assert len({x.prompt[:11] for x in headed}) == 3
    assert {len(x.prompt) for x in headed} == {16}
    named = [x.segments for x in load.requests if x.segments]
    assert 0.2 < len(named) / 2000 < 0.3
    assert {len(set(x)) for x in named} == {2}
    assert [len(x) for x in load.documents] == [20] * 4
    assert all(3 <= i < 100 for x in load.requests for i in x.prompt)
    assert {x.at for x in draw_workload(sizes[:9], None, 100).requests} == {0.0}
    for wrong in ({"share": 2}, {"share": 0.5, "count": 2, "each": 3}):
        with pytest.raises(ValueError, match="give"):
            Shared(**wrong)


def test_delays_are_those_of_the_server(fake):
    asked = [Asked(0.1 * i, tuple(range(20, 30)), 4) for i in range(6)]
    row = summed_up(asyncio.run(send(Server(fake.url, "fake"), Workload(tuple(asked)))))
    assert (row["requests"], row["failed"], row["tokens"], row["prompt_tokens"]) == (6, 0, 24, 60)
    assert FIRST_S <= row["first_s"]["p50"] < row["whole_s"]["p50"]
    assert row["between_s"]["mean"] >= NEXT_S
    assert row["s"] >= 0.5 + FIRST_S + 3 * NEXT_S
    assert row["tokens_per_s"] == pytest.approx(24 / row["s"])
    held = summed_up(asyncio.run(send(Server(fake.url, "fake", most=1), Workload((Asked(0.0, (5,), 3),) * 3))))
    assert held["first_s"]["max"] > held["whole_s"]["p50"] > FIRST_S  # whoever was held back has waited
    assert held["sent_late_s"]["max"] > 2 * FIRST_S


def test_percentiles_and_a_table_of_answers():
    assert percentiles([]) is None
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2
    answers = [Answer(Asked(i, (1, 2), 3), 0.0, [1.0 + i, 2.0 + i, 4.0 + i], 5.0, 3, 2, 1) for i in range(2)]
    answers.append(Answer(Asked(9, (1,), 3), error="refused"))
    row = summed_up(answers)
    assert (row["s"], row["failed"], row["errors"], row["cached_tokens"]) == (6.0, 1, ["refused"], 2)
    assert row["between_s"]["mean"] == 1.5
    assert row["gaps_s"] == {"mean": 1.5, "p50": 1.5, "p90": 2.0, "p95": 2.0, "p99": 2.0, "max": 2.0}
    assert "2 of 3 answered" in table_of(row).title
    with pytest.raises(ValueError, match="none of 1 requests was answered: refused"):
        summed_up(answers[2:])


def test_the_command_writes_a_line_and_ends_with_what_failed(fake, tmp_path, capsys):
    fake.asked.clear()
    out, file = tmp_path / "serve.jsonl", tmp_path / "lengths.jsonl"
    file.write_text('{"prompt": 5, "new": 3}\n{"prompt": 9, "new": 2}\n')
    said = {"http://127.0.0.1:8000/v1": fake.url, "200": "4", "4": "100", "X": str(out)}
    words = [*typed("python -m evals serve", said)[3:], "--lengths", str(file)]
    shared = ["--prefix-share", "1", "--prefixes", "1", "--prefix-tokens", "6"]
    documents = ["--segment-share", "1", "--segments", "3", "--segments-each", "2", "--segment-tokens", "8"]
    with pytest.raises(SystemExit) as ended:
        main([*words, *shared, *documents, "--boundary", "0.2", "--words", "12", "--warm", "1"])
    assert ended.value.code == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["hardware"]["device"]
    (row,) = found["rows"]
    assert (row["requests"], row["failed"], row["tokens"], row["cached_tokens"]) == (4, 0, 10, 28)
    assert [len(x) for x in fake.stored] == [8, 8, 8]
    asked = fake.asked[1:]
    assert len(fake.asked[0]["prompt"]) == 16  # to warm up
    assert sorted((len(x["prompt"]), x["max_tokens"]) for x in asked) == [(11, 3), (11, 3), (15, 2), (15, 2)]
    assert len({tuple(x["prompt"][:6]) for x in asked}) == 1
    for body in asked:
        assert (body["model"], body["boundary"], body["ignore_eos"]) == ("fake", 0.2, True)
        assert set(body["segments"]) < {"segment-0", "segment-1", "segment-2"}
    with pytest.raises(SystemExit) as ended:
        main(["serve", fake.url, "--requests", "30", "--prompt", "3", "--new", "1", "--words", "16", "--warm", "0"])
    assert ended.value.code == 1  # 13 was among them
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]
    assert 0 < told["failed"] < 30
    assert "an unlucky number" in told["errors"][0]


def test_what_the_command_cannot_do_is_said_in_a_line(fake, monkeypatch):
    monkeypatch.setattr(fake, "segments", False)
    for more, told in (
        (["--segment-share", "0.5"], "leave out --segment-share"),
        (["--more", "[1]"], "give an object"),
        (["--prompt", "none"], "give 512"),
    ):
        with pytest.raises(SystemExit, match=told):
            main(["serve", fake.url, "--requests", "2", "--warm", "0", *more])
    with pytest.raises(SystemExit, match="Is a server there"):
        main(["serve", f"http://127.0.0.1:{free_port()}/v1"])
    with pytest.raises(ValueError, match="the server has the models a, b: name one"):
        command._only(["a", "b"])

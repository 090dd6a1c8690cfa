"""What a server refuses, and how it says so: one shape, nobody's text, no traceback; and how it ends."""

import copy
import json
import socket
import threading
import time

import httpx2 as httpx
import openai
import pytest
from listening import client_of, listening, make_served, until

from redknot_hf.serving.server import app_for
from redknot_hf.serving.server.settings import Settings, check_door, is_loopback

SECRET = "swordfish"
PROMPT = "Once there was a house."


@pytest.fixture(scope="module")
def engine(byte_tokenizer):
    return make_served(copy.deepcopy(byte_tokenizer), max_batch=1, queue=1)


@pytest.fixture(scope="module")
def served(engine):
    hosts = ("localhost", "127.0.0.1")
    with listening(engine, key="let me in", hosts=hosts, max_body=5_000, patience=2, max_answers=3) as found:
        yield found


@pytest.fixture(scope="module")
def web(served):
    headers = {"authorization": "Bearer let me in"}
    with httpx.Client(base_url=served[1], headers=headers, timeout=10) as web:
        yield web


@pytest.fixture
def slow(engine, monkeypatch):
    run = engine.reader.run
    monkeypatch.setattr(engine.reader, "run", lambda work: (time.sleep(0.02), run(work)))


def told(answer, status):
    """An error in the one shape, which says nothing that it should not."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert answer.headers["x-request-id"]
    for word in ("Traceback", 'File "', "pydantic", SECRET):
        assert word not in answer.text
    return error


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer let me inn", "Basic let me in", "let me in"])
@pytest.mark.parametrize("path", ["/metrics", "/status", "/v1/models", "/v1/completions", "/openapi.json"])
def test_a_key_is_asked_for(served, path, given):
    headers = {} if given is None else {"authorization": given}
    assert told(httpx.get(served[1] + path, headers=headers), 401)["code"] == "invalid_api_key"


def test_probes_and_the_page_need_no_key_and_the_client_tells_a_wrong_one(served, web):
    for path in ("/", "/health", "/ready"):
        assert httpx.get(served[1] + path).status_code == 200
    assert web.get("/v1/models").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        client_of(served[1], "wrong").models.list()


def test_a_page_of_another_name_does_not_reach_it(web):
    told(web.get("/v1/models", headers={"host": "evil.example"}), 403)
    assert web.get("/v1/models", headers={"host": "LOCALHOST:1234"}).status_code == 200
    # A form of another page cannot send JSON without being asked for leave.
    told(web.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}), 400)


@pytest.mark.parametrize("chunked", [False, True], ids=["told", "chunked"])
def test_a_body_that_is_too_large(web, chunked):
    body = json.dumps({"prompt": "x" * 6_000}).encode()
    told(web.post("/v1/completions", content=iter([body[:3_000], body[3_000:]]) if chunked else body), 413)


def test_a_body_that_never_ends(served):
    with socket.create_connection(served[1].removeprefix("http://").split(":")) as line:
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer let me in\r\n"
            b"content-length: 100\r\ncontent-type: application/json\r\n\r\n{"
        )
        line.settimeout(5)
        assert b" 408 " in line.recv(4_000)


BODIES = {
    "no field of ours": ({"prompt": "x", "temprature": 1}, "temprature"),
    "too hot": ({"prompt": "x", "temperature": -1}, "temperature"),
    "no number": ({"prompt": "x", "top_p": "0.5"}, "top_p"),
    "no text": ({"prompt": {"a": 1}}, "prompt"),
    "nothing": ({}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    "not honoured": ({"prompt": "x", "echo": True}, "echo"),
    "bias of no token": ({"prompt": "x", "logit_bias": {"word": 1}}, "logit_bias"),
    "too many": ({"prompt": ["x", "y"], "n": 2}, "n"),
    "beyond the words": ({"prompt": [5, 999_999]}, None),
    "a bias beyond the words": ({"prompt": "x", "logit_bias": {"999999": 1}}, None),
    "too long": ({"prompt": [5] * 300}, None),
    "too much": ({"prompt": "x", "max_tokens": 500}, None),
    "no store": ({"prompt": "x", "segments": ["y"]}, "segments"),
    "nothing to recompute": ({"prompt": "x", "boundary": 0.1}, "boundary"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_off(web, name):
    body, param = BODIES[name]
    assert told(web.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 4_000, '{"prompt": "x", "temperature": NaN}', '{"prompt": "x", "seed": 1e999}', "[1]", "null", ""],
    ids=["cut", "deep", "nan", "infinite", "list", "null", "empty"],
)
def test_texts_that_are_no_bodies(web, text):
    told(web.post("/v1/completions", content=text.encode(), headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", r'"\ud800"'], ids=["nan", "infinite", "half"])
def test_what_would_be_said_back_is_json(web, value):
    for field in (
        f'"metadata": {{"a": {value}}}',
        f'"tools": [{{"type": "function", "name": "f", "parameters": {{"a": {value}}}}}]',
    ):
        text = f'{{"input": "x", "max_output_tokens": 1, {field}}}'
        answer = web.post("/v1/responses", content=text, headers={"content-type": "application/json"})
        assert field[1:6] in told(answer, 400)["param"]


def test_chats_that_are_off(web):
    said = [{"role": "user", "content": "x"}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SECRET}}]}]
    bodies = [
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": image},
        {"messages": said, "tool_choice": "required"},
        {"messages": said, "response_format": {"type": "json_object"}},
        {"messages": said, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"messages": said, "chat_template_kwargs": {"tokenize": False}},
        *(
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": text}}]}]}
            for text in ("{", "[" * 4_000)
        ),
    ]
    for body in bodies:
        told(web.post("/v1/chat/completions", json=body), 400)
    inputs = [[], [{"type": "computer_call"}], [{"role": "user", "content": 3}], [{"type": "function_call"}]]
    inputs += [[{"type": "reasoning", "content": 5}]]
    for given in inputs:
        told(web.post("/v1/responses", json={"input": given}), 400)
    told(web.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_1"}), 400)


def test_addresses_and_models_that_are_not_here(web):
    told(web.get("/v1/nothing"), 404)
    told(web.get("/v1/completions"), 405)
    told(web.get("/v1/models/other"), 404)
    assert told(web.post("/v1/completions", json={"prompt": "x", "model": "other"}), 404)["code"] == "model_not_found"


def test_a_full_queue_says_when_to_come_again(web, engine, slow):
    body = {"prompt": PROMPT + SECRET, "max_tokens": 80}
    threads = [threading.Thread(target=web.post, args=("/v1/completions",), kwargs={"json": body}) for _ in range(2)]
    threads[0].start()
    until(lambda: engine.running == 1)
    threads[1].start()
    until(lambda: engine.waiting == 1)
    answer = web.post("/v1/completions", json=body)
    assert told(answer, 429)["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert "vllm:num_requests_waiting 1.0" in web.get("/metrics").text
    for thread in threads:
        thread.join()
    assert web.post("/v1/completions", json=body | {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
def test_an_answer_that_fails_ends_alone_and_tells_nothing(web, engine, monkeypatch, caplog, stream):
    def fail(*_):
        raise RuntimeError(SECRET)

    with monkeypatch.context() as patched:
        patched.setattr(engine.reader, "_read", fail)
        answer = web.post("/v1/completions", json={"prompt": PROMPT, "stream": stream})
    if stream:
        assert answer.status_code == 200
        error = json.loads(answer.text.removeprefix("data: "))["error"]
        assert error["code"] == "internal_error"
        assert SECRET not in answer.text
    else:
        assert told(answer, 500)["code"] == "internal_error"
    assert SECRET in caplog.text, "the log knows"
    assert web.post("/v1/completions", json={"prompt": PROMPT}).status_code == 200


def test_a_fault_of_the_server_tells_nothing(web, served, monkeypatch, caplog):
    async def fail(*_, **__):
        raise KeyError(SECRET)

    monkeypatch.setattr(served[0].app.state.service.prompts, "read", fail)
    told(web.post("/v1/completions", json={"prompt": PROMPT}), 500)
    assert SECRET in caplog.text, "the log knows"


def test_what_takes_too_long_is_given_up(web, engine, served, slow, monkeypatch):
    service = served[0].app.state.service
    monkeypatch.setattr(service, "settings", Settings(name="tiny", timeout=0.1))
    assert told(web.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 100}), 504)["code"] == "timeout"
    until(lambda: engine.running == 0)


def test_answers_under_way_are_finished_when_the_server_ends(byte_tokenizer):
    engine = make_served(copy.deepcopy(byte_tokenizer))
    with listening(engine) as (server, address):
        client = client_of(address)
        chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, stream=True)
        first = next(chunks)
        server.should_exit = True
        rest = list(chunks)
        assert first.choices[0].finish_reason is None
        assert rest[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    assert not engine.alive


def test_those_that_take_too_long_are_told(byte_tokenizer, monkeypatch):
    engine = make_served(copy.deepcopy(byte_tokenizer))
    run = engine.reader.run
    monkeypatch.setattr(engine.reader, "run", lambda work: (time.sleep(0.05), run(work)))
    with listening(engine, drain=0.2) as (server, address):
        chunks = client_of(address).completions.create(model="tiny", prompt=PROMPT, max_tokens=180, stream=True)
        next(chunks)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="shut down"):
            list(chunks)


def test_an_engine_that_has_died_is_told(byte_tokenizer, monkeypatch):
    engine = make_served(copy.deepcopy(byte_tokenizer))
    plan = engine.scheduler.plan
    with listening(engine) as (_, address):

        def die():
            if engine.scheduler.waiting:  # not in the first step, which may come late and before any request
                raise RuntimeError(SECRET)
            return plan()

        monkeypatch.setattr(engine.scheduler, "plan", die)
        told(httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT}), 500)
        told(httpx.get(f"{address}/health"), 503)
        told(httpx.get(f"{address}/ready"), 503)
        told(httpx.post(f"{address}/v1/completions", json={"prompt": PROMPT}), 503)


def test_other_machines_are_let_in_only_with_a_key_or_aloud():
    assert check_door("127.0.0.1", None, False) == ("localhost", "127.0.0.1", "::1")
    assert check_door("0.0.0.0", "key", False) == ()
    assert check_door("0.0.0.0", None, True) == ()
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match="--no-auth"):
            check_door(host, None, False)
    assert all(map(is_loopback, ("::1", "127.0.0.2", "localhost")))
    for key in ("", " key", "schlüssel"):
        with pytest.raises(ValueError, match="--api-key"):
            check_door("127.0.0.1", key, False)
    with pytest.raises(ValueError, match="one of them"):
        check_door("127.0.0.1", "key", True)


def test_an_engine_without_a_tokenizer_cannot_be_served(engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", None)
    with pytest.raises(ValueError, match="tokenizer"):
        app_for(engine, Settings(name="x"))


def test_what_cannot_be_put_into_words_is_told(web, served, monkeypatch):
    def fail(*_, **__):
        raise UnicodeError(SECRET)

    monkeypatch.setattr(served[0].app.state.service.prompts.tokenizer, "decode", fail)
    told(web.post("/v1/completions", json={"prompt": PROMPT}), 500)
    answer = web.post("/v1/completions", json={"prompt": PROMPT, "stream": True})
    assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "internal_error"

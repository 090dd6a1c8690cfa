"""The server over loopback, asked by OpenAI's own client: what is written is what `generate` writes."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2 as httpx
import openai
import pytest
import torch
from listening import client_of, generated, listening, make_served, until
from prometheus_client.parser import text_string_to_metric_families

from redknot_hf.serving.server import service

PROMPT = "Once there was a house by the sea, and nobody lived in it but the wind."
# Of what a random model writes, which is no UTF-8 often.
LONG = 24


@pytest.fixture(scope="module")
def engine(byte_tokenizer):
    return make_served(copy.deepcopy(byte_tokenizer))


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return client_of(address)


def read(engine, text=PROMPT):
    return engine.tokenizer(text)["input_ids"]


def streamed(chunks):
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def test_streamed_text_is_that_of_generate(client, engine):
    expected = generated(engine, read(engine), LONG)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": LONG}
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == expected
    assert len(chunks) > 5, "it came piece by piece"
    assert [x.choices[0].finish_reason for x in chunks if x.choices][-1] == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(read(engine)), LONG)
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.usage.total_tokens == len(read(engine)) + LONG
    assert whole.usage.prompt_tokens_details.cached_tokens > 0, "read before"


def test_chat_is_the_template_and_then_generate(client, engine):
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    text = f"[system] Be kind. [end][user] {PROMPT} [end][assistant]"
    expected = generated(engine, engine.tokenizer(text, add_special_tokens=False)["input_ids"], LONG)
    asked = {"model": "tiny", "messages": said, "max_completion_tokens": LONG}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == expected
    flat = client.responses.create(model="tiny", input=PROMPT, instructions="Be kind.", max_output_tokens=LONG)
    assert flat.output_text == expected
    assert (flat.status, flat.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model="tiny", input=said, max_output_tokens=LONG, stream=True))
    assert "".join(x.delta for x in events if x.type == "response.output_text.delta") == expected
    assert [x.sequence_number for x in events] == list(range(len(events)))
    assert events[-1].response.output_text == expected


def test_tools_and_thoughts_go_to_the_template(client, engine):
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 7}'}}
    said = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "seen"},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    text = "[user] Go. [end][assistant]  calls look of 7 [end][tool] seen [end]lookhigh[assistant]"
    expected = generated(engine, engine.tokenizer(text, add_special_tokens=False)["input_ids"], 5)
    more = {"extra_body": {"chat_template_kwargs": {"effort": "high"}}}
    chat = client.chat.completions.create(model="tiny", messages=said, tools=[tool], max_tokens=5, **more)
    assert chat.choices[0].message.content == expected
    items = [
        {"role": "user", "content": "Go."},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": '{"a": 7}'},
        {"type": "function_call_output", "call_id": "1", "output": "seen"},
    ]
    flat = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    answer = client.responses.create(model="tiny", input=items, tools=[flat], max_output_tokens=5, **more)
    assert answer.output_text == expected


class Forced:
    """A logits processor that makes a model write a text."""

    def __init__(self, ids):
        self.ids, self.first = ids, None

    def __call__(self, seen, scores):
        self.first = seen.shape[1] if self.first is None else self.first
        at = min(seen.shape[1] - self.first, len(self.ids) - 1)
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([self.ids[at]]), 0.0)


def test_thoughts_and_calls_of_tools_reach_the_client(client, engine, monkeypatch):
    text = '<think>Well.</think><tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    of = service.sampling_of
    force = lambda *given: replace(of(*given), processors=[Forced(ids)], max_new_tokens=len(ids))  # noqa: E731
    monkeypatch.setattr(service, "sampling_of", force)
    monkeypatch.setattr(engine.model.config, "model_type", "qwen3")  # whose answers transformers can take apart
    function = {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    said = {"model": "tiny", "messages": [{"role": "user", "content": "Go."}], "max_tokens": 90}
    said["tools"] = [{"type": "function", "function": function}]
    whole = client.chat.completions.create(**said).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"a": 1})
    assert (whole.message.reasoning_content, whole.finish_reason) == ("Well.", "tool_calls")
    assert whole.message.content is None
    deltas = [x.choices[0].delta for x in client.chat.completions.create(**said, stream=True)]
    (streamed_call,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert streamed_call.function.arguments == call.function.arguments
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Well."
    flat = {"model": "tiny", "input": "Go.", "max_output_tokens": 90, "tools": [{"type": "function", **function}]}
    items = client.responses.create(**flat).output
    assert [item.type for item in items] == ["reasoning", "function_call"]
    assert items[1].arguments == call.function.arguments
    events = list(client.responses.create(**flat, stream=True))
    assert [item.type for item in events[-1].response.output] == ["reasoning", "function_call"]


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"temperature": 0.8, "seed": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 0}),
        ({"temperature": 1.0, "seed": 3, "top_p": 0.7}, {"do_sample": True, "top_p": 0.7, "top_k": 0}),
        ({"temperature": 1.0, "seed": 3, "extra_body": {"top_k": 5}}, {"do_sample": True, "top_k": 5}),
        (
            {"temperature": 1.0, "seed": 3, "extra_body": {"min_p": 0.2}},
            {"do_sample": True, "min_p": 0.2, "top_k": 0},
        ),
        ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"77": 100}}, {"sequence_bias": {(77,): 100.0}}),
    ],
    ids=["temperature", "top_p", "top_k", "min_p", "repetition", "bias"],
)
def test_each_request_chooses_in_its_own_way(client, engine, asked, options):
    torch.manual_seed(3)
    expected = generated(engine, read(engine), 10, **options)
    assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, **asked).choices[0].text == expected


def test_choices_of_one_prompt_are_seeds_one_after_the_other(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12}
    several = client.completions.create(**asked, n=3, temperature=1.0, seed=5)
    assert [x.index for x in several.choices] == [0, 1, 2]
    assert len({x.text for x in several.choices}) == 3
    alone = [client.completions.create(**asked, temperature=1.0, seed=5 + i).choices[0].text for i in range(3)]
    assert [x.text for x in several.choices] == alone
    chunks = client.completions.create(**asked, n=3, temperature=1.0, seed=5, stream=True)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone
    assert several.usage.completion_tokens == 36


def test_several_prompts_texts_or_ids(client, engine):
    ids = [read(engine), read(engine, "And then it went on.")]
    both = client.completions.create(model="tiny", prompt=ids, max_tokens=6)
    assert [x.text for x in both.choices] == [generated(engine, one, 6) for one in ids]
    assert both.usage.prompt_tokens == sum(map(len, ids))
    texts = client.completions.create(model="tiny", prompt=[PROMPT, "And then it went on."], max_tokens=6)
    assert [x.text for x in texts.choices] == [x.text for x in both.choices]


def test_stop_strings_end_the_text_and_are_no_part_of_it(client, engine):
    plain = generated(engine, read(engine), LONG)
    stop = plain[8:11]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": LONG, "stop": [stop]}
    whole = client.completions.create(**asked).choices[0]
    assert (whole.text, whole.finish_reason) == (plain[: plain.index(stop)], "stop")
    assert streamed(client.completions.create(**asked, stream=True)) == whole.text


def test_log_probabilities(client, engine):
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, logprobs=2).choices[0].logprobs
    assert len(whole.tokens) == len(whole.token_logprobs) == len(whole.text_offset) == 4
    assert all(max(top.values()) == own for top, own in zip(whole.top_logprobs, whole.token_logprobs, strict=True))
    biased = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, logprobs=1, logit_bias={"77": 100})
    assert [len(top) for top in biased.choices[0].logprobs.top_logprobs] == [2, 2], "and the chosen one"
    said = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    chat = client.chat.completions.create(**said, logprobs=True, top_logprobs=2)
    entries = chat.choices[0].logprobs.content
    assert [len(x.top_logprobs) for x in entries] == [2] * 4
    assert [x.logprob for x in entries] == [x.top_logprobs[0].logprob for x in entries]
    chunks = client.chat.completions.create(**said, logprobs=True, stream=True)
    told = [x.logprob for chunk in chunks if chunk.choices[0].logprobs for x in chunk.choices[0].logprobs.content]
    assert told == pytest.approx([x.logprob for x in entries])
    with pytest.raises(openai.BadRequestError, match="needs logprobs"):
        client.chat.completions.create(**said, top_logprobs=2)


def test_many_clients_at_once_get_what_each_would_get_alone(client, address, engine):
    prompts = [f"{PROMPT} It had {i} windows." for i in range(10)]
    expected = [generated(engine, read(engine, text), 12) for text in prompts]

    def ask(at):
        asked = {"model": "tiny", "prompt": prompts[at], "max_tokens": 12}
        if at % 2:
            return streamed(client.completions.create(**asked, stream=True))
        return client.completions.create(**asked).choices[0].text

    def look(path):
        return [httpx.get(address + path).status_code for _ in range(5)]

    with ThreadPoolExecutor(12) as threads:
        looking = [threads.submit(look, path) for path in ("/metrics", "/status")]
        assert list(threads.map(ask, range(10))) == expected
        assert [one.result() for one in looking] == [[200] * 5] * 2


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_a_client_that_goes_away_frees_its_seat(address, engine, stream):
    body = {"prompt": PROMPT, "max_tokens": 150, "stream": stream}
    slow = engine.reader.run
    engine.reader.run = lambda work: (time.sleep(0.05), slow(work))
    try:
        if stream:
            with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
                assert engine.running == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)
        steps = engine.steps
        until(lambda: engine.running == 0, 5)
        assert engine.steps - steps < 40, "long before the answer would have ended"
    finally:
        engine.reader.run = slow


def test_metrics_are_read_by_prometheus(client, address, engine):
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3)
    until(lambda: engine.idle)
    web = httpx.get(f"{address}/metrics")
    families = {family.name: family for family in text_string_to_metric_families(web.text)}
    value = lambda name: families[name].samples[0].value  # noqa: E731
    assert value("redknot_requests_running") == value("vllm:num_requests_running") == 0
    assert value("redknot_prompt_tokens") == engine.reader.read == value("vllm:prompt_tokens")
    assert value("redknot_prefix_hit_tokens") == engine.memory.prefixes.hit_tokens > 0
    held = families["redknot_kv_bytes"].samples
    assert sum(x.value for x in held) == engine.memory.used()["used"]
    assert {x.labels["class"] for x in held} == {"global", "local"}
    for name in ("redknot_time_to_first_token_seconds", "vllm:inter_token_latency_seconds"):
        counts = [x.value for x in families[name].samples if x.name.endswith("_bucket")]
        assert counts == sorted(counts)
        assert counts[-1] > 0
    ended = {x.labels["reason"]: x.value for x in families["redknot_requests_ended"].samples}
    assert ended["length"] > 0
    routes = {(x.labels["route"], x.labels["status"]) for x in families["redknot_http_responses"].samples}
    assert ("/v1/completions", "200") in routes


def test_status_and_models_tell_no_text(address, engine):
    status = httpx.get(f"{address}/status").json()
    assert status["model"] == "tiny"
    assert status["ready"]
    assert status["used"] == sum(part["bytes"] for part in status["held"])
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["max_model_len"] == 200
    assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/ready").status_code == httpx.head(f"{address}/ready").status_code == 200
    page = httpx.get(address)
    assert "<html" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert json.loads(httpx.get(f"{address}/openapi.json").text)["paths"]["/v1/chat/completions"]

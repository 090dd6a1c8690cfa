"""Documents over HTTP: stored once, named by address or text, and answered as an assembled cache answers."""

import copy

import httpx2 as httpx
import pytest
from listening import client_of, listening, make_served

from redknot_hf import assemble, prompt
from redknot_hf.serving.server.library import Context

FIRST = "The house by the sea has seven rooms, and nobody lives there but the wind and a cat."
SECOND = "The cat is called Morning, and it comes and goes as it likes."
QUESTION = " What is it called?"


@pytest.fixture(scope="module")
def engine(byte_tokenizer):
    return make_served(copy.deepcopy(byte_tokenizer), stored=True, max_len=300)


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine) as (_, address):
        yield address


@pytest.fixture(scope="module")
def stored(address):
    answer = httpx.post(f"{address}/v1/segments", json={"input": [FIRST, SECOND]}, timeout=20)
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["data"]]


def ids_of(engine, text):
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(engine, refs, end, boundary=None):
    """What `assemble` and `generate` write behind documents: eight tokens."""
    cache = assemble(engine.model, refs, boundary=boundary, page_size=16)
    asked = prompt(cache, ids_of(engine, end))
    out = engine.model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return engine.tokenizer.decode(out[0, -8:], skip_special_tokens=True)


def test_segments_have_addresses(address, stored, engine):
    assert all(len(one) == 64 for one in stored)
    ids = ids_of(engine, SECOND)
    computed = engine.documents.store.counts.computed
    again = httpx.post(f"{address}/v1/segments", json={"input": ids}).json()
    assert [(one["id"], one["tokens"]) for one in again["data"]] == [(stored[1], len(ids))]
    assert engine.documents.store.counts.computed == computed, "it was there"
    behind = httpx.post(f"{address}/v1/segments", json={"input": SECOND, "prefix": stored[0]}).json()
    assert behind["data"][0]["id"] != stored[1]


@pytest.mark.parametrize("boundary", [None, 0.5, [0, "all"], 3], ids=["usual", "share", "each", "tokens"])
def test_a_completion_behind_documents(address, stored, engine, boundary):
    more = {"segments": stored, **({} if boundary is None else {"boundary": boundary})}
    asked = {"model": "tiny", "prompt": QUESTION, "max_tokens": 8, "extra_body": more}
    answer = client_of(address).completions.create(**asked)
    opening = engine.tokenizer("")["input_ids"]
    store = engine.documents.store
    refs = [store.ref(opening), *(store.ref(ids_of(engine, text), opening) for text in (FIRST, SECOND))]
    each = [0, *boundary] if isinstance(boundary, list) else boundary
    assert answer.choices[0].text == expected(engine, refs, QUESTION, each)
    assert answer.usage.prompt_tokens_details.cached_tokens > 10
    texts = asked | {"extra_body": more | {"segments": [FIRST, stored[1]]}}
    chunks = client_of(address).completions.create(**texts, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    length = sum(len(ids_of(engine, text)) for text in (FIRST, SECOND, QUESTION))
    assert answer.usage.prompt_tokens == len(opening) + length


def test_a_chat_has_them_before_the_first_words_of_the_user(address, stored, engine):
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]
    store = engine.documents.store
    refs = [store.ref(ids_of(engine, "[system] Be kind. [end][user] ")), *map(store.named, stored)]
    own = expected(engine, refs, f"{QUESTION} [end][assistant]", [0, 0, 0.2])
    more = {"segments": stored, "boundary": [0, 0.2]}
    client = client_of(address)
    chat = client.chat.completions.create(model="tiny", messages=said, max_tokens=8, extra_body=more)
    assert chat.choices[0].message.content == own
    flat = client.responses.create(model="tiny", input=said, max_output_tokens=8, extra_body=more)
    assert flat.output_text == own
    assert flat.usage.input_tokens_details.cached_tokens > 10


def test_what_is_off_with_documents(address, stored, engine):
    ask = lambda **more: httpx.post(f"{address}/v1/completions", json={"prompt": "x", **more})  # noqa: E731
    store = lambda **more: httpx.post(f"{address}/v1/segments", json=more)  # noqa: E731
    for answer in (
        ask(segments=["0" * 64]),
        ask(segments=[[999_999]]),
        ask(segments=stored, boundary=[0.1]),
        ask(segments=stored, boundary=1.5),
        ask(segments=[FIRST] * 20),
        store(input=[999_999]),
        store(input=""),
        store(input=[]),
        store(input=[5] * 400),
        store(input="x", prefix="0" * 64),
        store(input="x", more=1),
        httpx.post(f"{address}/v1/chat/completions", json={"messages": [{"role": "system"}], "segments": stored}),
    ):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
    assert ask(segments=stored).status_code == 200
    assert store(input="x", model="other").status_code == 404
    assert Context().tokens == 0


def test_what_was_taken_from_segments_is_counted(address, stored, engine):
    text = httpx.get(f"{address}/metrics").text
    assert f"redknot_segment_hit_tokens_total {float(engine.reader.reused)}" in text
    assert engine.reader.reused > 0
    counts = engine.documents.store.counts
    assert f'redknot_store_hits_total{{tier="device"}} {float(counts.hits["device"])}' in text
    assert f"redknot_store_computed_total {float(counts.computed)}" in text
    assert "redknot_store_unreachable_total 0.0" in text

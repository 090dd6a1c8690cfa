"""Requests with stored segments get the tokens of `assemble` and `generate`, whatever is served beside them."""

import threading

import pytest
import torch
from families import make_model
from served import SIZES, all_free, alone, plan_of, prompts_of
from texts import BOS, QUESTION, joined, texts

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, assemble, prompt
from redknot_hf.serving import Engine, Sampling, State
from redknot_hf.serving.documents import Documents

LENGTHS = (60, 33, 5)
SMALL = {"num_hidden_layers": 2}
LARGE = SIZES | {"memory": 1 << 23}


class Words:
    """A tokenizer whose words are numbers, and that begins texts with `<bos>`."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [*(BOS if add_special_tokens else []), *map(int, text.split())]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def words(ids):
    return " ".join(map(str, ids))


class Library:
    """A model, a store of documents, and what `assemble` and `generate` make of them."""

    def __init__(self, family, local=True, **overrides):
        self.model = make_model(family, **overrides)
        self.plan = plan_of(self.model, local)
        self.store = SegmentStore(self.model, self.plan)
        self.texts = texts(LENGTHS)
        self.refs = [self.store.add(BOS), *self.store.add_all(self.texts, BOS)]

    def expected(self, refs, end, new, boundary=None):
        """The tokens, and how many of the prompt's were taken as they are stored."""
        cache = assemble(self.model, refs, boundary=boundary, page_size=16)
        out = self.model.generate(**prompt(cache, end), max_new_tokens=new, do_sample=False)
        return out[0, -new:].tolist(), cache.reused_tokens

    def engine(self, **options):
        return Engine(self.model, self.plan, store=self.store, **LARGE | options)


@pytest.fixture(scope="module")
def llama():
    return Library("llama", **SMALL)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4_ragged", "gpt_oss", "phi3"])
def test_tokens_are_those_of_an_assembled_cache(family):
    library = Library(family)
    bos, a, b, c = library.refs
    asked = [
        ([bos, a, b], None),
        ([bos, c.address, a.address], 0),
        ([bos, library.texts[1], a.address], 9),  # ids that the store has, behind nothing
        ([a, a, b], "all"),
    ]
    plain, _ = prompts_of(1, 2)
    engine = library.engine()
    found = []
    for (segments, boundary), other in zip(asked, plain, strict=True):
        found.append(engine.submit(QUESTION, Sampling(4), segments=segments, boundary=boundary))
        found.append(engine.submit(other, Sampling(4)))
        engine.step()
    assert engine.drain()
    for request, (_, boundary) in zip(found[::2], asked, strict=True):
        refs = [part.ref for part in request.segments]
        tokens, reused = library.expected(refs, QUESTION, 4, boundary)
        assert request.result() == tokens
        assert request.prompt == [*joined(ref.ids for ref in refs), *QUESTION]
        assert request.cached == reused
    assert [x.result() for x in found[1::2]] == [alone(library.model, library.plan, p, 4) for p in plain]
    assert engine.reader.reused == sum(x.cached for x in found[::2])
    assert all_free(engine)


@pytest.mark.parametrize("chunk", [5, 200])
def test_recomputing_goes_chunk_by_chunk(llama, chunk):
    refs, other = [llama.refs[0], *llama.refs[1:] * 2], prompts_of(2, 2)[0][0]
    tokens, reused = llama.expected(refs, QUESTION, 6, 0.5)
    engine = llama.engine(chunk=chunk, parked=0)
    before = engine.submit(other, Sampling(30))
    while not before.tokens:
        engine.step()
    request = engine.submit(QUESTION, Sampling(6), segments=refs, boundary=0.5)
    had, most = len(before.tokens), 0
    while not request.tokens:
        read = engine.reader.read
        engine.step()
        most, had = max(most, engine.reader.read - read), had + 1
        assert len(before.tokens) == had  # whoever decodes gets a token in every step
    assert most <= chunk + len(QUESTION)
    assert engine.drain()
    assert (request.result(), request.cached) == (tokens, reused)
    assert before.result() == alone(llama.model, llama.plan, other, 30)
    assert all_free(engine)


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_what_was_assembled_is_parked_apart_from_what_was_read(llama, local):
    library = llama if local else Library("llama", local, **SMALL)
    refs, model, plan = library.refs[:3], library.model, library.plan
    whole = [*joined(ref.ids for ref in refs), *QUESTION]
    tokens, reused = library.expected(refs, QUESTION, 5, 0)
    read = alone(model, plan, whole, 5)
    assert tokens != read  # or this test could not fail
    for order in ((0, 1), (1, 0)) if local else ((1, 0),):
        engine = library.engine()
        for kind in (*order, *order):
            how = {"segments": refs, "boundary": 0} if kind else {}
            cached = engine.reader.read, engine.reader.reused
            request = engine.submit(QUESTION if kind else whole, Sampling(5), **how)
            assert run(engine, request)
            assert request.ids == (tokens if kind else read)
        assert request.cached == len(whole) - 1  # the second time nothing but the last token is read
        assert engine.reader.read == cached[0] + 1
        assert engine.reader.reused == cached[1] == reused
        other = engine.submit(QUESTION[::-1], Sampling(5), segments=refs, boundary=0)
        run(engine, other)
        assert other.ids == library.expected(refs, QUESTION[::-1], 5, 0)[0]
        assert other.cached == len(whole) - len(QUESTION)  # documents are assembled once for all questions
        third = engine.submit(QUESTION, Sampling(5), segments=refs, boundary=3)
        run(engine, third)
        assert third.ids == library.expected(refs, QUESTION, 5, 3)[0]
        assert all_free(engine)


def run(engine, request):
    while not request.state.ended:
        engine.step()
    return request.state is State.DONE


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
def test_preempted_requests_are_assembled_again(llama, preempt):
    refs = [*llama.refs, *llama.refs[1:]]
    tokens, _ = llama.expected(refs, QUESTION, 12, 0.3)
    for steps in (2, 9):
        engine = llama.engine(chunk=16, preempt=preempt, max_batch=1, parked=0)
        low = engine.submit(QUESTION, Sampling(12), segments=refs, boundary=0.3)
        for _ in range(steps):
            engine.step()
        high = engine.submit([5] * 30, Sampling(3), priority=1)
        engine.drain()
        assert low.preempted == 1
        assert low.result() == tokens
        assert high.result() == alone(llama.model, llama.plan, [5] * 30, 3)
        assert all_free(engine)


def test_forks_and_seeds(llama):
    refs, options = llama.refs[:2], {"do_sample": True, "temperature": 1.1, "top_k": 0}
    engine = llama.engine()
    found = engine.submit_many(QUESTION, 3, Sampling(5, temperature=1.1, seed=5), segments=refs)
    engine.drain()
    cache = assemble(llama.model, refs, page_size=16)
    for i, request in enumerate(found):
        torch.manual_seed(5 + i)
        out = llama.model.generate(**prompt(cache, QUESTION), max_new_tokens=5, **options)
        assert request.ids == out[0, -5:].tolist()
    assert engine.reader.reused == cache.reused_tokens
    assert all_free(engine)


@pytest.mark.core
def test_texts_and_what_the_tokenizer_begins_them_with(llama):
    engine = Engine(llama.model, llama.plan, store=llama.store, tokenizer=Words(), **LARGE)
    text = words(llama.texts[0])
    (by_text, by_address) = (
        engine.submit(words(QUESTION), Sampling(5), segments=[one]) for one in (text, engine.add_segment(text).address)
    )
    engine.drain()
    assert [part.ref for part in by_text.segments] == llama.refs[:2]
    assert by_text.prompt == [*BOS, *llama.texts[0], *QUESTION]
    assert by_address.result() == by_text.result() == llama.expected(llama.refs[:2], QUESTION, 5)[0]
    engine = Engine(llama.model, llama.plan, store=llama.store, tokenizer=Words(), **LARGE)
    each = engine.submit(QUESTION, Sampling(5), segments=[text, text], boundary=[0, 7])
    assert [part.boundary for part in each.segments] == [0, 0, 7]


def test_segments_are_stored_between_steps_of_others(llama):
    (new,) = texts((40,), seed=3)
    expected = alone(llama.model, llama.plan, [5] * 20, 30)
    with llama.engine() as engine:
        other = engine.submit([5] * 20, Sampling(30))
        made = []
        threads = [threading.Thread(target=lambda: made.append(engine.add_segment(new, BOS))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.result(60) == expected
        with pytest.raises(ValueError, match="the text has no tokens"):
            engine.add_segment([])
        request = engine.submit(QUESTION, Sampling(4), segments=[llama.refs[0], made[0].address])
        assert request.result(60) == llama.expected([llama.refs[0], made[0]], QUESTION, 4)[0]
    assert len({ref.address for ref in made}) == 1
    with pytest.raises(RuntimeError, match="does nothing any more"):
        engine.add_segment(new, BOS)


def test_what_cannot_be_served_is_refused_before_anything_is_lost(llama):
    engine = llama.engine(max_len=200)
    ask = lambda *segments, **more: engine.submit(QUESTION, Sampling(5), segments=[*segments], **more)  # noqa: E731
    before = ask(*llama.refs[:2])
    for segments, told in (
        (["0" * 64], "there is no segment '0000"),
        ([llama.refs[1], "text"], "a segment is text"),
        ([[5, 400]], "ids from 5 to 400: the model knows 0 to 96"),
        ([llama.refs[1]] * 4, "249 tokens of prompt and 5 new ones are more than max_len=200"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(*segments)
    with pytest.raises(ValueError, match=r"boundary=7\.5"):
        ask(llama.refs[1], boundary=7.5)
    with pytest.raises(ValueError, match="boundary=3 without segments"):
        ask(boundary=3)
    with pytest.raises(ValueError, match="give a list of them"):
        engine.submit(QUESTION, segments=llama.refs[1].address)
    with pytest.raises(ValueError, match="give one of them"):
        ask(llama.refs[1], source=lambda: None)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([], segments=llama.refs[:1])
    engine.drain()
    assert before.result() == llama.expected(llama.refs[:2], QUESTION, 5)[0]
    small = llama.engine(memory=56_000)
    with pytest.raises(ValueError, match=r"189 tokens of prompt and 5 new ones need [\d,]+ bytes"):
        small.submit(QUESTION, Sampling(5), segments=[llama.refs[1]] * 3)
    bare = Engine(llama.model, llama.plan, **LARGE)
    for refused in (lambda: bare.submit(QUESTION, segments=llama.refs[:1]), lambda: bare.add_segment([5])):
        with pytest.raises(ValueError, match="the engine has no store"):
            refused()


def test_a_store_must_be_the_engines(llama):
    with pytest.raises(ValueError, match="another plan"):
        Engine(llama.model, HeadPlan.uniform(llama.model.config, HeadSpec()), store=llama.store, **LARGE)
    with pytest.raises(ValueError, match="another model"):
        Documents(llama.store, make_model("llama"), llama.plan, 24, None)


def test_a_segment_that_breaks_ends_its_request_alone(llama, monkeypatch):
    engine = llama.engine()
    bad = engine.submit(QUESTION, Sampling(5), segments=llama.refs)
    fine = engine.submit([5] * 20, Sampling(5))
    monkeypatch.setattr(llama.store, "fetch", lambda refs: 1 / 0)
    engine.drain()
    assert (bad.state, str(bad.error)) == (State.FAILED, "division by zero")
    assert fine.result() == alone(llama.model, llama.plan, [5] * 20, 5)
    assert all_free(engine)


def test_texts_are_named_by_their_address_also_among_files(llama, tmp_path):
    store = SegmentStore(llama.model, llama.plan, path=tmp_path)
    ref = store.add(llama.texts[0], BOS)
    assert store.named(ref.address) is ref
    other = SegmentStore(llama.model, llama.plan, path=tmp_path)
    assert other.named(ref.address) == ref
    assert other.named(ref.address).ids == ref.ids
    file = tmp_path / f"{ref.address}.safetensors"
    for address in ("0" * 64, "../" + ref.address, "text"):
        file.with_stem("0" * 64).write_bytes(file.read_bytes())  # a file that lies
        with pytest.raises(ValueError, match="there is no segment"):
            other.named(address)
    for content in (b"", b"\xff" * 8, b"\x02" + bytes(7) + b"{}", file.read_bytes()[:100]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="there is no segment"):
            SegmentStore(llama.model, llama.plan, path=tmp_path).named(ref.address)
    store.drop(ref)
    with pytest.raises(ValueError, match="there is no segment"):
        store.named(ref.address)

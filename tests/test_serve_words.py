"""From tokens to words: the same text in pieces as in one, cut at stop strings, with thoughts and calls told apart."""

import asyncio
import random
import threading

import pytest
from transformers import GenerationConfig
from transformers.cli.serving.utils import ReasoningText, ToolCall, build_response_parser

from redknot_hf.serving.request import Token
from redknot_hf.serving.server.answers import Piece
from redknot_hf.serving.server.bodies import CompletionBody, Message, ResponseBody
from redknot_hf.serving.server.chat import _choice, _deltas
from redknot_hf.serving.server.errors import RequestError
from redknot_hf.serving.server.events import Likely, event
from redknot_hf.serving.server.output import Output
from redknot_hf.serving.server.post import Post
from redknot_hf.serving.server.prompts import Prompts
from redknot_hf.serving.server.sampling import model_defaults, sampling_of
from redknot_hf.serving.server.turns import turns_of
from redknot_hf.serving.server.wording import Cut, Detokenizer, Wording


def test_pieces_make_the_text(byte_tokenizer):
    draw = random.Random(0)
    for text in ("naïve café, 日本語 🙂 and so on", "a", ""):
        ids = byte_tokenizer(text, add_special_tokens=False)["input_ids"]
        words = Detokenizer(byte_tokenizer, False)
        pieces = [words.add(i) for i in ids]
        assert "\ufffd" not in "".join(pieces), "no piece of a letter is told"
        assert "".join(pieces) + words.rest() == text
    for _ in range(20):  # what is no text at all
        ids = [draw.randrange(len(byte_tokenizer)) for _ in range(40)]
        words = Detokenizer(byte_tokenizer, False)
        assert "".join(map(words.add, ids)) + words.rest() == byte_tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_string_cuts_wherever_pieces_end():
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("abc") for _ in range(12))
        strings = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(2)]
        cut, told = Cut(strings), ""
        at = 0
        while at < len(text):
            n = draw.randint(1, 4)
            told += cut.add(text[at : at + n])
            assert not any(string in told for string in strings)
            at += n
        whole = [(text.find(string) + len(string), text.find(string)) for string in strings if string in text]
        assert told + cut.rest() == text[: min(whole)[1] if whole else len(text)]
        assert cut.done == any(string in text for string in strings)


class _Qwen:
    """A model whose answers transformers knows how to take apart."""

    class config:  # noqa: N801
        model_type = "qwen3"


def parsed(tokenizer, text, tools=None, stop=()):
    ids = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    words = Wording(tokenizer, stop, (), build_response_parser(tokenizer, _Qwen, ids, tools=tools))
    parts = [part for i in tokenizer(text, add_special_tokens=False)["input_ids"] for part in words.add(i)]
    return [*parts, *words.rest()]


def test_thoughts_and_calls_are_told_apart(byte_tokenizer):
    text = '<think>Well.</think>I look.\n<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
    parts = parsed(byte_tokenizer, text)
    assert "".join(x for x in parts if isinstance(x, ReasoningText)) == "Well."
    assert "".join(x for x in parts if type(x) is str).strip() == "I look."
    assert [x for x in parts if isinstance(x, ToolCall)] == [ToolCall("look", '{"a": 1}')]
    assert not any(isinstance(x, ToolCall) for x in parsed(byte_tokenizer, text[:-20])), "half a call is none"
    assert "".join(map(str, parsed(byte_tokenizer, "I look. And then", stop=[" And"]))) == "I look."
    piece = Piece(0, parts, [], "tool_calls")
    message = _choice(piece, "1", None)["message"]
    assert message["reasoning_content"] == "Well."
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"a": 1}'}
    deltas = [x["delta"] for x in _deltas(piece, "1", None, {})]
    assert [x["tool_calls"][0]["id"] for x in deltas if "tool_calls" in x] == [message["tool_calls"][0]["id"]]
    assert "".join(x.get("reasoning_content", "") for x in deltas) == "Well."


def test_items_of_a_response_open_and_close():
    output = Output("1", None)
    parts = [ReasoningText("So"), ReasoningText(" it is."), "Yes", ToolCall("look", "{}"), "No"]
    events = [x for part in parts for x in output.add(Piece(0, [part]))]
    events += output.add(Piece(0, [], [], "stop"))
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call", "message"]
    assert output.items[0]["content"][0]["text"] == "So it is."
    assert [x["sequence_number"] for x in events] == list(range(len(events)))
    opened = [x["item"]["id"] for x in events if x["type"] == "response.output_item.added"]
    closed = [x["item"]["id"] for x in events if x["type"] == "response.output_item.done"]
    assert opened == closed == [item["id"] for item in output.items]
    assert [x["output_index"] for x in events if x["type"] == "response.output_item.done"] == [0, 1, 2, 3]
    silent = Output("2", None)
    silent.add(Piece(0, [], [], "stop"))
    assert silent.items[0]["content"][0]["text"] == ""


def test_log_probabilities_of_a_response(byte_tokenizer):
    output = Output("1", Likely(byte_tokenizer))
    output.add(Piece(0, ["ab"], [Token(70, -0.5, ((70, -0.5), (71, -1.0))), Token(71, -0.25)], "stop"))
    told = output.items[0]["content"][0]["logprobs"]
    assert [x["logprob"] for x in told] == [-0.5, -0.25]
    assert [x["token"] for x in told[0]["top_logprobs"]] == [byte_tokenizer.decode([i]) for i in (70, 71)]
    assert bytes(told[0]["bytes"]).decode() == told[0]["token"]


def test_what_a_client_says_goes_before_what_the_model_says():
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.1)
    body = CompletionBody(
        prompt="x", temperature=0.0, top_k=-1, min_p=0.1, presence_penalty=1.0, frequency_penalty=-1.0, seed=4,
        stop="end", stop_token_ids=[7], ignore_eos=True, logit_bias={"5": 2.0},
    )  # fmt: skip
    made = sampling_of(body, model_defaults(config), 9, 2)
    assert (made.temperature, made.top_k, made.top_p, made.min_p) == (0.0, 0, 0.9, 0.1)
    assert (made.repetition_penalty, made.presence_penalty, made.frequency_penalty) == (1.1, 1.0, -1.0)
    assert (made.seed, made.stop, made.stop_ids, made.ignore_eos) == (4, ("end",), (7,), True)
    assert (made.logit_bias, made.max_new_tokens, made.logprobs) == ({5: 2.0}, 9, 2)
    assert sampling_of(CompletionBody(prompt="x"), model_defaults(config), 9, None).temperature == 0.7
    greedy = GenerationConfig(temperature=0.7)
    assert sampling_of(CompletionBody(prompt="x"), model_defaults(greedy), 9, None).temperature == 0


def test_turns_of_a_response():
    body = ResponseBody(
        instructions="Be kind.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Go."}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Well."}]},
            {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "seen"},
        ],
    )
    turns = turns_of(body)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool"]
    assert turns[2].reasoning_content == "Well."
    assert turns[2].tool_calls[0].function.name == "look"
    flat = turns_of(ResponseBody(input=[{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]))
    assert [turn.role for turn in flat] == ["user"]


def test_a_chat_needs_a_template_and_tools_one_that_knows_them(byte_tokenizer):
    said = [Message(role="user", content="x"), Message(role="developer", content="y")]
    with pytest.raises(RequestError, match="/v1/completions"):
        asyncio.run(Prompts(byte_tokenizer).chat(said, None, {}))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    prompts = Prompts(byte_tokenizer, template)
    assert byte_tokenizer.decode(asyncio.run(prompts.chat(said, None, {}))[1]) == "user xsystem y"
    with pytest.raises(RequestError, match="knows no tools"):
        asyncio.run(prompts.chat(said, [{"type": "function", "function": {"name": "look"}}], {}))
    with pytest.raises(RequestError, match="refuses"):
        asyncio.run(Prompts(byte_tokenizer, "{{ raise_exception('no') }}").chat(said, None, {}))
    for template in ("{{ messages[0].content }}" * 2, "none"):
        with pytest.raises(RequestError, match="no one place"):
            asyncio.run(Prompts(byte_tokenizer, template).chat(said, None, {}, True))


def test_an_answer_begins_where_the_template_says_or_with_itself(byte_tokenizer, monkeypatch):
    def pieces(head, text):
        ids = byte_tokenizer(head, add_special_tokens=False)["input_ids"]
        parser = asyncio.run(Prompts(byte_tokenizer).parser(_Qwen, ids, None))
        words = Wording(byte_tokenizer, (), (), parser)
        parts = [part for i in byte_tokenizer(text, add_special_tokens=False)["input_ids"] for part in words.add(i)]
        return [(type(part), str(part)) for part in [*parts, *words.rest()]]

    def joined(parts, kind):
        return "".join(text for found, text in parts if found is kind)

    begun = pieces("Secret. <|im_start|>assistant\n<think>", "Well.</think>Yes.")
    assert (joined(begun, ReasoningText), joined(begun, str)) == ("Well.", "Yes.")
    other = pieces("Secret. [assistant]", "<think>Well.</think>Yes.")
    assert (joined(other, ReasoningText), joined(other, str)) == ("Well.", "Yes.")
    monkeypatch.setattr(_Qwen.config, "model_type", "llama")
    assert asyncio.run(Prompts(byte_tokenizer).parser(_Qwen, [5], None)) is None


def test_an_event_is_a_line_of_its_kind():
    assert event({"a": "é"}, "x") == 'event: x\ndata: {"a":"é"}\n\n'
    assert event({"a": "1\n2"}) == 'data: {"a":"1\\n2"}\n\n'


def test_what_threads_leave_is_delivered_in_order_and_the_loop_is_woken_once():
    async def deliver():
        post, queues = Post(), [asyncio.Queue(), asyncio.Queue()]
        woken, wake = [], post.loop.call_soon_threadsafe
        post.loop.call_soon_threadsafe = lambda *work: (woken.append(1), wake(*work))
        work = [threading.Thread(target=lambda: [post.put(queues[i % 2], i) for i in range(1000)])]
        work[0].start()
        work[0].join()
        assert len(woken) == 1
        found = [await queues[i % 2].get() for i in range(1000)]
        post.put(queues[0], "again")
        return found, await queues[0].get(), post

    found, again, post = asyncio.run(deliver())
    assert found == list(range(1000))
    assert again == "again"
    with pytest.raises(RuntimeError, match="closed"):
        post.put(asyncio.Queue(), "nobody")

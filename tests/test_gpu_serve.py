"""The server on an accelerator: `pytest -m gpu`."""

import copy
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
import torch
from listening import client_of, generated, listening, make_served, until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]


def test_streamed_text_is_that_of_generate_where_steps_are_graphs(byte_tokenizer):
    engine = make_served(copy.deepcopy(byte_tokenizer), stored=True, device="cuda")
    prompts = [f"Once there was a house by the sea. It had {i} windows." for i in range(8)]
    expected = [generated(engine, engine.tokenizer(text)["input_ids"], 40) for text in prompts]
    with listening(engine) as (_, address):
        client = client_of(address)

        def ask(text):
            chunks = client.completions.create(model="tiny", prompt=text, max_tokens=40, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, prompts)) == expected
        assert engine.reader.seats.replays > 0
        stored = httpx.post(f"{address}/v1/segments", json={"input": prompts}, timeout=20).json()["data"]
        more = {"segments": [one["id"] for one in stored[:2]], "boundary": 0.5}
        answer = client.completions.create(model="tiny", prompt=" Why?", max_tokens=5, extra_body=more)
        assert answer.usage.prompt_tokens_details.cached_tokens > 0
        until(lambda: engine.idle)
        held = httpx.get(f"{address}/status").json()
        assert held["used"] == engine.memory.used()["used"]

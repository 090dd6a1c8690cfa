"""A server on a thread of this process, for tests that call it over loopback."""

import asyncio
import threading
import time
from contextlib import contextmanager

import torch
from families import make_model
from openai import OpenAI

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore
from redknot_hf.serving import Engine
from redknot_hf.serving.server import Settings, app_for
from redknot_hf.serving.server.running import Server, bound

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% for c in m.tool_calls or [] %} calls {{ c.function.name }} of {{ c.function.arguments.a }}{% endfor %} [end]"
    "{% endfor %}{% if tools %}{{ tools[0].function.name }}{% endif %}{{ effort }}"
    "{{ '[assistant]' if add_generation_prompt }}"
)
SIZES = {"max_batch": 4, "max_len": 200, "chunk": 24, "page_size": 16, "memory": 1 << 22}


def make_served(tokenizer, stored=False, device="cpu", **sizes):
    """An engine of a small model that writes what the tokenizer reads, and that stores documents or not."""
    tokenizer.chat_template = CHAT
    model = make_model("llama", vocab_size=len(tokenizer), pad_token_id=None).to(device)
    plan = HeadPlan.with_global(model.config, [(1, 1)], HeadSpec(window=20, sink=2))
    store = SegmentStore(model, plan, page_size=16) if stored else None
    return Engine(model, plan, tokenizer=tokenizer, store=store, **{**SIZES, **sizes})


def generated(engine, ids, new, **options):
    """What `generate` writes under the engine's plan."""
    cache = RedKnotCache(engine.model.config, engine.plan, page_size=16)
    options = {"do_sample": False, **options}
    text = torch.tensor([ids], device=engine.model.device)
    options |= {"attention_mask": torch.ones_like(text), "pad_token_id": 0}
    out = engine.model.generate(text, past_key_values=cache, max_new_tokens=new, **options)
    return engine.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@contextmanager
def listening(engine, drain=20, **settings):
    """Gives the server and an address; both end with the block."""
    server = Server(app_for(engine, Settings(name="tiny", **settings)), engine, drain, log_level="error")
    socket = bound("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])), daemon=True)
    with engine:
        thread.start()
        until(lambda: server.started)
        try:
            yield server, f"http://127.0.0.1:{socket.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(40)
            assert not thread.is_alive()


def until(true, seconds=10):
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def client_of(address, key="none"):
    """OpenAI's client, which tries once."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=20)

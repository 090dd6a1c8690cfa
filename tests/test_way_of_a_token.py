"""A decoded token's way through one layer stays short: the host takes it once for every layer and token."""

import json
import subprocess
import sys
from pathlib import Path

import redknot_hf

MOST = 10  # files entered one after another, kernels aside
# In a process of its own, since checks of shapes in tests enter files too.
RUN = """
import json, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import redknot_hf
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

home, entered = Path(redknot_hf.__file__).parent, []
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=97,
)
model = LlamaForCausalLM(config).eval()
model.set_attn_implementation("redknot")
cache = RedKnotCache(config, HeadPlan.with_global(config, [(1, 0)], HeadSpec(window=16, sink=2)))
ids, layer = torch.arange(3, 63)[None], model.model.layers[1].self_attn
forward = layer.forward

def watch(frame, event, _):
    path = Path(frame.f_code.co_filename)
    if event == "call" and path.is_relative_to(home):
        entered.append(path.relative_to(home).as_posix())

def watched(*args, **kwargs):
    sys.setprofile(watch)
    try:
        return forward(*args, **kwargs)
    finally:
        sys.setprofile(None)

with torch.no_grad():
    for tokens in (60, 1, 1):
        model(ids[:, :tokens], use_cache=True, **cache_argument(model, cache))
    layer.forward = watched
    model(ids[:, :1], use_cache=True, **cache_argument(model, cache))
print(json.dumps([x for x, before in zip(entered, [None, *entered]) if x != before]))
"""


def test_a_decoded_token_enters_few_files_of_a_layer():
    found = [str(path) for path in sys.path if path] + [str(Path(redknot_hf.__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {found}\n{RUN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    stays = json.loads(done.stdout.splitlines()[-1])
    assert (stays[0], "cache/storage.py" in stays, "attention/attention.py" in stays) == ("cache/cache.py", True, True)
    assert len(stays) <= MOST, stays

"""The bundled model in int8 says what it says in full: 256 greedy tokens."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from evals.tiny.corpus import Corpus
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

TINY = Path(__file__).parents[1] / "evals" / "tiny"
NEW = 256


@torch.no_grad()
def test_256_greedy_tokens_are_those_of_dense_attention():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot")
    ids = new = torch.tensor([Corpus(Lexicon(), 0).collection(512, 5).context])
    cache, gaps = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()).stored("int8")), []
    for _ in range(NEW):
        logits = model(new, logits_to_keep=1, **cache_argument(model, cache)).logits[:, -1]
        new = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
        gaps.append(logits)
    # Each is the dense model's choice behind those before it, so these are its greedy tokens.
    dense = model(ids[:, :-1], use_cache=False).logits[:, -NEW:]
    assert torch.equal(dense.argmax(-1), ids[:, -NEW:])
    assert 0 < (torch.cat(gaps) - dense[0]).abs().max() < 0.5 * dense.std()  # it was another cache, and a near one
    assert len(set(ids[0, -NEW:].tolist())) > 5
    assert all(storage.cold.counts.min() >= 7 for storage in cache._storages())

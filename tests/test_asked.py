"""Queries that are asked for alone say what they say among all."""

import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf import HeadSpec
from redknot_hf.attention import asked
from redknot_hf.attention.watching import watching
from redknot_hf.plan.rules import head_rules

ROWS = (0, 1, 1, 40, *range(90, 300, 7), 398, 399)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_sliding", "gpt_oss"])
def test_some_queries_are_those_of_all(family, monkeypatch):
    """Under any rule, of heads alike or not; whatever the model adds: a softcap, logits of heads, its own window."""
    monkeypatch.setattr(asked, "_SPAN", 50)
    model, (prompt, _) = make_model(family), prompts(400)
    kinds = [HeadSpec(8, 1), HeadSpec(100, 4), HeadSpec(60, 0), HeadSpec(), HeadSpec(storage="int4")]
    seen = []

    def watcher(call):
        mixed = tuple((kinds * 2)[call.layer % 3 :][: call.heads])
        every = (*((kind,) * call.heads for kind in kinds), mixed)
        seen.extend((call.attend(specs, ROWS), call.attend(specs)[:, list(ROWS)]) for specs in every)
        return call.attend((HeadSpec(),) * call.heads)

    with torch.no_grad(), watching(model, watcher):
        model(prompt.ids[None], use_cache=False)
    assert len(seen) == 6 * model.config.num_hidden_layers
    for some, whole in seen:
        torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)


def test_only_what_the_queries_see_is_attended(monkeypatch):
    """A window of 16 over a text of 400, of which 5 queries ask, some of them beside each other."""
    attended = []
    attend = asked.attend
    monkeypatch.setattr(
        asked, "attend", lambda q, k, v, **o: attended.append((q.shape, k.shape)) or attend(q, k, v, **o)
    )
    model, (prompt, _) = make_model("llama"), prompts(400)

    def watcher(call):
        call.attend((HeadSpec(16, 2),) * call.heads, (10, 300, 302, 303, 399))
        return call.attend((HeadSpec(),) * call.heads)

    with torch.no_grad(), watching(model, watcher):
        model(prompt.ids[None], use_cache=False)
    layers, heads, dim = model.config.num_hidden_layers, model.config.num_key_value_heads, attended[0][0][-1]
    group = model.config.num_attention_heads // heads
    one = [((1, heads, group, dim), (1, heads, 11, dim)), ((1, heads, 4 * group, dim), (1, heads, 2 + 115, dim))]
    assert [tuple(map(tuple, pair)) for pair in attended] == one * layers


def test_masks_that_are_kept_outlive_inference_mode():
    asked._parts.cache_clear()
    rule = head_rules((HeadSpec(8, 1),), 64, None, 0)
    with torch.inference_mode():
        (part,) = asked._parts(rule, (5, 9), 2, torch.float32, torch.device("cpu"))
    assert not part.bias.is_inference()

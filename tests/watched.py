"""Plans that store heads in fewer bits, and steps held against dense attention over what their rows hold."""

import torch
from oracle import random_plan

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.cache.storage import Storage

PAGE, HOT = 16, 20


def stored_plan(config, seed=0):
    """A random plan in which two heads of every layer are stored in fewer bits."""
    storages = [HeadSpec(storage="int8"), HeadSpec(storage="int4")]
    return HeadPlan([[*storages, *layer[2:]] for layer in random_plan(config, seed)])


def watch(monkeypatch):
    """Holds every step of every layer against dense attention in float64 over what its rows say they hold."""
    attend, seen = Storage.attend, []

    def watched(self, step, query, real, options):
        wanted = None if step.written else _wanted(self, step, query.double(), real, options)
        out = attend(self, step, query, real, options)
        if wanted is not None:
            flags = torch.ones(out.shape[:2], dtype=torch.bool) if real is None else real[:, -out.shape[1] :]
            torch.testing.assert_close(out[flags].double(), wanted[flags], atol=2e-5, rtol=1e-4)
            seen.append(int(self.cold.counts.max(initial=0)) if self.cold.parts else 0)
        return out

    monkeypatch.setattr(Storage, "attend", watched)
    return seen


def _wanted(storage, step, query, real, options):
    rules, tokens = storage.rows.rules, query.shape[2]
    real = torch.ones(len(query), step.tokens, dtype=torch.bool) if real is None else real
    out = query.new_zeros(len(query), tokens, query.shape[1], step.value.shape[-1])
    for b, length in enumerate(storage.rows.lengths.tolist()):
        mine = real[b].nonzero()[:, 0]
        asked = mine[mine >= step.tokens - tokens] - (step.tokens - tokens)
        group = query.shape[1] // rules.heads
        for h in range(rules.heads):
            at = storage.rows.positions_held(b, h)
            held = storage.read(b, at * 0 + h, at)
            key, value = (
                torch.cat([x, new[b, h, mine]]).double() for x, new in zip(held, (step.key, step.value), strict=True)
            )
            k = torch.cat([torch.from_numpy(at), length + torch.arange(len(mine))])
            q = length + len(mine) - len(asked) + torch.arange(len(asked))
            one = rules.as_seen.take((h,))
            mask = one.visible(q[None], k[None])[0]
            for i in range(h * group, (h + 1) * group):
                scores = query[b, i, asked] @ key.T * options["scale"]
                if (cap := options["softcap"]) is not None:
                    scores = cap * torch.tanh(scores / cap)
                scores = scores.masked_fill(~mask, -torch.inf)
                if (sinks := options["s_aux"]) is not None:
                    scores = torch.cat([scores, sinks[i].double().expand(len(scores), 1)], 1)
                out[b, asked, i] = scores.softmax(-1)[:, : len(k)] @ value
    return out

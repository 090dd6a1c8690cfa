"""Any mix of what an engine does, on families whose attention is not Llama's: the tokens are those of `generate`."""

import random

import pytest
from families import VOCABULARY, make_model
from served import SIZES, all_free, alone

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.serving import Engine, Sampling

DRAWN = {"do_sample": True, "temperature": 0.9, "top_k": 0}
# Sliding layers, softcapped scores, layers that share keys, full ones with wider heads, values narrower than keys,
# other heads a layer, sinks of the softmax, keys turned in part.
CASES = {
    "gemma2": "swap",
    "gemma3": "recompute",
    "gemma4": "swap",
    "mimo_v2_flash": "recompute",
    "gpt_oss": "swap",
    "phi3": "recompute",
}


class Mix:
    """Random requests to an engine that has too few pages for them, and what each is to get."""

    def __init__(self, family, preempt, seed, local=True):
        self.draw = random.Random(seed)
        self.model = make_model(family)
        # One of them in a layer that sees everything, of families that have such.
        both = [(1, 1), (len(self.model.model.layers) // 2, 0)]
        rule = HeadSpec(window=20, sink=2) if local else HeadSpec()
        self.plan = HeadPlan.with_global(self.model.config, both, rule)
        self.preempt = preempt
        self.shared = self.text(40)

    def text(self, tokens):
        return [self.draw.randrange(3, VOCABULARY) for _ in range(tokens)]

    def prompt(self):
        cut = self.draw.choice((0, 0, 17, 33, 40))
        return self.shared[:cut] + self.text(self.draw.randint(1, 50))

    def engine(self):
        needs = Engine(self.model, self.plan, **SIZES).memory.needs
        options = {"memory": int(self.draw.uniform(3, 3.6) * needs(110)), "chunk": self.draw.choice((7, 16, 40))}
        engine = Engine(self.model, self.plan, **SIZES | options | {"preempt": self.preempt, "max_batch": 3})
        engine.scheduler.ahead = 1
        return engine

    def run(self, requests):
        """Serves them; gives the engine, and of each prompt the requests that were made of it."""
        engine = self.engine()
        found = [engine.submit_many(self.shared, 1, Sampling(4))]
        while not engine.idle:
            engine.step()
        for i in range(requests):
            prompt, temperature = self.prompt() if i else self.shared + self.text(9), self.draw.choice((0, 0.9))
            how = Sampling(self.draw.randint(3, 18), temperature=temperature, seed=i)
            many = 2 if temperature and self.draw.random() < 0.5 else 1
            found.append(engine.submit_many(prompt, many, how, priority=self.draw.choice((0, 0, 1))))
            for _ in range(self.draw.randint(0, 5)):
                engine.step()
            if i == 1:
                found[-1][0].cancel()
        urgent = engine.submit_many(self.shared + self.text(3), 1, Sampling(3), priority=2)
        assert engine.drain()
        return engine, [*found, urgent]

    def check(self, engine, found):
        for asked in found:
            for request in asked:
                how = request.sampling
                options = DRAWN if how.temperature else {}
                wanted = alone(self.model, self.plan, request.prompt, how.max_new_tokens, how.seed, **options)
                if request.cancelling:
                    assert request.ids == wanted[: len(request.ids)]
                else:
                    assert request.result() == wanted
        assert all_free(engine)


@pytest.mark.parametrize("family", CASES)
def test_tokens_are_those_of_generate_at_any_mix(family):
    mix = Mix(family, CASES[family], seed=0)
    engine, found = mix.run(5)
    assert engine.scheduler.preemptions[CASES[family]] > 0
    assert engine.memory.prefixes.hit_tokens > 0
    assert max(map(len, found)) == 2
    mix.check(engine, found)

"""A model with random weights, and the caches that are compared on it."""

import torch

from evals.benchmarks.random_llama import random_llama
from evals.timed_model import TimedModel
from redknot_hf import HeadPlan, HeadSpec

LOCAL = HeadSpec(window=256, sink=4)
STORAGES = "int8", "int4"


class MeasuredModel(TimedModel):
    """A Llama of a shape, with plans that keep everything and that keep an eighth of its heads global."""

    def __init__(self, shape: str, longest: int, device: torch.device) -> None:
        model = random_llama(shape, longest + 4096, device)
        config = model.config
        heads, layers = config.num_key_value_heads, range(config.num_hidden_layers)
        plans = {
            "all global": HeadPlan.uniform(config, HeadSpec()),
            "1/8 global": HeadPlan.with_global(config, [(i, i % heads) for i in layers], local=LOCAL),
        }
        plans |= {f"1/8 global {storage}": plans["1/8 global"].stored(storage) for storage in STORAGES}
        super().__init__(model, plans, longest)

"""Time and memory of a forward pass and of decoding, ours against DynamicCache, as ratios within one run."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

TINY = Path(__file__).parents[1] / "tiny"


def bundled() -> tuple[PreTrainedModel, HeadPlan]:
    """The bundled trained model and its plan."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model, HeadPlan.load(TINY / "plan.json", model.config)


def llama_1024() -> tuple[PreTrainedModel, HeadPlan]:
    """Four Llama layers of hidden 1024, random weights, one of eight KV heads global."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8,
        vocab_size=4096, max_position_embeddings=65536,
    )  # fmt: skip
    torch.manual_seed(0)
    plan = HeadPlan.with_global(config, [(i, i % 8) for i in range(4)], local=HeadSpec(window=256, sink=4))
    return LlamaForCausalLM(config), plan


MODELS = {"bundled": bundled, "llama_1024": llama_1024}


@torch.inference_mode()
def measure(model: PreTrainedModel, plan: HeadPlan, length: int, tokens: int, repeats: int) -> dict[str, dict]:
    """Medians of prefill seconds and milliseconds a decoded token, and resident bytes, for each method."""
    whole = HeadPlan.uniform(model.config, HeadSpec())
    methods: dict[str, tuple[str, Callable[[], DynamicCache | RedKnotCache]]] = {
        "dynamic": ("sdpa", lambda: DynamicCache(config=model.config)),
        "all_global": ("redknot", lambda: RedKnotCache(model.config, whole)),
        "plan": ("redknot", lambda: RedKnotCache(model.config, plan)),
    }
    ids = torch.randint(model.config.vocab_size, (1, length))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    nbytes: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, (attention, make) in methods.items():
            model.set_attn_implementation(attention)
            cache = make()
            start = time.perf_counter()
            model(ids, logits_to_keep=1, **cache_argument(model, cache))
            prefill = time.perf_counter() - start
            nbytes[name] = resident(cache)
            steps = []
            for _ in range(tokens):
                start = time.perf_counter()
                model(ids[:, :1], **cache_argument(model, cache))
                steps.append(time.perf_counter() - start)
            if turn:  # the first turn warms up
                times[name].append((prefill, statistics.median(steps)))
    return {
        name: {
            "prefill_s": statistics.median(p for p, _ in runs),
            "decode_ms": 1e3 * statistics.median(d for _, d in runs),
            "kv_bytes": nbytes[name],
        }
        for name, runs in times.items()
    }


def resident(cache: DynamicCache | RedKnotCache) -> int:
    """Bytes of keys and values a cache holds."""
    if isinstance(cache, RedKnotCache):
        return cache.nbytes
    return sum(tensor.nbytes for keys, values, *_ in cache for tensor in (keys, values) if tensor is not None)


def table(rows: list[dict]) -> str:
    """The measurements, with ratios to DynamicCache of the same run."""
    lines = [
        f"{'model':12} {'length':>7} {'method':11} "
        f"{'prefill s':>10} {'ratio':>6} {'ms/token':>9} {'ratio':>6} {'KV MiB':>8}"
    ]
    for row in rows:
        base = row["methods"]["dynamic"]
        for name, m in row["methods"].items():
            ratios = m["prefill_s"] / base["prefill_s"], m["decode_ms"] / base["decode_ms"]
            lines.append(
                f"{row['model']:12} {row['length']:7} {name:11} {m['prefill_s']:10.3f} {ratios[0]:6.2f} "
                f"{m['decode_ms']:9.2f} {ratios[1]:6.2f} {m['kv_bytes'] / 2**20:8.1f}"
            )
    return "\n".join(lines)

"""Two processes, one after the other at a conversation: `transfer_worker.py FOLDER`."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from families import make_model
from oracle import random_plan
from texts import prompts

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, SegmentStore, cache_argument
from redknot_hf.cache.argument import OF_GENERATE
from redknot_hf.reuse.transfer import park, receive, resume, send

FAMILIES = ("llama", "gemma4", "mistral_sliding", "mimo_v2_flash")
DTYPES = {"llama": torch.bfloat16}
NEW = 8
KEPT = HeadSpec(40, 4)
LONG = 2000


def model_of(family: str):
    model = make_model(family, DTYPES.get(family, torch.float32), max_position_embeddings=4096)
    return model, random_plan(model.config)


def conversation(model, cache, ids, mask, tokens: int):
    """Greedy tokens behind what the cache has read, with what was there."""
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **{OF_GENERATE: cache})
    return out, torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)


def long_plan(config) -> HeadPlan:
    """One of eight heads global, as large models have them."""
    return HeadPlan([[HeadSpec() if i == 0 and h == 1 else KEPT for h in range(8)] for i in range(2)])


def long_model():
    return make_model("llama", num_hidden_layers=2, num_key_value_heads=8, max_position_embeddings=4096)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, said = dist.get_rank(), {}
    for family in FAMILIES:
        model, plan = model_of(family)
        ids, mask = prompts(2, 50, (0, 9))
        cache = RedKnotCache(model.config, plan, page_size=16)
        if rank == 0:
            text, flags = conversation(model, cache, ids, mask, NEW)
            torch.save([text, flags, cache.spans(slack=False)], folder / f"{family}.left")
            send(cache, 1)
        else:
            receive(cache, 0)
            text, flags, held = torch.load(folder / f"{family}.left", weights_only=False)
            same = [torch.equal(a.data, b.data) for a, b in zip(cache.spans(slack=False), held, strict=True)]
            filed = RedKnotCache(model.config, plan, page_size=16)
            filed.extend(held)
            found = [conversation(model, one, text, flags, NEW)[0].tolist() for one in (cache, filed)]
            said[family] = {"exact": same, "tokens": found}
    model = long_model()
    plan = long_plan(model.config)
    cache = RedKnotCache(model.config, plan)
    ids = prompts(1, LONG, (0,))[0]
    if rank == 0:
        with torch.no_grad():
            model(ids, use_cache=True, **cache_argument(model, cache))
        said["wire"] = send(cache, 1)
    else:
        said["wire"] = receive(cache, 0)
    said["refused"] = refusals(cache, rank)
    store = SegmentStore(model, plan, path=folder / "kv", device_bytes=0, host_bytes=0)
    if rank == 0:
        (ref,) = park(cache, ids, store)
        said["parked"] = ref.address
    dist.barrier()
    if rank == 1:
        resumed = resume(store.ref(ids), store)
        said["parked"] = {
            "address": store.ref(ids).address, "computed": store.counts.computed + store.counts.recomputed,
            "exact": torch.equal(resumed.spans(slack=False)[0].data, cache.spans(slack=False)[0].data),
        }  # fmt: skip
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def refusals(cache, rank: int) -> list[str]:
    """What the second process says of messages that are none, and of one that comes to a cache that is not empty."""
    bad = [b"", b"no json", b'[{"tokens": 3}]', b'[{"tokens": 1, "layers": [], "dtype": "torch.float32"}]']
    said = []
    for header in bad:
        if rank == 0:
            dist.send(torch.tensor([len(header), 99]), 1)
            if header:
                dist.send(torch.frombuffer(bytearray(header), dtype=torch.uint8), 1)
        else:
            try:
                receive(cache, 0)
            except ValueError as e:
                said.append(str(e))
    if rank == 0:
        send(cache, 1)
    else:
        try:
            receive(cache, 0)
        except ValueError as e:
            said.append(str(e))
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One rank of two on accelerators, over NCCL: `torchrun gpu_ranks_worker.py FOLDER`, the folder with a model."""

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_worker import served
from texts import prompts
from transfer_worker import NEW, conversation, model_of
from transformers import AutoModelForCausalLM

from redknot_hf import HeadPlan, RedKnotCache
from redknot_hf.parallel import over_ranks, reorder_heads
from redknot_hf.reuse.transfer import receive, send

MEMORY = 175_000  # bytes of pages of a rank: too few for all requests
SENT = ("llama", "gemma4")
SECONDS = 200


def sent(rank: int, device: torch.device) -> dict:
    """A conversation that the first rank begins and the second one ends."""
    said = {}
    for family in SENT:
        model, plan = model_of(family)
        model.to(device)
        ids, mask = (x.to(device) for x in prompts(2, 50, (0, 9)))
        cache = RedKnotCache(model.config, plan, page_size=16)
        whole = RedKnotCache(model.config, plan, page_size=16)
        text, flags = conversation(model, whole, ids, mask, NEW)
        if rank == 0:
            said[family] = {"wire": send(whole, 1)}
            continue
        wire = receive(cache, 0)
        held = zip(cache.spans(slack=False), whole.spans(slack=False), strict=True)
        same = [torch.equal(a.data, b.data) for a, b in held]
        out, _ = conversation(model, cache, text, flags, NEW)
        expected, _ = conversation(model, whole, text, flags, NEW)
        said[family] = {"wire": wire, "exact": same, "tokens": torch.equal(out, expected)}
    return said


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang tells where
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(folder, **over_ranks(), attn_implementation="redknot")
    placement = HeadPlan.load(folder / "plan.json").balanced(2, 72, model.config)
    reorder_heads(model, placement)
    said = {"sent": sent(rank, device), "served": served(model, placement.plan, MEMORY)}
    dist.barrier()
    dist.destroy_process_group()  # which waits for captured graphs that exchange anything
    (folder / f"{rank}.json").write_text(json.dumps(said))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

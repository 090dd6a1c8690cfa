"""One rank of a tensor-parallel run: `torchrun parallel_worker.py FOLDER`, the folder with model, plans and prompt."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redknot_hf import HeadPlan, RedKnotCache
from redknot_hf.parallel import reorder_heads

OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}


def run(model, plan: HeadPlan, prompt: dict) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """Tokens and logits of greedy decoding and of beams, pages of each KV head of layer 0 then, and all bytes."""
    found = {}
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}}.items():
        cache = RedKnotCache(model.config, plan, page_size=16)
        out = model.generate(**prompt, past_key_values=cache, **OPTIONS | options)
        found |= {f"{name}.tokens": out.sequences.contiguous(), f"{name}.logits": torch.stack(out.logits)}
    pages = (cache.layers[0].storage.rows.table[0] >= 0).sum(-1).tolist()
    return found, pages, cache.nbytes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="redknot")
    rank = torch.distributed.get_rank()
    prompt = load_file(folder / "prompt.safetensors")

    def leave(name: str, plan: HeadPlan) -> None:
        found, pages, nbytes = run(model, plan, prompt)
        save_file(found, folder / f"{name}.{rank}.safetensors")
        (folder / f"{name}.{rank}.json").write_text(json.dumps({"pages": pages, "nbytes": nbytes}))

    for path in sorted(folder.glob("*.plan")):
        leave(path.stem, HeadPlan.load(path))
    placement = HeadPlan.load(folder / "first rank global.plan").balanced(2, 72, model.config)
    reorder_heads(model, placement)
    leave("balanced", placement.plan)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

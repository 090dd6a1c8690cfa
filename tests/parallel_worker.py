"""One rank of a tensor-parallel run: `torchrun parallel_worker.py FOLDER`, the folder with model, plans and prompt."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from redknot_hf import HeadPlan, RedKnotCache

OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}


def run(model, plan: HeadPlan, prompt: dict) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Tokens and logits of greedy decoding and of beams, and how many pages each KV head of layer 0 has in the end."""
    found = {}
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}}.items():
        cache = RedKnotCache(model.config, plan, page_size=16)
        out = model.generate(**prompt, past_key_values=cache, **OPTIONS | options)
        found |= {f"{name}.tokens": out.sequences.contiguous(), f"{name}.logits": torch.stack(out.logits)}
    pages = (cache.layers[0].storage.rows.table[0] >= 0).sum(-1).tolist()
    return found, pages


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="redknot")
    rank = torch.distributed.get_rank()
    prompt = load_file(folder / "prompt.safetensors")
    for path in sorted(folder.glob("*.plan")):
        found, pages = run(model, HeadPlan.load(path), prompt)
        save_file(found, folder / f"{path.stem}.{rank}.safetensors")
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(pages))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

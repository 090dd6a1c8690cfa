"""A few steps of decoding and appending, small enough for a memory checker.

compute-sanitizer --tool memcheck python kernels/benchmarks/sanitize.py
"""

import torch
from redknot_kernels import UNBOUNDED, HeadRules, implementation


def main() -> None:
    """Runs steps of one and of several tokens on rows of very different length, with shuffled pages."""
    kernels, device = implementation("triton"), torch.device("cuda")
    rules = HeadRules.make((UNBOUNDED, 30), (0, 4), page_size=16)
    lengths, room = [0, 1, 700, 33], 760
    pages = [-(-room // 16), min(-(-room // 16), rules.max_pages[1])]
    order = torch.randperm(4 * sum(pages), device=device).int()
    table = torch.zeros(4, 2, max(pages), dtype=torch.int32, device=device)
    table[:, 0], table[:, 1, : pages[1]] = order[: 4 * pages[0]].view(4, -1), order[4 * pages[0] :].view(4, -1)
    k_pages, v_pages = (torch.randn(len(order), 16, 24, device=device, dtype=torch.bfloat16) for _ in range(2))
    counts = torch.tensor([*lengths, max(lengths)], dtype=torch.int32, device=device)
    for tokens in (1, 5, 16, 1):
        query, k_new, v_new = (
            torch.randn(4, tokens, h, 24, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (4, 2, 2)
        )
        real = torch.rand(4, tokens, device=device) < 0.7
        kernels.step(query, k_pages, v_pages, k_new, v_new, table, counts, real, rules, scale=0.2)
    long = torch.randn(4, 2, 50, 24, device=device, dtype=torch.bfloat16)
    kernels.append(k_pages, v_pages, long, long, table, torch.tensor([0, 1, 700, 33], device=device), rules)
    torch.cuda.synchronize()
    print(counts.tolist())


if __name__ == "__main__":
    main()

"""Every Triton kernel compiles for every architecture and fits its shared memory. Needs Triton, and no accelerator.

A process that interprets kernels cannot compile them, so each architecture has a process of its own: this file, run as
a script, which prints what it found as JSON.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache, partial
from pathlib import Path

import pytest

# Backend, architecture, threads of a warp, bytes of shared memory that a block may take.
CHIPS = {
    "sm80": ("cuda", 80, 32, 99 << 10),  # the limit of sm86 and sm89, which run the same tiles
    "sm90": ("cuda", 90, 32, 227 << 10),
    "sm100": ("cuda", 100, 32, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}


def compile_kernel(chip, kernel, arguments, **options):
    """Compiles a kernel. `arguments`: for each its type, such as "*bf16", or any other value for a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name.startswith("stride")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(*CHIPS[chip][:3]), options=options)


def prefill(chip, past, dtype, dims, group, page=0, split=False, softcap=False, sink=False):
    from redknot_kernels import triton_prefill

    kind, itemsize = "paged" if page else "local", 4 if dtype == "fp32" else 2
    tile = triton_prefill.configuration(chip, kind, itemsize, max(dims), group)
    kernel = triton_prefill._prefill_kernel
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("query", "k_new", "v_new", "k_past", "v_past", "s_aux", "out"), f"*{dtype}")
    arguments |= {"table": "*i32", "heads": "*i64", "bounds": "*i32", "lse": "*fp32", "scale": "fp32"}
    arguments |= {"softcap": "fp32"} | ({"out": "*fp32"} if split else {})
    arguments |= {"GROUP": group, "DIM": dims[0], "VALUE_DIM": dims[1], "HAS_PAST": past, "PAGE": page, "SPLIT": split}
    arguments |= {"SOFTCAP": softcap, "HAS_SINK": sink, "UPCAST": False}
    arguments |= {"BLOCK_M": tile["rows"], "BLOCK_N": tile["keys"], **triton_prefill.padded(*dims, 8)}
    return compile_kernel(chip, kernel, arguments, **tile["options"])


CASES = {
    "prefill": partial(prefill, past=False, dtype="bf16", dims=(128, 128), group=4),
    "prefill_band": partial(prefill, past=True, dtype="bf16", dims=(128, 128), group=4),
    "prefill_band_logits": partial(
        prefill, past=True, dtype="fp16", dims=(64, 64), group=8, split=True, softcap=True, sink=True
    ),
    "prefill_band_fp32": partial(prefill, past=True, dtype="fp32", dims=(128, 128), group=1),
    "prefill_pages": partial(prefill, past=True, dtype="bf16", dims=(128, 128), group=4, page=64),
    "prefill_pages_small": partial(prefill, past=True, dtype="bf16", dims=(96, 80), group=5, page=16, split=True),
    "prefill_pages_256": partial(prefill, past=True, dtype="bf16", dims=(256, 256), group=16, page=128, softcap=True),
    "prefill_pages_fp32": partial(prefill, past=True, dtype="fp32", dims=(256, 256), group=2, page=16, sink=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, case):
    pytest.importorskip("triton")
    found = _compiled(chip)[case]
    assert isinstance(found, int), found
    assert found <= CHIPS[chip][3]


@lru_cache
def _compiled(chip):
    """Shared memory of every case in bytes, or the error."""
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, __file__, chip]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(chip):
    """Compiles every case for one architecture."""
    found = {}
    for name, case in CASES.items():
        try:
            found[name] = case(chip).metadata.shared
        except Exception as error:  # of the compiler: every case has its say
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "torch-ext"))
    main(sys.argv[1])

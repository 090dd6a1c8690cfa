"""Every Triton kernel compiles for every architecture and fits its shared memory. Needs Triton, and no accelerator.

A process that interprets kernels cannot compile them, so another one does: this file, run as a script, which prints
what it found as JSON.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

# Backend, architecture, threads of a warp, bytes of shared memory that a block may take.
CHIPS = {
    "sm80": ("cuda", 80, 32, 99 << 10),  # the limit of sm86 and sm89, which run the same tiles
    "sm90": ("cuda", 90, 32, 227 << 10),
    "sm100": ("cuda", 100, 32, 227 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}


def launch(chip, kernel, arguments, **options):
    """What is compiled. `arguments`: for each its type, such as "*bf16", or any other value for a constant."""
    return chip, kernel, arguments, options


def compile_kernel(chip, kernel, arguments, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name.startswith("stride")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(*CHIPS[chip][:3]), options=options)


def prefill(chip, past, dtype, dims, group, page=0, split=False, softcap=False, sink=False):
    from redknot_kernels.triton import prefill as triton_prefill
    from redknot_kernels.triton.configurations import configuration

    kind, itemsize = "paged" if page else "local", 4 if dtype == "fp32" else 2
    tile = configuration("prefill", chip, kind, itemsize, max(dims), group)
    kernel = triton_prefill._prefill_kernel
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("query", "k_new", "v_new", "k_past", "v_past", "s_aux", "out"), f"*{dtype}")
    arguments |= {"table": "*i32", "heads": "*i64", "bounds": "*i32", "lse": "*fp32", "scale": "fp32"}
    arguments |= {"softcap": "fp32"} | ({"out": "*fp32"} if split else {})
    arguments |= {"GROUP": group, "DIM": dims[0], "VALUE_DIM": dims[1], "HAS_PAST": past, "PAGE": page, "SPLIT": split}
    arguments |= {"SOFTCAP": softcap, "HAS_SINK": sink, "UPCAST": False}
    arguments |= {"BLOCK_M": tile["rows"], "BLOCK_N": tile["keys"], **triton_prefill.padded(*dims, 8)}
    return launch(chip, kernel, arguments, **tile["options"])


def attend_at(chip, dtype, dims, group, softcap=False, sink=False):
    from redknot_kernels.triton import attend_at as triton_attend_at
    from redknot_kernels.triton.configurations import configuration

    tile = configuration("prefill", chip, "text", 4 if dtype == "fp32" else 2, max(dims), group)
    kernel, power = triton_attend_at._attend_at_kernel, lambda n: 1 << (n - 1).bit_length()
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("query", "keys", "values", "s_aux", "out"), f"*{dtype}")
    arguments |= {"positions": "*i64", "bounds": "*i32", "scale": "fp32", "softcap": "fp32"}
    arguments |= {"GROUP": group, "DIM": dims[0], "VALUE_DIM": dims[1], "SOFTCAP": softcap, "HAS_SINK": sink}
    arguments |= {"UPCAST": False, "BLOCK_M": tile["rows"], "BLOCK_N": tile["keys"]}
    arguments |= {"BLOCK_D": max(16, power(dims[0])), "BLOCK_V": max(16, power(dims[1]))}
    return launch(chip, kernel, arguments, **tile["options"])


def in_chunks(chip, dtype, dims, group, page, softcap=False, sink=False):
    from redknot_kernels.triton import in_chunks as triton_in_chunks
    from redknot_kernels.triton.configurations import configuration
    from redknot_kernels.triton.prefill import padded

    tile = configuration("prefill", chip, "chunks", 4 if dtype == "fp32" else 2, max(dims), group)
    kernel, blocks = triton_in_chunks._in_chunks_kernel, padded(*dims, 8)
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("query", "key", "value", "key_cold", "value_cold", "s_aux", "out"), f"*{dtype}")
    arguments |= {"places": "*i32", "ends": "*i32", "scale": "fp32", "softcap": "fp32"}
    arguments |= {"GROUP": group, "DIM": dims[0], "VALUE_DIM": dims[1], "PAGE": page, "SOFTCAP": softcap}
    arguments |= {
        "HAS_SINK": sink,
        "UPCAST": False,
        "BLOCK_M": tile["rows"],
        "BLOCK_N": max(16, min(tile["keys"], page)),
    }
    arguments |= {"BLOCK_D": blocks["BLOCK_D"], "BLOCK_V": blocks["BLOCK_V"]}
    return launch(chip, kernel, arguments, **tile["options"])


def decode(chip, dtype, dims, group, page, tokens=1, fused=True, flags=False, softcap=False, storage=()):
    """`tokens`: `None` for as many as a launch takes."""
    import torch
    from redknot_kernels.triton import cold
    from redknot_kernels.triton import decode as triton_decode
    from redknot_kernels.triton.configurations import configuration

    kinds, itemsize = [f"int{bits}" for bits in storage] or ["rows"], 4 if dtype == "fp32" else 2
    tile, *others = (configuration("decode", chip, kind, itemsize, max(dims), group) for kind in kinds)
    assert others in ([], [tile])  # else one kind of cold pages needs a case of its own
    kernel, power = triton_decode.split_kernel, lambda n: 1 << (n - 1).bit_length()
    tokens = tokens or triton_decode.most_new_tokens(max(dims), itemsize)
    stored, most = (cold.Stored(None, storage, 0), cold.MOST_ROWS) if storage else (None, triton_decode._QUERIES)
    sizes = cold.cold_sizes(stored, tile, dims[0], page, torch.device("cuda"), itemsize, group * tokens)
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("q", "k_pages", "v_pages", "k_new", "v_new"), f"*{dtype}")
    arguments |= dict.fromkeys(("table", "counts", "bounds", "shares"), "*i32")
    arguments |= {"flags": "*i1" if flags else "*i32", "part_out": "*fp32", "part_lse": "*fp32"}
    arguments |= {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(("codes8", "codes4"), "*u8")
    arguments |= dict.fromkeys(("scales8", "scales4"), "*fp16") | dict.fromkeys(("cold_table", "cold_counts"), "*i32")
    arguments |= {"signs": f"*{dtype}", **sizes, "PTX": chip.startswith("sm")}
    arguments |= {"tokens": 1} if tokens == 1 else {}
    arguments |= {"GROUP": group, "DIM": dims[0], "VALUE_DIM": dims[1], "PAGE": page}
    arguments |= {"FUSED": fused, "HAS_FLAGS": flags, "MIN_SPLIT": 64, "BLOCK_R": 8, "BLOCK_T": max(16, power(tokens))}
    arguments |= {"BLOCK_M": min(most, power(max(16, group * tokens))), "BLOCK_N": tile["keys"]}
    arguments |= {"BLOCK_D": max(16, power(dims[0])), "BLOCK_V": max(16, power(dims[1]))}
    arguments |= {"SOFTCAP": softcap, "UPCAST": False, "EARLY": chip in ("sm90", "sm100")}
    return launch(chip, kernel, arguments, **tile["options"])


def merge(chip, splits, sink=False):
    from redknot_kernels.triton import decode as triton_decode

    kernel = triton_decode.merge_kernel
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= {"part_out": "*fp32", "part_lse": "*fp32", "s_aux": "*bf16", "out": "*bf16"}
    arguments |= dict.fromkeys(("shares", "counts", "flags"), "*i32")
    arguments |= {"GROUP": 4, "tokens": 1, "VALUE_DIM": 128, "FUSED": True, "HAS_FLAGS": False, "BLOCK_T": 16}
    arguments |= {"BLOCK_B": 2, "BLOCK_S": splits, "BLOCK_V": min(128, 4096 // splits), "HAS_SINK": sink}
    arguments |= {"EARLY": chip in ("sm90", "sm100")}
    return launch(chip, kernel, arguments, num_warps=2)


def cool(chip, dims, page, new):
    from redknot_kernels.triton import quantise

    kernel, power = quantise._cool_kernel, lambda n: 1 << (n - 1).bit_length()
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("k_pages", "v_pages", "k_new", "v_new", "signs"), "*bf16")
    arguments |= dict.fromkeys(("table", "lengths", "bounds", "cold_table", "cold_counts"), "*i32")
    arguments |= dict.fromkeys(("codes8", "codes4"), "*u8") | dict.fromkeys(("scales8", "scales4"), "*fp16")
    arguments |= {"DIM": dims[0], "VALUE_DIM": dims[1], "PAGE": page, "TURNED": dims[0] & -dims[0]}
    arguments |= {"BLOCK_D": max(16, power(dims[0])), "BLOCK_V": max(16, power(dims[1]))}
    arguments |= {"HAS_NEW": new, "INT8": True, "INT4": True}
    arguments |= {"UPCAST": False, "EARLY": chip in ("sm90", "sm100")}
    return launch(chip, kernel, arguments, num_warps=8)


def merge_and_cool(chip, dims, page, storage, splits):
    from redknot_kernels.triton import merging

    kernel, power = merging.merge_and_cool_kernel, lambda n: 1 << (n - 1).bit_length()
    arguments = dict.fromkeys(kernel.arg_names, "i32") | {"part_out": "*fp32", "part_lse": "*fp32"}
    arguments |= dict.fromkeys(("s_aux", "out", "k_pages", "v_pages", "signs"), "*bf16")
    arguments |= dict.fromkeys(("shares", "counts", "flags", "table", "bounds", "cold_table", "cold_counts"), "*i32")
    arguments |= dict.fromkeys(("codes8", "codes4"), "*u8") | dict.fromkeys(("scales8", "scales4"), "*fp16")
    arguments |= {"GROUP": 4, "tokens": 1, "VALUE_DIM": dims[1], "FUSED": True, "HAS_FLAGS": False, "BLOCK_T": 16}
    arguments |= {"BLOCK_B": 2, "BLOCK_S": splits, "BLOCK_V": min(128, 4096 // splits), "HAS_SINK": False}
    arguments |= {"DIM": dims[0], "PAGE": page, "TURNED": dims[0] & -dims[0], "COOL_D": max(16, power(dims[0]))}
    arguments |= {"COOL_V": max(16, power(dims[1])), "INT8": 8 in storage, "INT4": 4 in storage, "UPCAST": False}
    return launch(chip, kernel, arguments | {"EARLY": chip in ("sm90", "sm100")}, num_warps=4)


def append(chip, dims, page):
    from redknot_kernels.triton import pages as triton_pages

    kernel, power = triton_pages._append_kernel, lambda n: 1 << (n - 1).bit_length()
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("k_pages", "v_pages", "k_new", "v_new"), "*bf16")
    arguments |= dict.fromkeys(("table", "lengths", "bounds"), "*i32")
    arguments |= {"DIM": dims[0], "VALUE_DIM": dims[1], "PAGE": page, "BLOCK_T": 64}
    arguments |= {"BLOCK_D": power(dims[0]), "BLOCK_V": power(dims[1]), "EARLY": chip in ("sm90", "sm100")}
    return launch(chip, kernel, arguments, num_warps=4)


def place(chip, dims, pairs, interleaved=False):
    from redknot_kernels.triton import pages as triton_pages

    kernel, power = triton_pages._place_kernel, lambda n: 1 << (n - 1).bit_length()
    arguments = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= dict.fromkeys(("k_pages", "v_pages", "keys", "values"), "*bf16")
    arguments |= dict.fromkeys(("cos", "sin"), "*fp32") | dict.fromkeys(("table", "bounds", "kept"), "*i32")
    arguments |= {"DIM": dims[0], "VALUE_DIM": dims[1], "PAGE": 64, "PAIRS": pairs, "INTERLEAVED": interleaved}
    arguments |= {
        "BLOCK_T": triton_pages._PLACED,
        "BLOCK_H": 8,
        "BLOCK_P": power(max(pairs, 1)),
        "BLOCK_V": power(dims[1]),
    }
    arguments |= {"BLOCK_R": power(max(dims[0] - 2 * pairs, 1)), "EARLY": chip in ("sm90", "sm100")}
    return launch(chip, kernel, arguments, num_warps=4)


# Launches differ in much, which few cases try, each as much as goes together: types, tiles of 128 and 256 channels,
# pages that hold whole tiles and shorter ones, dims that fill a block and others, and every flag.
CASES = {
    "decode": partial(decode, dtype="bf16", dims=(128, 128), group=4, page=64),
    "decode_many": partial(
        decode, dtype="fp16", dims=(96, 80), group=5, page=16, tokens=None, flags=True, softcap=True
    ),
    "decode_many_fp32": partial(decode, dtype="fp32", dims=(128, 128), group=4, page=128, tokens=None),
    "decode_many_256": partial(decode, dtype="bf16", dims=(256, 256), group=16, page=128, tokens=None),
    "decode_many_256_fp32": partial(decode, dtype="fp32", dims=(256, 256), group=2, page=128, tokens=None),
    "decode_small_written": partial(decode, dtype="bf16", dims=(8, 16), group=1, page=16, fused=False),
    "decode_cold": partial(decode, dtype="bf16", dims=(128, 128), group=4, page=64, storage=(8, 4)),
    "decode_cold_masked": partial(decode, dtype="fp16", dims=(96, 80), group=5, page=16, softcap=True, storage=(8, 4)),
    "merge_and_cool": partial(merge_and_cool, dims=(128, 128), page=64, storage=(4,), splits=64),
    "cool_new": partial(cool, dims=(80, 96), page=16, new=True),
    "merge_few": partial(merge, splits=8, sink=True),
    "merge_many": partial(merge, splits=256),
    "append": partial(append, dims=(80, 128), page=16),
    "place": partial(place, dims=(128, 128), pairs=64),
    "place_partial": partial(place, dims=(80, 96), pairs=10, interleaved=True),
    "place_copied": partial(place, dims=(256, 256), pairs=0),
    "attend_at": partial(attend_at, dtype="bf16", dims=(128, 128), group=4),
    "attend_at_logits": partial(attend_at, dtype="fp16", dims=(96, 80), group=5, softcap=True, sink=True),
    "attend_at_256": partial(attend_at, dtype="bf16", dims=(256, 256), group=8),
    "attend_at_fp32": partial(attend_at, dtype="fp32", dims=(256, 256), group=2),
    "in_chunks": partial(in_chunks, dtype="bf16", dims=(64, 64), group=3, page=8, softcap=True, sink=True),
    "prefill": partial(prefill, past=False, dtype="fp16", dims=(64, 64), group=8),
    "prefill_band_logits": partial(
        prefill, past=True, dtype="bf16", dims=(128, 128), group=4, split=True, softcap=True, sink=True
    ),
    "prefill_band_fp32": partial(prefill, past=True, dtype="fp32", dims=(128, 128), group=1),
    "prefill_pages": partial(prefill, past=True, dtype="bf16", dims=(128, 128), group=4, page=64),
    "prefill_pages_small": partial(prefill, past=True, dtype="bf16", dims=(96, 80), group=5, page=16, split=True),
    "prefill_pages_256": partial(prefill, past=True, dtype="bf16", dims=(256, 256), group=16, page=128, softcap=True),
    "prefill_pages_fp32": partial(prefill, past=True, dtype="fp32", dims=(256, 256), group=2, page=16, sink=True),
}

# Products of fewer than 64 rows, or of 32 bits, do not reach the matrix units that came with Hopper and Blackwell, and
# some kernels multiply nothing. There Hopper's intermediate code is Ampere's line by line; Blackwell's passes order it
# in another way, which one case of each kind tries: decode, decode_cold_masked, attend_at_fp32, append, place_partial.
_PLAIN = {
    *("decode_small_written", "decode_many_fp32", "decode_many_256_fp32"),
    *("cool_new", "merge_many", "place", "place_copied", "prefill_band_fp32", "prefill_pages_fp32"),
}
AS_ON_AMPERE = {"sm90": _PLAIN | {"attend_at_fp32"}, "sm100": _PLAIN}
# Cold pages take long to compile: where a chip has tiles for them those of 128 channels, elsewhere what is masked.
LEFT_OUT = {chip: {"decode_cold"} for chip in CHIPS} | {"sm90": {"decode_cold_masked"}}


def cases(chip):
    """The names of what is compiled for a chip."""
    return [name for name in CASES if name not in AS_ON_AMPERE.get(chip, ()) and name not in LEFT_OUT[chip]]


def test_compiles_and_fits(subtests):
    pytest.importorskip("triton")
    environment = dict(os.environ, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    of_chips = json.loads(done.stdout.splitlines()[-1])
    assert set(of_chips) == set(CHIPS)
    for chip, found in of_chips.items():
        with subtests.test(chip):
            assert set(found) == set(cases(chip))
            assert not {case: what for case, what in found.items() if isinstance(what, str) or what > CHIPS[chip][3]}


@pytest.mark.parametrize("chip", AS_ON_AMPERE)
def test_what_is_compiled_for_ampere_alone_is_launched_alike(chip):
    pytest.importorskip("triton")
    for name in AS_ON_AMPERE[chip]:
        for_chip, for_ampere = (CASES[name](each)[1:] for each in (chip, "sm80"))
        for _, arguments, _ in (for_chip, for_ampere):
            arguments.pop("EARLY", None)
        assert for_chip == for_ampere, name


def main():
    """Compiles the cases of every architecture, and prints the shared memory of each in bytes, or the error."""
    of_chips = {chip: {} for chip in CHIPS}
    for chip, found in of_chips.items():
        for name in cases(chip):
            try:
                found[name] = compile_kernel(*CASES[name](chip)).metadata.shared
            except Exception as error:  # of the compiler: every case has its say
                found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(of_chips))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "torch-ext"))
    main()

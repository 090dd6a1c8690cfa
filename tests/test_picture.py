"""How a plan prints."""

import re
from types import SimpleNamespace

import pytest

from redknot_hf.plan.picture import picture, shape
from redknot_hf.plan.plan import HeadPlan
from redknot_hf.plan.spec import HeadSpec

LOCAL = HeadSpec(window=256, sink=4)


def config(layers=3, kv_heads=2, **more):
    return SimpleNamespace(num_hidden_layers=layers, num_key_value_heads=kv_heads, **more)


STORED = HeadPlan(((HeadSpec(), LOCAL, HeadSpec(None, 0, "int8")), (HeadSpec(storage="int4"), LOCAL, HeadSpec())))


def test_print():
    plan = HeadPlan.with_global(config(2, 8), [(0, 0), (0, 3), (1, 7)], local=HeadSpec(128))
    assert str(plan).splitlines() == [
        "HeadPlan: 2 layers x 8 KV heads, 3 global, 13 local (window 128, sink 0)",
        "   layer 0",
        "  head 0 █·",
        *(f"       {head} {'█' if head == 3 else '·'}{'█' if head == 7 else '·'}" for head in range(1, 8)),
        "  █ global   window:  · 128",
        "KV kept: 8K 20 % (5.0x less), 32K 19 % (5.2x less), 128K 19 % (5.3x less)",
    ]


def test_print_storages():
    lines = str(STORED).splitlines()
    assert lines[0] == "HeadPlan: 2 layers x 3 KV heads, 4 global (1 in int8, 1 in int4), 2 local (window 256, sink 4)"
    assert lines[2:5] == ["  head 0 █▒", "       1 ··", "       2 ▓█"]
    assert lines[5] == "  █ global  ▓ int8  ▒ int4   window:  · 256"
    assert lines[6].startswith("KV kept (if head_dim is 128, in bfloat16): 8K 48 % (2.1x less)")


def test_print_windows_by_size():
    windows = [16, 32, 64, None, 128, 128, 256, 512, 1024, 2048]
    lines = str(HeadPlan([[HeadSpec(window)] for window in windows])).splitlines()
    assert lines[0].endswith("9 local (window 128, sink 0; window 16, sink 0; window 32, sink 0; 5 more kinds)")
    assert lines[1:3] == ["   layer 0    5", "  head 0 ··▁█▂▂▃▄▅▆"]
    assert lines[3] == "  █ global   window:  · 16 to 32  ▁ 64  ▂ 128  ▃ 256  ▄ 512  ▅ 1024  ▆ 2048"


@pytest.mark.parametrize(
    ("layers", "kv_heads", "bands"), [(20, 8, [0]), (80, 64, [0]), (126, 8, [0, 63]), (205, 1, [0, 69, 138])]
)
def test_print_has_layers_to_the_right_as_figures_have(layers, kv_heads, bands):
    plan = HeadPlan.with_global(config(layers, kv_heads), [(layers - 2, 0)], LOCAL)
    lines = str(plan).splitlines()
    assert len(lines) == len(bands) * (kv_heads + 1) + 3
    assert max(map(len, lines)) <= 110
    for first, ruler, row in zip(bands, lines[1 :: kv_heads + 1], lines[2 :: kv_heads + 1], strict=False):
        named = {int(found[0]): found.start() - row.index("0") - 2 for found in re.finditer(r"\d+", ruler)}
        assert named == {
            i: i - first for i in range(first, min(first + layers // len(bands) + 1, layers)) if i % 5 == 0
        }
    at = layers - 2 - bands[-1]
    assert lines[1 + (len(bands) - 1) * (kv_heads + 1) + 1].split()[2].index("█") == at


def test_layers_of_fewer_heads_leave_room():
    lines = str(HeadPlan([[LOCAL], [HeadSpec(), LOCAL], [LOCAL]])).splitlines()
    assert lines[2:4] == ["  head 0 ·█·", "       1  ·"]


def test_print_all_global():
    lines = str(HeadPlan.uniform(config(), HeadSpec())).splitlines()
    assert lines[0] == "HeadPlan: 3 layers x 2 KV heads, 6 global, 0 local"
    assert lines[-2] == "  █ global"
    assert lines[-1].startswith("KV kept: 8K 100 % (1.0x less)")


def test_the_picture_is_what_prints_and_its_first_line_has_the_shape():
    plan = HeadPlan([[HeadSpec(), LOCAL], [LOCAL]])
    assert picture(plan) == str(plan)
    assert shape((2, 1)) == "2 layers x [2, 1] KV heads"
    assert picture(plan).startswith(f"HeadPlan: {shape((2, 1))}, 1 global, 2 local")

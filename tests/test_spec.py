"""What one head keeps."""

import pytest

from redknot_hf.plan.spec import HeadSpec


@pytest.mark.parametrize(
    ("window", "sink", "message"),
    [
        (0, 0, "window is 0"),
        (-3, 0, "window is -3"),
        (True, 0, "window is True"),
        (8, -1, "sink is -1"),
        (8, False, "sink is False"),
        (None, 4, "a global head keeps all, give it sink=0"),
        (8, 0, "storage is 'int8' and window is 8: a local head overwrites its pages"),
        (None, 0, "storage is 'int2': choose one of"),
    ],
)
def test_spec_refuses(window, sink, message):
    storage = next((name for name in ("int8", "int2") if name in message), "model")
    with pytest.raises(ValueError, match=message):
        HeadSpec(window, sink, storage)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 12, 13, 14, 15, 1000])
@pytest.mark.parametrize("spec", [HeadSpec(9, 4), HeadSpec(1, 0), HeadSpec(1, 13)], ids=str)
def test_kept_counts_the_keys_a_later_query_can_see(spec, length):
    last = length - 1
    visible = [k for k in range(length) if k > last - spec.window or k < spec.sink]
    assert spec.kept(length) == len(visible)
    assert HeadSpec().kept(length) == length


def test_kept_refuses_a_negative_length():
    with pytest.raises(ValueError, match="length is -1"):
        HeadSpec(window=256, sink=4).kept(-1)

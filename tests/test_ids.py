"""Token ids come as lists, tensors and arrays of any integer kind; what is no id is told."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from redknot_hf.reuse.ids import as_ids, one_for_each

NUMBERS = [3, 5, 8]
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
KINDS = {
    "list": NUMBERS,
    "tuple": tuple(NUMBERS),
    "a list of one list": [NUMBERS],
    "numpy numbers": [np.int32(n) for n in NUMBERS],
    "tensors of one": list(torch.tensor(NUMBERS)),
    **{str(dtype): torch.tensor(NUMBERS, dtype=dtype) for dtype in DTYPES},
    "a row": torch.tensor([NUMBERS]),
    "a view": torch.tensor([[3, 0], [5, 0], [8, 0]])[:, 0],
    **{f"numpy {name}": np.array(NUMBERS, name) for name in ("uint8", "int16", "int64", "uint64")},
    "a numpy row": np.array([NUMBERS]),
}
TEXTS = r"give whole numbers"
REFUSED = {
    "floats": ([1.5, 2.5], TEXTS),
    "whole floats": ([1.0, 2.0], TEXTS),
    "a float among them": ([1, 2.0], TEXTS),
    "bools": ([True, False], TEXTS),
    "a bool among them": ([3, True], TEXTS),
    "float tensor": (torch.randn(4) * 9 + 40, TEXTS),
    "half tensor": (torch.ones(2, dtype=torch.float16), TEXTS),
    "bool tensor": (torch.ones(2, dtype=torch.bool), TEXTS),
    "complex tensor": (torch.ones(2, dtype=torch.complex64), TEXTS),
    "float array": (np.ones(3), TEXTS),
    "bool array": (np.ones(3, bool), TEXTS),
    "bool tensors of one": (list(torch.ones(2, dtype=torch.bool)), TEXTS),
    "words": (["the", "sky"], "of several rows"),
    "none": ([None], TEXTS),
    "text": ("the sky", r"'the sky' is text: give its token ids, tokenizer\(text\)\['input_ids'\]"),
    "tokenizer": (BatchEncoding({"input_ids": [1, 2]}), r"give its token ids, \['input_ids'\]"),
    "a number": (7, "7 is no text: give a list, tensor or array"),
    "no dimension": (torch.tensor(7), "give a list, tensor or array"),
    "two rows": (torch.ones(2, 3, dtype=torch.long), r"of shape \(2, 3\): give the ids of one text"),
    "two lists": ([[1], [2]], "of several rows: give the ids of one text"),
}


@pytest.mark.parametrize("ids", KINDS.values(), ids=KINDS)
def test_ids_of_any_kind(ids):
    found = as_ids(ids)
    assert found == (3, 5, 8)
    assert {type(n) for n in found} == {int}
    assert one_for_each(ids, ["one"], "suffixes") == [(3, 5, 8)]
    assert one_for_each([ids, ids], ["one", "two"], "suffixes") == [(3, 5, 8)] * 2


@pytest.mark.parametrize(("ids", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_text_of_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        as_ids(ids)


def test_a_matrix_is_a_text_a_row():
    rows = torch.tensor([[3, 5], [8, 9]], dtype=torch.int32)
    for each in (rows, rows.numpy(), rows.tolist()):
        assert one_for_each(each, ["one", "two"], "suffixes") == [(3, 5), (8, 9)]
    with pytest.raises(ValueError, match="2 suffixes for 1 sequences: give one for each"):
        one_for_each(rows, ["one"], "suffixes")
    with pytest.raises(ValueError, match="'what is it' is text"):
        one_for_each("what is it", ["one"], "suffixes")

"""What a model asks of attention, as kernels take it."""

import torch

from redknot_hf.attention.options import attention_options

QUERY = torch.zeros(1, 2, 3, 16)


def test_what_is_not_said_is_the_default():
    assert attention_options(QUERY, None, {"dropout": 0.0}) == {"scale": 0.25, "softcap": None, "s_aux": None}


def test_what_is_said_is_taken():
    sinks = torch.ones(2)
    assert attention_options(QUERY, 0.5, {"softcap": 30.0, "s_aux": sinks}) == {
        "scale": 0.5, "softcap": 30.0, "s_aux": sinks,
    }  # fmt: skip

"""Fidelity against plain definitions, and the audit of answers."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from evals.fidelity import allowed_gap, audit_gap, fidelity


def test_measures_are_their_definitions():
    rng = np.random.default_rng(0)
    dense, method = rng.normal(0, 3, (2, 7, 40)).astype(np.float32)
    dense[2] = method[2]
    answer = dense.argmax(1).tolist()
    found = fidelity(torch.from_numpy(dense), torch.from_numpy(method), answer)
    same = dense.argmax(1) == method.argmax(1)
    tops = [set(np.argsort(-a)[:10]) & set(np.argsort(-b)[:10]) for a, b in zip(dense, method, strict=True)]
    assert found.tokens == 7
    assert found.top1 == same.sum()
    assert found.top10 == pytest.approx(np.mean([len(top) / 10 for top in tops]))
    assert found.kl == pytest.approx(rel_entr(softmax(dense, 1), softmax(method, 1)).sum(1), abs=1e-5)
    assert found.kl[2] == 0
    for value, logits in ((found.dense_nll, dense), (found.nll, method)):
        assert value == pytest.approx(-log_softmax(logits, 1)[range(7), answer].sum(), rel=1e-5)
    assert found.first_divergence == np.flatnonzero(~same)[0]
    assert fidelity(torch.from_numpy(dense), torch.from_numpy(dense), answer).first_divergence is None


def test_audit_takes_rounding_and_no_wrong_answer():
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 50)
    answer = logits.argmax(1).tolist()
    assert audit_gap(logits, answer) == 0
    for dtype in (torch.float32, torch.bfloat16):
        rounded = logits + logits.abs().max() * torch.finfo(dtype).eps * torch.randn(6, 50)
        assert audit_gap(rounded, answer) <= allowed_gap(dtype)
    for place in range(6):
        wrong = [*answer]
        wrong[place] = (wrong[place] + 1) % 50
        assert audit_gap(logits, wrong) > allowed_gap(torch.bfloat16)

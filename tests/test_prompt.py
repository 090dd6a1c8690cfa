import pytest
import torch

from redknot_hf.profiling import Prompt
from redknot_hf.profiling.prompt import as_prompts, evenly, fingerprint, held_apart


def test_every_token_but_the_first_is_predicted_unless_told():
    ids = torch.arange(5)
    assert Prompt(ids).targets.tolist() == [1, 2, 3, 4]
    assert Prompt(ids, torch.tensor([True, False, True, False, True])).targets.tolist() == [2, 4]


def test_targets_are_taken_at_equal_distances():
    targets = torch.arange(1, 11)
    assert evenly(targets, 20).tolist() == targets.tolist()
    assert evenly(targets, 5).tolist() == [2, 4, 6, 8, 10]
    assert evenly(targets, 1).tolist() == [10]


def test_what_a_caller_has_becomes_prompts():
    given = [Prompt(torch.arange(9)), list(range(9)), torch.arange(9)[None]]
    assert [prompt.ids.tolist() for prompt in as_prompts(given, (4, 2), 3)] == [list(range(9))] * 3
    assert [len(prompt) for prompt in as_prompts(torch.zeros(2, 8, dtype=torch.long), (4,), 3)] == [8, 8]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no prompts"),
        ([[1] * 7], "a prompt has 7 tokens, and a window of 4 with a sink of 3"),
        ([torch.zeros(2, 9, dtype=torch.long)], "one row of token ids"),
        ([torch.zeros(9)], "torch.float32"),
    ],
    ids=["none", "short", "rows", "floats"],
)
def test_what_is_no_prompt_is_told(inputs, message):
    with pytest.raises(ValueError, match=message):
        as_prompts(inputs, (4,), 3)


def test_a_fingerprint_is_of_tokens_and_of_what_is_scored():
    ids = torch.arange(9)
    one = fingerprint([Prompt(ids)])
    assert one == fingerprint([Prompt(ids, kind="other")])
    assert one.startswith("sha256:")
    scored = ids > 4
    assert len({one, fingerprint([Prompt(ids + 1)]), fingerprint([Prompt(ids, scored)]), fingerprint([])}) == 4


def test_a_prompt_scores_something():
    with pytest.raises(ValueError, match="set one behind the first"):
        Prompt(torch.arange(4), torch.tensor([True, False, False, False]))


@pytest.mark.parametrize(
    ("kinds", "held"),
    [("abcabcab", "abc"), ("aaaa", "a"), ("aaaaaaaa", "aa"), ("abcd", ""), ("aab", ""), ("aabbbbbb", "ab")],
)
def test_every_kind_is_held_out_once_at_least(kinds, held):
    prompts = [Prompt(torch.arange(9), kind=kind) for kind in kinds]
    measured, confirming = held_apart(prompts)
    assert sorted(prompt.kind for prompt in confirming) == sorted(held)
    assert [prompt for prompt in prompts if prompt not in confirming] == measured
    assert {prompt.kind for prompt in measured} == set(kinds)

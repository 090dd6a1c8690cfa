"""What `generate` does with a RedKnotCache, against what it does without one.

An all-global plan is held against DynamicCache; a plan with local heads against the model without any cache, every
head under its explicit mask. Tokens must be the same, and logits within rounding.
"""

import copy

import pytest
import torch
from families import make_model
from oracle import masked_logits, random_plan, under_plan
from texts import prompts
from transformers import DynamicCache

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

pytestmark = pytest.mark.pairs
OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
llama_only = pytest.mark.parametrize("model", ["llama"], indirect=True)
two_families = pytest.mark.parametrize("model", ["llama", "gemma3"], indirect=True)


@pytest.fixture(params=["llama", "gemma3", "mistral_sliding", "gpt_oss"])
def model(request):
    return make_model(request.param)


@pytest.fixture(params=["global", "local"])
def plan(request, model):
    return HeadPlan.uniform(model.config, HeadSpec()) if request.param == "global" else random_plan(model.config)


def all_global(plan):
    return all(spec.is_global for layer in plan for spec in layer)


def new_cache(model, plan, **options):
    return RedKnotCache(model.config, plan, **{"page_size": 16} | options)


def generate(model, cache, ids, **options):
    if ids is not None:
        options = {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, past_key_values=cache, **OPTIONS | options)


def generate_dense(model, plan, ids, **options):
    options = OPTIONS | {"attention_mask": torch.ones_like(ids)} | options
    if not all_global(plan):
        with under_plan(model, plan):
            return model.generate(ids, use_cache=False, **options)
    model.set_attn_implementation("eager")
    try:
        return model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    finally:
        model.set_attn_implementation("redknot")


def assert_same(ours, dense):
    assert torch.equal(ours.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(dense.logits), atol=2e-4, rtol=1e-4)


def repetitive(length):
    """A prompt that speaks for itself a while ahead: the draft of a prompt lookup."""
    ids, _ = prompts(1, 9)
    return ids.repeat(1, -(-length // 9))[:, :length]


@pytest.fixture
def passes(model):
    """Tokens of every forward pass of the model with a RedKnotCache."""
    seen = []

    def note(module, args, kwargs):
        if any(isinstance(value, RedKnotCache) for value in kwargs.values()):
            seen.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.core
@pytest.mark.parametrize("padding", [(0, 0), (33, 5), (37, 0)], ids=str)
def test_greedy_with_padded_rows(model, plan, padding):
    ids, mask = prompts(2, 38, padding)
    options = {"attention_mask": mask, "max_new_tokens": 30}
    assert_same(generate(model, new_cache(model, plan), ids, **options), generate_dense(model, plan, ids, **options))


@llama_only
def test_greedy_in_a_cache_of_fixed_size(model, plan):
    ids, mask = prompts(2, 38, (0, 9))
    cache = new_cache(model, plan, max_cache_len=38 + 12)
    assert_same(
        generate(model, cache, ids, attention_mask=mask), generate_dense(model, plan, ids, attention_mask=mask)
    )


@two_families
def test_seeded_sampling(model, plan):
    ids, mask = prompts(2, 38, (0, 9))
    options = {"attention_mask": mask, "do_sample": True, "num_return_sequences": 2, "top_k": 20, "temperature": 1.3}
    torch.manual_seed(0)
    ours = generate(model, new_cache(model, plan), ids, **options)
    torch.manual_seed(0)
    assert_same(ours, generate_dense(model, plan, ids, **options))
    assert len(ours.sequences.unique(dim=0)) == 4


@pytest.mark.core
@pytest.mark.parametrize("padding", [(0, 0), (0, 25)], ids=str)
def test_beams(model, plan, padding):
    ids, mask = prompts(2, 38, padding)
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    options["eos_token_id"] = list(range(3, 9))  # some hypotheses end early
    ours, dense = (
        generate(model, new_cache(model, plan), ids, **options),
        generate_dense(model, plan, ids, **options),
    )
    assert_same(ours, dense)
    assert torch.equal(ours.beam_indices, dense.beam_indices)
    torch.testing.assert_close(ours.sequences_scores, dense.sequences_scores, atol=2e-4, rtol=0)


@two_families
def test_rows_that_end_early(model, plan):
    ids, mask = prompts(3, 30, (0, 9, 29))
    free = generate_dense(model, plan, ids, attention_mask=mask).sequences[:, 30:]
    options = {"attention_mask": mask, "eos_token_id": [int(free[0, 4]), int(free[2, 9])]}
    ours = generate(model, new_cache(model, plan), ids, **options)
    assert (ours.sequences[0, 35:] == 0).all()
    assert_same(ours, generate_dense(model, plan, ids, **options))


@pytest.mark.core
@pytest.mark.parametrize("draft", [4, 20])
def test_prompt_lookup(model, plan, passes, draft):
    ids = repetitive(50)
    ours = generate(model, new_cache(model, plan), ids, prompt_lookup_num_tokens=draft, max_new_tokens=40)
    assert max(passes[1:]) == draft + 1  # whole drafts were written
    assert_same(ours, generate_dense(model, plan, ids, max_new_tokens=40))


@two_families
@pytest.mark.parametrize("assistant", ["itself", "smaller"])
def test_assistant(model, plan, passes, assistant):
    ids = repetitive(50)
    helper = copy.deepcopy(model) if assistant == "itself" else make_model("llama", num_hidden_layers=1, seed=3)
    helper.generation_config.num_assistant_tokens = 7
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.assistant_confidence_threshold = 0.0
    ours = generate(model, new_cache(model, plan), ids, assistant_model=helper, max_new_tokens=20)
    assert_same(ours, generate_dense(model, plan, ids, max_new_tokens=20))
    assert max(passes[1:]) == 8
    if assistant == "itself" and all_global(plan):
        assert passes == [57, 8, 4]  # every draft is accepted


@pytest.mark.core
@pytest.mark.parametrize("size", [1, 16, 31])
def test_chunked_prefill(model, plan, passes, size):
    ids, mask = prompts(2, 67, (0, 40))
    options = {"attention_mask": mask}
    ours = generate(model, new_cache(model, plan), ids, prefill_chunk_size=size, **options)
    assert passes[: -(-67 // size)] == [min(size, 67 - start) for start in range(0, 67, size)]
    assert_same(ours, generate_dense(model, plan, ids, **options))


@pytest.mark.core
@pytest.mark.parametrize(("given", "more"), [("all", 5), ("new", 1), ("new", 41)])
def test_second_turn_on_one_cache(model, plan, given, more):
    ids, mask = prompts(2, 38, (0, 9))
    cache = new_cache(model, plan)
    first = generate(model, cache, ids, attention_mask=mask).sequences
    question = prompts(2, more)[0]
    ids = torch.cat([first, question], 1)
    mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
    dense = generate_dense(model, plan, ids, attention_mask=mask)
    start = 0 if given == "all" else cache.get_seq_length()
    ours = generate(model, cache, ids[:, start:], attention_mask=mask)
    ours.sequences = torch.cat([ids[:, :start], ours.sequences], 1)
    assert_same(ours, dense)


@two_families
def test_turns_of_all_kinds_on_one_cache(model, plan):
    cache = new_cache(model, plan)
    ids = repetitive(70)
    for turn in ({"prompt_lookup_num_tokens": 20}, {}, {"prefill_chunk_size": 7}):
        dense = generate_dense(model, plan, ids, max_new_tokens=30)
        assert_same(generate(model, cache, ids, max_new_tokens=30, **turn), dense)
        ids = torch.cat([dense.sequences, repetitive(19)], 1)


@two_families
def test_tokens_taken_back_from_a_cache_that_records(model, plan):
    ids, mask = prompts(2, 70, (0, 9))
    cache = new_cache(model, plan)
    options = {"attention_mask": mask, "max_new_tokens": 10}
    ids = generate(model, cache, ids, **options).sequences
    cache.activate_past_recording()
    mask = torch.nn.functional.pad(mask, (0, 10), value=1)
    ids = generate(model, cache, ids, attention_mask=mask, max_new_tokens=40).sequences
    cache.crop(-45)
    assert cache.get_seq_length() == 70 + 10 + 40 - 1 - 45
    ids, mask = torch.cat([ids[:, :80], prompts(2, 7)[0]], 1), torch.nn.functional.pad(mask, (0, 7), value=1)
    options = {"attention_mask": mask, "max_new_tokens": 10}
    assert_same(generate(model, cache, ids, **options), generate_dense(model, plan, ids, **options))


@two_families
def test_second_turn_with_padding_inside(model, plan):
    first, mask = prompts(2, 38, (0, 9))
    second, more = prompts(2, 25, (11, 0))
    ids, mask = torch.cat([first, second], 1), torch.cat([mask, more], 1)
    cache = new_cache(model, plan)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, stop in [(0, 38), (38, 63)]:
            part = ids[:, start:stop], mask[:, :stop], positions[:, start:stop]
            logits = model(
                part[0], attention_mask=part[1], position_ids=part[2], **cache_argument(model, cache)
            ).logits
    expected = masked_logits(model, plan, ids, mask)[:, 38:]
    real = more.bool()
    torch.testing.assert_close(logits[real], expected[real], atol=2e-4, rtol=1e-4)


@two_families
def test_forks_go_different_ways(model, plan):
    ids, _ = prompts(2, 38)
    cache = new_cache(model, plan)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    questions = [prompts(2, 21)[0], prompts(2, 3)[0].flip(1)]
    for fork, question in zip([copy.deepcopy(cache), cache], questions, strict=True):
        ours = generate(model, fork, torch.cat([ids, question], 1))
        assert_same(ours, generate_dense(model, plan, torch.cat([ids, question], 1)))


@two_families
def test_a_fork_while_its_source_goes_on(model, plan):
    ids, _ = prompts(1, 38)
    cache = new_cache(model, plan)
    first = generate(model, cache, ids, max_new_tokens=5).sequences
    fork = copy.deepcopy(cache)
    dense = generate_dense(model, plan, first, max_new_tokens=40)
    for each in (cache, fork):  # the first one grows past the pages that both hold
        assert_same(generate(model, each, first, max_new_tokens=40), dense)


@two_families
def test_many_answers_to_one_filled_cache(model, plan):
    ids, _ = prompts(2, 38)
    cache = new_cache(model, plan)
    with torch.no_grad():
        model(ids[:, :30], **cache_argument(model, cache))
    cache.batch_repeat_interleave(3)
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    ours = generate(model, cache, ids, **options)
    torch.manual_seed(0)
    assert_same(ours, generate_dense(model, plan, ids, **options))


@llama_only
def test_input_embeddings(model, plan):
    ids, mask = prompts(2, 38, (0, 9))
    dense = generate_dense(model, plan, ids, attention_mask=mask)
    embedded = model.get_input_embeddings()(ids).detach()
    ours = generate(model, new_cache(model, plan), None, inputs_embeds=embedded, attention_mask=mask)
    ours.sequences = torch.cat([ids, ours.sequences], 1)
    assert_same(ours, dense)


@llama_only
def test_reset_cache_is_new(model, plan):
    cache = new_cache(model, plan)
    generate(model, cache, prompts(3, 70)[0])
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    ids, mask = prompts(2, 38, (0, 9))
    assert_same(
        generate(model, cache, ids, attention_mask=mask), generate_dense(model, plan, ids, attention_mask=mask)
    )

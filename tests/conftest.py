"""What every test runs under."""

import importlib.util
import math
import os

import pytest
from pairs import beyond_pairs


def pytest_addoption(parser):
    parser.addoption("--pairs", action="store_true", help="all tests as if they had the mark `pairs`")


@pytest.hookimpl(trylast=True)  # of what other options leave
def pytest_collection_modifyitems(config, items):
    beyond = beyond_pairs(item for item in items if config.option.pairs or item.get_closest_marker("pairs"))
    if beyond:
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in beyond]


def pytest_configure(config):
    """Prepares a process that runs tests; one that only hands them to others is waited for, and needs no torch."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        prepare()


def prepare():
    import quick_shapes
    import torch
    from quick_interpreter import quicken

    quick_shapes.quicken()
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before modules are imported
        if importlib.util.find_spec("triton"):
            quicken()

    # Tests are many and small: one thread each is faster than two that wait for each other.
    torch.set_num_threads(1)

    # `with device:` knows `torch.empty` by what it is when first used, and must not take the poisoned one for it.
    with torch.device("cpu"):
        torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that is allocated without being written holds NaN, so that reading it shows."""
    import torch

    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def _poisoned(make):
    def poison(*args, **kwargs):
        tensor = make(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

    return poison


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of any text, which puts a token before each: byte-level BPE of 600 words, learned from prose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from evals.tasks.prose import TEMPLATES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEMPLATES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")

"""Texts become tokens apart, and together are those of the joined prompt."""

import copy
from itertools import pairwise

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from evals.tasks.prose import TEMPLATES
from redknot_hf.text.chat import ChatTemplate
from redknot_hf.text.seams import Seams

DOCUMENTS = ["The house is green.", "Ann (born 1990) lives there!", 'He said: "No"', "élan 東京", "Numbers: 12"]
QUESTION = "Who lives there?"
# What Llama 3 and Qwen cut words by: a full stop takes the line breaks behind it along.
TAKES_BREAKS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TURNS = (
    "<s>{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }} [end]{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)


def learned(model, before, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.train_from_iterator([f"{a}\n\n{b}.\n\n" for a, b in pairwise(TEMPLATES)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def byte_level(*before):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    return learned(models.BPE(), pre_tokenizers.Sequence(list(before)), trainer)


@pytest.fixture(scope="module", params=["gpt2", "llama3", "sentencepiece"])
def tokenizer(request):
    """Three ways to cut line breaks: one by one before a word, with a full stop, and as any other sign."""
    if request.param == "gpt2":
        return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if request.param == "llama3":
        split = pre_tokenizers.Split(Regex(TAKES_BREAKS), "isolated")
        return byte_level(split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    signs = sorted(set("".join([*DOCUMENTS, QUESTION, "\nx"])))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=signs, show_progress=False)
    return learned(models.BPE(), pre_tokenizers.Metaspace(prepend_scheme="first"), trainer)


@pytest.mark.parametrize("chat", [False, True])
def test_apart_they_are_the_tokens_of_the_whole(tokenizer, chat):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TURNS
    seams = Seams(tokenizer, chat=chat)
    first = [*seams.head, *seams.document(DOCUMENTS[0])]
    rest = [i for text in DOCUMENTS[1:] for i in seams.document(text)] + [*seams.question(QUESTION)]
    message = "".join(f"{text}\n\n" for text in DOCUMENTS) + QUESTION
    text = message
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": message}], tokenize=False)
        text += "[assistant]"
    whole = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    assert whole[-len(rest) :] == rest
    # Where a tokenizer marks the beginning of a text, the first one is read as if others stood before it.
    marked = tokenizer.convert_ids_to_tokens(whole)[1] == "▁The"
    assert marked or whole[: -len(rest)] == first
    assert not marked or tokenizer.decode(whole[: -len(rest)]).replace("▁", "", 1) == tokenizer.decode(first)
    assert (first + rest).count(tokenizer.bos_token_id) == 1


def test_texts_that_a_token_would_lie_across_are_read_alone(byte_tokenizer):
    seams = Seams(byte_tokenizer)
    for text in ("\n\n  indented", "ends in a space "):
        assert byte_tokenizer.decode(list(seams.document(text))) == text + "\n\n"


def test_without_a_separator_texts_are_the_tokenizers_own(byte_tokenizer):
    seams = Seams(byte_tokenizer, separator="")
    assert list(seams.document("a house")) == byte_tokenizer("a house", add_special_tokens=False)["input_ids"]
    assert seams.head == (byte_tokenizer.bos_token_id,)


def test_what_ends_a_text_begins_none(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    special = [("<s>", 0), ("the", 5)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A the", special_tokens=special
    )
    tokenizer.eos_token_id = 5
    assert tokenizer("")["input_ids"] == [0, 5]
    assert Seams(tokenizer).head == (0,)


def test_the_system_speaks_in_the_opening(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TURNS
    assert ChatTemplate.of(tokenizer, "Be brief.").opening == "<s>[system]\nBe brief. [end][user]\n"
    assert tokenizer.decode(Seams(tokenizer, system="Be brief.").head) == "<s>[system]\nBe brief. [end][user]\n"


def test_what_is_off_is_told(byte_tokenizer):
    seams = Seams(byte_tokenizer)
    for make in (seams.document, seams.question):
        with pytest.raises(ValueError, match="give a text with a word in it"):
            make("")
    with pytest.raises(ValueError, match="needs a chat template"):
        Seams(byte_tokenizer, system="Be brief.")
    with pytest.raises(ValueError, match="has no chat template"):
        Seams(byte_tokenizer, chat=True)
    with pytest.raises(TypeError, match="'gpt2' is no tokenizer"):
        Seams.of("gpt2")
    assert Seams.of(seams) is seams


def test_a_vocabulary_of_words_lends_one_of_its_own():
    vocabulary = {word: i for i, word in enumerate(["<s>", "house", "green", "the", "is", ".", "who", "?"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    seams = Seams(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert seams.document("the house is green .") == (3, 1, 4, 2, 5)
    assert seams.question("who ?") == (6, 7)

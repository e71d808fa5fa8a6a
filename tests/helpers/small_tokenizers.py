"""Tokenizers of 380 tokens, trained on the questions of two small tasks."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.zero_shot_tasks import TEXT

BOOLQ = [
    {"passage": f"The {thing} is {colour}.", "question": f"is the {thing} {colour}", "label": i % 2, "idx": i}
    for i, (thing, colour) in enumerate([("sky", "blue"), ("old house", "red"), ("word", "many"), ("one", "grey")])
]
HELLASWAG = [
    {"activity_label": "Words", "ctx_a": "A man says words.", "ctx_b": "", "label": str(i), "ind": i,
     "endings": [f"He says word{i}x{j} and goes on {'for long ' * j}." for j in range(4)]}
    for i in range(3)
]  # fmt: skip
WORDS = " no yes Answer: Question: is the The sky house blue red word many He says A man"


def byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


def prefix_space() -> Tokenizer:
    """As sentencepiece has it: a blank before every text, written as ▁."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return inner


def make(kind, template: str, **options) -> PreTrainedTokenizerFast:
    inner = kind()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<s>", "</s>", "<cls>", "<unk>"])
    inner.train_from_iterator([WORDS * 20, json.dumps([BOOLQ, HELLASWAG]), TEXT], trainer)
    ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>", "<cls>") if token in template]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)

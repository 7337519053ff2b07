"""Tokenizers made from nothing, for models that are trained from nothing: files that `load_tokenizer` and transformers read.

    byte_level   BPE over bytes: nothing is unknown
    word_level   one id per word, digit or punctuation mark
Both are laid out as Llama's, which puts <s> first, or as T5's, which puts </s> last (`Layout`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# a template's mark | a word, with hyphens and apostrophes | a number of a time | a digit | any other mark | white space
WORD = r" ?\[/?INST\]| ?\p{L}+(?:[-']\p{L}+)*| ?\p{N}{2}(?=:)|(?<=:)\p{N}{2}| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"


class Layout(NamedTuple):
    """special: the first ids; single: what is put around every text."""

    special: tuple[str, ...]
    single: str


LLAMA = Layout(("<unk>", "<s>", "</s>", "<pad>"), "<s> $A")
T5 = Layout(("<pad>", "</s>", "<unk>"), "$A </s>")


def byte_level(texts: Iterable[str], vocab: int, directory: Path, layout: Layout = LLAMA) -> None:
    """Train a byte-level BPE of at most `vocab` tokens on `texts` and write it to `directory`."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(layout.special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    _write(made, directory, layout)


def word_level(texts: Iterable[str], directory: Path, layout: Layout = LLAMA) -> None:
    """Collect the words of `texts`, each with its leading space if it has one (see WORD).

    "top-left" is one word and "06:48:56" five: a number inside a time is one word, in other numbers every digit is.
    """
    cut = pre_tokenizers.Split(tokenizers.Regex(WORD), "isolated")
    words = {word for text in texts for word, _ in cut.pre_tokenize_str(text)}
    vocabulary = {word: i for i, word in enumerate([*layout.special, *sorted(words | {" ", "\n"})])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = cut
    made.decoder = decoders.Fuse()
    _write(made, directory, layout)


def _write(made: tokenizers.Tokenizer, directory: Path, layout: Layout) -> None:
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in layout.special])
    around = [(token, made.token_to_id(token)) for token in layout.special if token in layout.single]
    made.post_processor = processors.TemplateProcessing(single=layout.single, special_tokens=around)
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if "<s>" in layout.special else None,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

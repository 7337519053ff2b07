"""What the parity tests of text share: the Llama tokenizer, recorded labels and rendered dialogues."""

import functools
import json

from tests.goldens import needs_shared
from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data.templates import TemplateError, render
from vlm_jax.data.tokenizer import load_tokenizer


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def llama(legacy, *added):
    """The SentencePiece model of Llama 2, which is not ours; added: texts of tokens behind its 32000."""
    return load_tokenizer(needs_shared("tokenizers/llama2.model"), legacy=legacy).with_tokens(*added)


def differing(pairs):
    """Short list of (case, ours, theirs) that differ, for the assertion to show."""
    return [pair for pair in pairs if pair[1] != pair[2]][:3]


def recorded_labels(case, data):
    """(tokens, labels) of a case, (None, None) where the original raised; no image has a label."""
    if "error" in case:
        return None, None
    tokens = data["input_ids_pool"][case["input_ids_ref"]] if "input_ids_ref" in case else case["input_ids"]
    labels = case.get("labels") or [IGNORE] * len(tokens)
    for start, end in case.get("label_ranges", ()):
        labels[start:end] = tokens[start:end]
    return tokens, [IGNORE if label == IMAGE else label for label in labels]


def turns_of(conversations):
    return [(turn["from"], turn["value"]) for turn in conversations]


def rendered(chosen, case, dialogues):
    """A case of prompts.json in the template `chosen`."""
    messages = [(chosen.roles[speaker == "gpt"], text) for speaker, text in dialogues[case["dialogue"]]]
    if case.get("first_message_is_image_tuple"):
        messages[0] = (messages[0][0], (messages[0][1], "an image", "Pad"))
    before = list(chosen.messages) if case.get("keep_template_messages") else []
    try:
        return render(chosen, before + messages)
    except TemplateError:
        return "error"


def lists(encoded):
    """Tokens and labels as lists."""
    return tuple(array.tolist() for array in encoded)

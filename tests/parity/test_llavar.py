"""Templates, prompts, tokens and masks against SALT-NLP/LLaVAR: its images are special tokens inside the text."""

import functools
import json

import numpy as np

from tests.golden_text import differing, lists, llama, read, recorded_labels, rendered, turns_of
from tests.goldens import beside, golden
from vlm_jax.config import IMAGE
from vlm_jax.data.records import Record
from vlm_jax.data.tasks import TextFormat, encode_dialogue, place_images
from vlm_jax.data.templates import IMAGE_TEXT, TEMPLATES, template
from vlm_jax.data.tokenizer import load_tokenizer

PATCH, ADDED = "<im_patch>", ("<im_patch>", "<im_start>", "<im_end>")
UNSTATED_LENGTH = 2048  # of cases recorded without a model_max_length


def ours(name):
    return template(f"llavar_{name}")


@golden("llavar", "conversation_templates.json")
def test_conversation_templates(path):
    names = {"sep_style": "style"}
    recorded = read(path)
    for name, fields in recorded.items():
        for field, value in fields.items():
            assert json.loads(json.dumps(getattr(ours(name), names.get(field, field)))) == value, (name, field)
    assert {f"llavar_{name}" for name in recorded} == {n for n, t in TEMPLATES.items() if t.origin == "llavar"}


@golden("llavar", "prompts.json")
def test_prompts(path):
    data = read(path)
    assert not differing(
        (case, rendered(ours(case["template"]), case, data["dialogues"]), case.get("prompt", "error"))
        for case in data["cases"]
    )


def mask_cases(path):
    """(case, turns, has_image, format for a given compat, image tokens, expected tokens and labels)."""
    data = read(path)
    for case in data["cases"]:
        sample = data["samples"][case["sample"]]
        if "legacy" in case:
            tokenizer = llama(case["legacy"], *data.get("added_tokens", ADDED))
        else:
            end = "<|endoftext|>"
            tokenizer = load_tokenizer(beside(path, "tiny_bpe_tokenizer.json"), bos=end, eos=end, unk=end, pad=end)
            tokenizer = tokenizer.with_tokens(*ADDED)
        form = functools.partial(
            TextFormat,
            tokenizer,
            ours(case["version"]),
            start_end=case.get("use_im_start_end", case.get("mm_use_im_start_end", False)),
            keep_images=not case.get("sep_image_conv_front", False),
        )
        count = case.get("image_token_len", data.get("image_token_len"))
        yield case, turns_of(sample["conversations"]), sample["has_image"], form, count, *recorded_labels(case, data)


def with_patches(tokens, labels, form, count):
    """Tokens and labels with every image written as `count` patches."""
    widths = np.where(tokens == IMAGE, count, 1)
    tokens = np.where(tokens == IMAGE, form.tokenizer.id_of(PATCH), tokens)
    return lists((np.repeat(tokens, widths), np.repeat(labels, widths)))


def encoded(turns, has_image, form, count):
    """One `<image>` per patch in the text itself, so that counting and cutting see what the original saw."""
    if has_image:
        turns = place_images(turns, form.template, form.start_end, form.keep_images)
        turns = [(role, text.replace(IMAGE_TEXT, IMAGE_TEXT * count)) for role, text in turns]
    return with_patches(*encode_dialogue(turns, form, has_image), form, 1)


@golden("llavar", "preprocess_*.json")
def test_original_masks(path):
    """compat="llava" reproduces tokens and labels, the samples it loses and those it cuts included."""
    assert not differing(
        (case, encoded(turns, has_image, form(compat="llava", max_length=length(case)), count), (tokens, labels))
        for case, turns, has_image, form, count, tokens, labels in mask_cases(path)
    )


def length(case):
    return case.get("model_max_length", UNSTATED_LENGTH)


def trusted(case, turns, chosen, tokens):
    """Did the original check its counts, or was there nothing that could mislead it?"""
    marks = (chosen.sep2 or chosen.sep, f"{chosen.roles[1]}:")
    misleading = case.get("legacy") is False or any(mark in text for _, text in turns for mark in marks)
    return not case.get("mismatch_warning") and (len(tokens) < length(case) or not misleading)


@golden("llavar", "preprocess_*.json")
def test_exact_masks(path):
    """The default, with one IMAGE per image: the recorded tokens always, and the labels wherever the original counts right."""
    for case, turns, has_image, form, count, tokens, labels in mask_cases(path):
        record = Record("1", tuple(turns), ("a.png",) * sum(text.count(IMAGE_TEXT) for _, text in turns) * has_image)
        sample = form()(record)
        found, given = with_patches(sample.tokens, sample.labels, form(), count)
        assert len(tokens) in (len(found), length(case)) and found[: len(tokens)] == tokens, case
        if trusted(case, turns, template(f"llavar_{case['version']}"), tokens):
            assert given[: len(tokens)] == labels, case

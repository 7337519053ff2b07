"""Text, masks and sampler against haotian-liu/LLaVA v1.2.2: every recorded prompt, token and label."""

import functools
import json

from tests.golden_text import differing, lists, llama, read, recorded_labels, rendered, turns_of
from tests.goldens import beside, golden
from vlm_jax.data import sampler
from vlm_jax.data.records import record_of
from vlm_jax.data.tasks import TextFormat, encode_dialogue, place_images
from vlm_jax.data.templates import TEMPLATES, TemplateError, template
from vlm_jax.data.tokenizer import load_tokenizer

UNSTATED_LENGTH = 2048  # of cases recorded without a model_max_length


def has_masks(data):
    return isinstance(data, dict) and "samples" in data


@golden("llava", "conversation_templates.json")
def test_conversation_templates(path):
    names = {"sep_style": "style"}
    recorded = read(path)
    for name, fields in recorded.items():
        ours = template(name)
        for field, value in fields.items():
            mine = getattr(ours, names.get(field, field))
            assert json.loads(json.dumps(mine)) == value, (name, field)
    assert set(recorded) == {name for name, t in TEMPLATES.items() if t.origin == "llava"}


@golden("llava", "prompts.json")
def test_prompts(path):
    data = read(path)
    assert not differing(
        (c, rendered(template(c["template"]), c, data["dialogues"]), "error" if "error" in c else c["prompt"])
        for c in data["cases"]
    )


@golden("llava", "tokenizer_image_token.json")
def test_tokenizer_image_token(path):
    for case in read(path):
        tokenizer = llama(case["legacy"])
        assert tokenizer.encode_images(case["text"]) == case["input_ids"], case["text"]
        assert tokenizer.decode(case["input_ids"], skip_special=False) == case["text"]


@golden("llava", "preprocess_*.json", holds=lambda data: isinstance(data, list) and data and "result" in data[0])
def test_placeholder_rewriting(path):
    for case in read(path):
        placed = place_images([("human", case["value"])], template(case["version"]), case["mm_use_im_start_end"])
        assert placed == (("human", case["result"]),), case


def mask_cases(path):
    """(case, turns, has_image, format for a given compat, expected tokens, expected labels or None for an
    error).
    """
    data = read(path)
    for case in data["cases"]:
        sample, chosen = data["samples"][case["sample"]], template(case["version"])
        turns = turns_of(sample["conversations"])
        if sample["has_image"]:
            turns = place_images(turns, chosen, case["mm_use_im_start_end"])
        if "legacy" in case:
            tokenizer = llama(case["legacy"])
        else:
            end = "<|endoftext|>"
            tokenizer = load_tokenizer(beside(path, "tiny_bpe_tokenizer.json"), bos=end, eos=end, unk=end, pad=end)
        form = functools.partial(
            TextFormat, tokenizer, chosen, max_length=case.get("model_max_length", UNSTATED_LENGTH)
        )
        yield case, turns, sample["has_image"], form, *recorded_labels(case, data)


def encoded(turns, form, has_image):
    try:
        return lists(encode_dialogue(turns, form, has_image))
    except TemplateError:
        return None, None


@golden("llava", "preprocess_*.json", holds=has_masks)
def test_original_masks(path):
    """compat="llava" reproduces tokens and labels of every version, the samples it loses included."""
    assert not differing(
        (case, encoded(turns, form(compat="llava"), has_image), (tokens, labels))
        for case, turns, has_image, form, tokens, labels in mask_cases(path)
    )


def trusted(case, turns, form, tokens):
    """Did the original check its counts, or was there nothing that could mislead it?"""
    chosen = form.args[1]
    misleading = (chosen.sep2 or chosen.sep, f"{chosen.roles[1]}:", "[/INST]")
    checked = len(tokens) < form.keywords["max_length"] or not any(
        mark in text for _, text in turns for mark in misleading
    )
    return chosen.style in ("TWO", "LLAMA_2", "PLAIN") and not case.get("mismatch_warning") and checked


@golden("llava", "preprocess_*.json", holds=has_masks)
def test_exact_masks(path):
    """The default has the same tokens always, and the same labels wherever the original v1, llama_2 or plain
    does not warn.
    """
    for case, turns, has_image, form, tokens, labels in mask_cases(path):
        ours = encoded(turns, form(), has_image)
        assert ours[0] == tokens, case
        if tokens is not None and trusted(case, turns, form, tokens):
            assert ours[1] == labels, case


@golden("llava", "dataset_lengths.json")
def test_dataset_lengths(path):
    data = read(path)
    records = [record_of(raw, index) for index, raw in enumerate(data["data"])]
    assert [sampler.length(record) for record in records] == data["lengths"]
    assert [sampler.modality_length(record) for record in records] == data["modality_lengths"]


@golden("llava", "sampler_modality_length.json")
def test_sampler(path):
    for case in read(path):
        draws = iter(case["permutations_in_call_order"])
        group = sampler.group_by_modality_length if case["group_by_modality"] else sampler.group_by_length
        try:
            order = group(case["lengths"], case["batch_size"], case["world_size"], lambda n: next(draws))
        except ValueError:
            order = None
        assert order == case.get("indices"), case
        assert next(draws, None) is None

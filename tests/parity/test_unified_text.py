"""Dialogues with generated images against the unified model's preprocessing (goldens/unified/preprocess.json)."""

import dataclasses

import numpy as np
import pytest

from tests.golden_text import lists, llama, read, recorded_labels, turns_of
from tests.goldens import golden
from vlm_jax.config import GENERATED, IGNORE
from vlm_jax.data.generation import Generation
from vlm_jax.data.records import Record, RecordError
from vlm_jax.data.tasks import TextFormat, prompt
from vlm_jax.data.templates import IMAGE_TEXT, template


def record_of_case(case):
    """As many images as its text names."""
    turns = tuple(turns_of(case["conversations"]))
    named = sum(text.count(IMAGE_TEXT) for _, text in turns)
    return Record("1", turns, tuple(f"{k}.png" for k in range(named)) if case["has_image"] else ())


def with_slots(sample, slots):
    """Tokens, labels and the first slot, a generated image being written as `slots` slots."""
    widths = np.where(sample.tokens == GENERATED, slots, 1)
    tokens, labels = np.repeat(sample.tokens, widths), np.repeat(sample.labels, widths)
    start = tokens.tolist().index(GENERATED) if sample.generated else None
    return *lists((tokens, labels)), start


def encoder_of(case, compat, limit=None):
    form = TextFormat(llama(case["legacy"]), template("v1"), compat)
    return Generation(form, case["num_image_token"], limit)


def assert_recorded(case, compat):
    sample = encoder_of(case, compat)(record_of_case(case))
    expected = *recorded_labels(case, {}), case["img_token_start"]
    assert with_slots(sample, case["num_image_token"]) == expected, case["name"]
    assert not (sample.labels[sample.tokens < 0] != IGNORE).any()
    images = record_of_case(case).images
    assert (sample.generated, sample.images) == ((images, ()) if case["img_token_start"] is not None else ((), images))


@golden("unified", "preprocess*.json")
def test_original(path):
    """compat="llava": an image in the second turn is generated, whoever says it."""
    for case in read(path)["cases"]:
        assert_recorded(case, "llava")


def said_by_model(case):
    return any(role == "gpt" and IMAGE_TEXT in text for role, text in turns_of(case["conversations"]))


@golden("unified", "preprocess*.json")
def test_the_speaker_decides(path):
    """The default agrees wherever the second turn is the assistant's; elsewhere a shown image stays one."""
    for case in read(path)["cases"]:
        if said_by_model(case) == (case["img_token_start"] is not None):
            assert_recorded(case, "")
        else:
            sample = encoder_of(case, "")(record_of_case(case))
            assert not sample.generated and sample.images == record_of_case(case).images
            assert (sample.labels != IGNORE).any()


@golden("unified", "preprocess*.json")
def test_a_caption_gives_way_to_its_image(path):
    """All slots and the token behind them are kept while there is a caption to shorten; then the record is refused."""
    for case in filter(said_by_model, read(path)["cases"]):
        record, slots = record_of_case(case), case["num_image_token"]
        whole = encoder_of(case, "")(record)
        bare = encoder_of(case, "")(dataclasses.replace(record, turns=(("human", ""), *record.turns[1:])))
        shortest, longest = (len(sample.tokens) + slots - 1 for sample in (bare, whole))
        for limit in sorted({longest, (longest + shortest) // 2, shortest}):
            sample = encoder_of(case, "", limit)(record)
            tokens, labels, start = with_slots(sample, slots)
            assert shortest <= len(tokens) <= limit, (case["name"], limit)
            assert (len(tokens) == longest) == (limit == longest) and longest - len(tokens) < 8 + longest - limit
            assert tokens[start : start + slots] == [GENERATED] * slots and labels[-1] == tokens[-1] != IGNORE
            assert [i for i in labels if i != IGNORE] == [i for i in whole.labels.tolist() if i != IGNORE]
        with pytest.raises(RecordError, match="sample_length"):
            encoder_of(case, "", shortest - 1)(record)


@golden("unified", "preprocess*.json")
def test_evaluation_prompts(path):
    for case in read(path)["eval_prompts"]:
        for legacy in (False, True):
            question = case["question"]
            tokens = prompt(question, llama(legacy), template("llava_v1"), images=question.count(IMAGE_TEXT))
            assert tokens.tolist() == case[f"input_ids_legacy_{str(legacy).lower()}"], question

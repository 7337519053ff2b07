"""Self-questioning text against heliossun/SQ-LLaVA: prompts, tokens and labels from recorded draws, padded batches."""

import numpy as np
import pytest

from tests.golden_text import differing, lists, llama, read, recorded_labels, turns_of
from tests.goldens import beside, golden
from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data.packing import Piece, RowShape, build_row, expand, truncate
from vlm_jax.data.records import Record
from vlm_jax.data.self_questioning import SelfQuestioning
from vlm_jax.data.tasks import Sample, TextFormat, place_images
from vlm_jax.data.templates import IMAGE_TEXT, render, template


class Played:
    """The draws of a recorded sample, one per question behind the first, in their order."""

    def __init__(self, conversations, draws):
        asked = [k for k, turn in enumerate(conversations) if turn["from"] == "human" and k]
        self.draws = dict(zip(asked, draws, strict=True)) if draws else {}

    def uniform(self, k):
        return self.draws[k]


class Chosen:
    """Draws that make exactly these turns questions of the model."""

    def __init__(self, turns):
        self.turns = turns

    def uniform(self, k):
        return 0.0 if k in self.turns else 1.0


def questioning(case, compat, share=None):
    form = TextFormat(llama(True), template(case["template"]), compat, case["mm_use_im_start_end"])
    if case["has_image"] is False or compat:
        form = TextFormat(form.tokenizer, form.template, compat, form.start_end, max_length=case["model_max_length"])
    return SelfQuestioning(form, case["sq_r"] if share is None else share)


def encoded(case, encode, draws):
    """Tokens and labels as lists, images placed as in training."""
    turns = turns_of(case["conversations"])
    if case["has_image"]:
        turns = place_images(turns, encode.form.template, encode.form.start_end)
    return lists(encode.encode(turns, case["has_image"], draws))


@golden("sq_llava", "v1_sq_preprocess*.json")
def test_original_masks(path):
    """compat="llava" reproduces tokens and labels from the recorded draws, the samples it loses included."""
    assert not differing(
        (
            case["name"],
            encoded(case, questioning(case, "llava"), Played(case["conversations"], case["random_draws"])),
            recorded_labels(case, {}),
        )
        for case in read(path)["cases"]
    )


def well_formed(case):
    """A dialogue that the original does not lose, and in which no text can be taken for a marker."""
    turns = turns_of(case["conversations"])
    alternates = all(role == ("human", "gpt")[k % 2] for k, (role, _) in enumerate(turns)) and len(turns) % 2 == 0
    marked = any(mark in text for _, text in turns for mark in ("ASSISTANT: ", "</s>", "<unk>")) or not all(
        text for _, text in turns
    )
    return alternates and not marked and case["warning"] is None


@golden("sq_llava", "v1_sq_preprocess*.json")
def test_exact_masks(path):
    """The default has the same tokens and labels for well-formed dialogues, from draws or from the chosen turns."""
    for case in filter(well_formed, read(path)["cases"]):
        played = Played(case["conversations"], case["random_draws"])
        expected = recorded_labels(case, {})
        assert encoded(case, questioning(case, ""), played) == expected, case["name"]
        chosen = Chosen(set(case["vuser_turn_indices"]))
        assert encoded(case, questioning(case, "", share=0.5), chosen) == expected, case["name"]


@golden("sq_llava", "v1_sq_preprocess*.json")
def test_defects_are_mended(path):
    """Every dialogue with an answer keeps its loss, and the loss spells answers and questions of the model."""
    for case in read(path)["cases"]:
        encode = questioning(case, "")
        tokens, labels = encoded(case, encode, Played(case["conversations"], case["random_draws"]))
        runs = "".join(" " if i == IGNORE else chr(i + 1) for i in labels).split()
        said = " ".join(encode.form.tokenizer.decode([ord(c) - 1 for c in run], skip_special=False) for run in runs)
        answers = [turn["value"] for turn in case["conversations"] if turn["from"] == "gpt"]
        answers = answers[case["conversations"][0]["from"] == "gpt" :]
        if len(tokens) < case["model_max_length"]:
            assert all(" ".join(answer.split()) in " ".join(said.split()) for answer in answers), case["name"]
        assert "ASSISTANT:" not in said or any("ASSISTANT:" in answer for answer in answers), case["name"]


def other_format(case):
    asks = case["function"] == "preprocess_v1_sq"
    name = {"preprocess_plain_wQAV": "plain_qav"}.get(case["function"], case["template"])
    form = TextFormat(llama(True), template(name))
    return SelfQuestioning(form, 0.0) if asks else form


@golden("sq_llava", "other_preprocess*.json")
def test_other_preprocessing(path):
    """Dialogues that VUSER opens, and captions, with the picture to be imagined behind them or not."""
    for case in read(path)["cases"]:
        sample = other_format(case)(Record("1", tuple(turns_of(case["conversations"])), ("a.png",)))
        assert lists((sample.tokens, sample.labels)) == recorded_labels(case, {}), case
        assert len(sample.images) == case["input_ids"].count(IMAGE)


@golden("sq_llava", "collator*.json")
def test_batches(path):
    """A sample alone in a row is what the collator makes of it: cut, padded, and its targets the labels of the next slots."""
    encoded_cases = {case["name"]: case for case in read(beside(path, "v1_sq_preprocess.json"))["cases"]}
    for batch in read(path)["cases"]:
        width = len(batch["input_ids"][0])
        rows = zip(batch["from_cases"], batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        for name, tokens, labels, mask in rows:
            case = encoded_cases[name]
            played = Played(case["conversations"], case["random_draws"])
            ours, given = questioning(case, "").encode(
                place_images(turns_of(case["conversations"]), template(case["template"])), case["has_image"], played
            )
            images = int((ours == IMAGE).sum())
            sample = truncate(Sample(ours, given, ("a.png",) * images), [1] * images, batch["model_max_length"])
            slots = expand(sample, [np.zeros(1, int)] * images, [1] * images, 1)
            row = build_row([Piece(len(slots), images, slots, None)], RowShape(width, 1, 1, 1))
            assert row["segments"].tolist() == mask
            assert [t if s < 0 else IMAGE for t, s in zip(row["tokens"].tolist(), row["image_slots"])] == tokens
            assert [t if w else IGNORE for t, w in zip(row["targets"].tolist(), row["weights"])] == labels[1:] + [
                IGNORE
            ]


def inference_steps(case):
    """kind -> messages of each step, as the variants of sq_inference_prompts.json are described there."""
    user, assistant, asker = template(case["conv_mode"]).roles
    describe = (user, f"{IMAGE_TEXT}\n{case['user']}")
    pairs = list(zip(case["self_questions"], case["self_answers"]))
    exchange = [message for q, a in pairs for message in ((user, q), (assistant, a))]
    last = [(user, case["question"]), (assistant, None)]
    first = [describe, (assistant, case["first_answer"])]
    steps = {"first_answer": [describe, (assistant, None)], "self_question": [*first, (asker, None)]}
    if case["variant"] in ("caption", "v1_style"):
        steps["self_question"] = [(asker, f"{IMAGE_TEXT}\n")]
        first[0] = (user, f"{IMAGE_TEXT}\n")
    if case["variant"] == "v1_style":
        first, exchange[0] = [], (user, f"{IMAGE_TEXT}\n{pairs[0][0]}")
    return {**steps, "final_answer": [*first, *exchange, *last]}


@golden("sq_llava", "sq_inference_prompts*.json")
def test_inference_prompts(path):
    for case in read(path)["cases"]:
        chosen, tokenizer = template(case["conv_mode"]), llama(True)
        steps = inference_steps(case)
        assert [step["kind"] for step in case["steps"]] == list(steps)
        for step in case["steps"]:
            text = render(chosen, steps[step["kind"]])
            cut = case["variant"] in ("loader", "v1_style") and step["kind"] == "self_question"
            tokens = tokenizer.encode_images(text)
            assert text == step["prompt"], (case["variant"], step["kind"])
            assert tokens[: len(tokens) - 2 * cut] == step["input_ids"], (case["variant"], step["kind"])
        opening = tokenizer.encode(f"{chosen.roles[1]}: ")
        assert opening[1:-1] == case["answer_suffix_ids"]


def test_a_question_that_opens_the_dialogue_is_never_drawn():
    form = TextFormat(llama(True), template("v1_sq"))
    turns = [("gpt", "Hello!"), ("human", "<image>\nWhat is it?"), ("gpt", "A cat.")]
    drawn, without = (SelfQuestioning(form, 1.0).encode(t, True) for t in (turns, turns[1:]))
    assert lists(drawn) == lists(without)
    with pytest.raises(ValueError, match="no answer"):
        SelfQuestioning(form, 1.0).encode(turns[:2], True)

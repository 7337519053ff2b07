"""Text of the encoder-decoder models against linzhiqiu/CLIP-FlanT5 and t2v_metrics: tokens, answers, flattening, sampler."""

import functools
import json

import numpy as np
import pytest

from tests.goldens import beside, cases, golden, needs_shared
from vlm_jax.config import IGNORE, IMAGE
from vlm_jax.data import sampler
from vlm_jax.data.flatten import Flattened, flatten
from vlm_jax.data.packing import Piece as Place
from vlm_jax.data.packing import RowShape, build_row, expand, truncate
from vlm_jax.data.records import Record, RecordError
from vlm_jax.data.t5_text import T5Format, encode_exchange
from vlm_jax.data.tasks import Sample, place_images, touched
from vlm_jax.data.templates import TEMPLATES, Piece, TemplateError
from vlm_jax.data.tokenizer import load_tokenizer

MODEL_MAX_LENGTH = 2048  # of every recorded case
MODEL = "_sentencepiece.model"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def per_tokenizer(pattern, names):
    """Run a test with (path, name) for every tokenizer that a file has cases of, so that one may be missing."""
    pairs = [(path, name) for path in cases("clip_flant5", pattern) for name in names(read(path))]

    def mark(test):
        ids = [f"{path.name}-{name}" for path, name in pairs]
        return pytest.mark.parametrize("path, name", pairs, ids=ids)(test) if pairs else None

    return mark


@functools.cache
def load(file):
    return load_tokenizer(file)


class Recorded:
    """Plays back what Python's randint gave, and checks that it is asked for the same range."""

    def __init__(self, low=None, high=None, value=None):
        self.range, self.value, self.asked = (low, high), value, 0

    def integer(self, k, low, high):
        assert (low, high) == self.range
        self.asked += 1
        return self.value


@per_tokenizer("tokenize_t5.json", lambda data: [name for name in data if "plain" in data[name]])
def test_tokens(path, name):
    """As the fast tokenizer of training; the slow one of scoring does not close a text that ends in `</s>` again."""
    tokenizer, data = load(beside(path, name + MODEL)), read(path)
    wrong = [(text, tokenizer.encode(text), ids) for text, ids in data[name]["plain"] if tokenizer.encode(text) != ids]
    assert not wrong[:3]
    for text, fast, slow in data[name].get("fast_slow_differ", ()):
        ids = tokenizer.encode(text)
        closed_twice = ids[-2:] == [tokenizer.eos_id] * 2
        assert ids == fast and ids[: len(ids) - closed_twice] == slow, text


@per_tokenizer("tokenize_t5.json", lambda data: data.get("t5_tokenizer_image_token", {}).get("columns", [])[1:])
def test_tokens_around_images(path, name):
    table = read(path)["t5_tokenizer_image_token"]
    tokenizer, column = load(beside(path, name + MODEL)), table["columns"].index(name)
    for row in table["rows"]:
        assert tokenizer.encode_images(row[0]) == row[column], row[0]


@per_tokenizer("preprocess_t5.json", lambda data: data["tokenizers"])
def test_special_ids(path, name):
    data = read(path)["tokenizers"][name]
    tokenizer = load(beside(path, data["file"]))
    ours = {"len": tokenizer.size, "pad": tokenizer.pad_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
    assert ours == {key: data[key] for key in ours} and tokenizer.bos_id is None
    assert tokenizer.id_of("<extra_id_0>") == tokenizer.size - 1


@per_tokenizer("preprocess_t5.json", lambda data: data["tokenizers"])
def test_questions_and_answers(path, name):
    data = read(path)["tokenizers"][name]
    tokenizer = load(beside(path, data["file"]))
    for case in data["samples"]:
        form = T5Format(tokenizer, case["version"], MODEL_MAX_LENGTH)
        turns = tuple((turn["from"], turn["value"]) for turn in case["conversations"])
        turns = place_images(turns, TEMPLATES["v1"]) if case["has_image"] else turns
        if "after_preprocess_multimodal" in case:
            assert [list(turn) for turn in turns] == [list(t.values()) for t in case["after_preprocess_multimodal"]]
        draws = Recorded(*case.get("randint_low_high_value", ()))
        if "raises" in case:
            with pytest.raises(TemplateError):
                encode_exchange(turns, form, case["has_image"], draws)
            continue
        question, answer = encode_exchange(turns, form, case["has_image"], draws)
        assert question.tolist() == case["input_ids"] and answer.tolist() == case["labels"], case["id"]
        assert draws.asked == ("randint_low_high_value" in case), case["id"]


@per_tokenizer("preprocess_t5.json", lambda data: data["tokenizers"])
def test_records_become_the_same_samples(path, name):
    """What training calls; answers with an image token, which the original cannot train on, are refused."""
    data = read(path)["tokenizers"][name]
    tokenizer, refused = load(beside(path, data["file"])), 0
    for case in data["samples"]:
        turns = tuple((turn["from"], turn["value"]) for turn in case["conversations"])
        record = Record(case["id"], turns, ("x.jpg",) if case["has_image"] else ())
        form = T5Format(tokenizer, case["version"], MODEL_MAX_LENGTH)
        try:
            sample = form(record, Recorded(*case.get("randint_low_high_value", ())))
        except RecordError:
            refused += 1
            assert "raises" in case or IMAGE in case["labels"] or not fits(case), case
            continue
        assert sample.tokens.tolist() == case["input_ids"] and sample.answer.tolist() == case["labels"]
        assert (sample.labels == IGNORE).all() and sample.images == record.images
    assert refused < len(data["samples"])


def fits(case):
    """Has the encoder one marker for the one image, or none for none?"""
    return case["input_ids"].count(IMAGE) == int(case["has_image"])


def row_of(question, answer, slots, answers):
    """A row that holds one sample whose images take one slot each."""
    question = np.asarray(question, np.int32)
    views = int((question == IMAGE).sum())
    sample = Sample(question, np.full_like(question, IGNORE), ("x.jpg",) * views, answer=np.asarray(answer, np.int32))
    kept = truncate(sample, [1] * views, MODEL_MAX_LENGTH, MODEL_MAX_LENGTH)
    laid = expand(kept, [np.zeros(1, np.int32)] * views, [1] * views, 1)
    shape = RowShape(slots, max(views, 1), 1, 1, answers)
    return build_row([Place(len(laid), views, laid, None, len(kept.answer))], shape)


@golden("clip_flant5", "preprocess_t5.json")
def test_rows(path):
    """A sample alone in a row is what the original pads it to in a batch; its decoder reads HF's shift by one place."""
    for data in read(path)["tokenizers"].values():
        for batch in data["collator"]:
            padded = [np.asarray(batch["collated"][k]) for k in ("input_ids", "attention_mask", "labels")]
            for (question, answer), ids, valid, labels in zip(batch["inputs"], *padded):
                row = row_of(question, answer, len(ids), len(labels))
                assert (row["segments"] == valid).all()
                assert (row["tokens"] == np.where(ids == IMAGE, 0, ids)).all()
                assert ((row["image_slots"] >= 0) == (ids == IMAGE)).all()
                said = labels != IGNORE
                assert (row["answer_weights"] == said).all() and (row["answer_segments"] == said).all()
                assert (row["answer_targets"] == np.where(said, labels, 0)).all()
                n = int(said.sum())
                assert row["answer_tokens"].tolist() == [0, *labels[: n - 1], *[0] * (len(labels) - n)]


@golden("clip_flant5", "flatten_multi_turn.json")
def test_flattening(path):
    data = read(path)
    assert flatten(data["input"], "original") == data["output"]
    records = Flattened([record_of_raw(raw) for raw in data["input"]], "original")
    assert [record.turns for record in records] == [record_of_raw(raw).turns for raw in data["output"]]


def record_of_raw(raw):
    """Unchecked, for the recorded dialogues are partly broken."""
    turns = tuple((turn["from"], turn["value"]) for turn in raw["conversations"])
    return Record(raw["id"], turns, (raw["image"],) if "image" in raw else ())


@golden("clip_flant5", "length_grouped_sampler.json")
def test_sampler(path):
    for case in read(path)["cases"]:
        draws = iter(case["randperm_in_call_order"])
        group = sampler.group_by_length
        if case["group_by_modality"]:
            group = functools.partial(sampler.group_by_modality_length, left_over="front")
        order = group(case["lengths"], case["batch_size"], case["world_size_times_grad_accum"], lambda n: next(draws))
        assert order == case["indices"], case
        assert next(draws, None) is None


@golden("clip_flant5", "llava15_vqascore_tokens.json")
def test_scored_answers_of_decoder_only_models(path):
    """Question and answer in one string: the tokens that touch the answer are scored."""
    tokenizer = load_tokenizer(needs_shared("tokenizers/llama2.model"), legacy=True)
    for row in read(path)["rows"]:
        ids, spans = tokenizer.encode_spans(row["question"] + row["answer"], images=True)
        said = touched(spans, [Piece(row["question"]), Piece(row["answer"], True)])
        assert ids == row["input_ids"]
        assert np.where(said, ids, IGNORE).tolist() == row["labels"], row["caption"]

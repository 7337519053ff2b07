"""Contract 2: one function owns image size -> slots; no image is ever cut, and rejected samples are counted."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import IGNORE, IMAGE, ConfigError, VisionConfig, VLMConfig
from vlm_jax.data.manifest import OK, REJECTED, DataError, Layout, Room, TooLong
from vlm_jax.data.measuring import Limits, measure
from vlm_jax.data.packing import Piece, RowShape, build_row, expand
from vlm_jax.data.tasks import Sample
from vlm_jax.models.slots import NEWLINE, slots_of_image, slots_of_views, unpad_box, views_of_image

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
P = TINY.vision.features  # 4: a 2 x 2 grid
SPATIAL = dataclasses.replace(ANYRES, merge="spatial")


def brute_map(width, height, config):
    """Maps of feature indices by loops over tiles and patches, for every grid of the right number of tiles."""
    side, views = config.vision.grid, views_of_image(width, height, config)
    shapes = {(w // config.vision.image_size, h // config.vision.image_size) for w, h in config.pinpoints}
    for columns, rows in shapes:
        if 1 + columns * rows != views:
            continue
        grid = [[None] * (columns * side) for _ in range(rows * side)]
        for tile in range(columns * rows):
            for patch in range(side * side):
                y, x = tile // columns * side + patch // side, tile % columns * side + patch % side
                grid[y][x] = (1 + tile) * side * side + patch
        yield np.array(grid)


@given(SIZES)
def test_every_geometry_takes_features_that_exist(size):
    for config in (TINY, ANYRES, SPATIAL, dataclasses.replace(ANYRES, merge="flat"), VLMConfig()):
        slots, views = slots_of_image(*size, config), views_of_image(*size, config)
        assert slots.dtype == np.int32 and slots.ndim == 1
        real = slots[slots != NEWLINE]
        assert len(set(real.tolist())) == len(real), "a feature is shown twice"
        assert real.min() == 0 and real.max() < views * config.vision.features
        assert (NEWLINE in slots) <= (config.merge == "spatial_unpad")
        if config.merge != "spatial_unpad":
            assert len(slots) == views * config.vision.features


@given(SIZES)
def test_spatial_order_is_that_of_the_picture(size):
    base = np.arange(P)
    slots = slots_of_image(*size, SPATIAL)
    assert (slots[:P] == base).all()
    maps = list(brute_map(*size, SPATIAL))
    assert any((slots[P:] == grid.reshape(-1)).all() for grid in maps)
    unpadded = slots_of_image(*size, ANYRES)
    for grid in maps:
        if (slots[P:] == grid.reshape(-1)).all():
            top, bottom, left, right = unpad_box(*size, grid.shape[1], grid.shape[0])
            rows = [[*grid[y, left:right], NEWLINE] for y in range(top, bottom)]
            assert unpadded.tolist() == [*range(P), *sum(rows, [])]


def test_known_numbers():
    llava15 = VLMConfig()
    assert len(slots_of_image(640, 480, llava15)) == 576 and views_of_image(640, 480, llava15) == 1
    llava16 = dataclasses.replace(
        llava15,
        aspect="anyres",
        merge="spatial_unpad",
        image_newline=True,
        pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    )
    assert views_of_image(672, 672, llava16) == 5
    assert len(slots_of_image(672, 672, llava16)) == 576 + 48 * 49
    assert len(slots_of_image(2508, 28, llava16)) == 576  # so thin that unpadding leaves no row
    assert slots_of_views(1, 50, 50, llava16).tolist() == [*range(576), NEWLINE]
    full = dataclasses.replace(llava15, vision=VisionConfig(select="full"))
    assert len(slots_of_image(10, 10, full)) == 577
    with pytest.raises(ConfigError, match="vision.select=patch"):
        slots_of_image(10, 10, dataclasses.replace(llava16, vision=VisionConfig(select="full")))
    with pytest.raises(ConfigError, match="not a multiple of vision.image_size"):
        slots_of_image(10, 10, dataclasses.replace(llava16, pinpoints=((300, 300),)))


@st.composite
def samples(draw):
    """A sample whose text tokens are 10, 11, 12 ..., with images of random sizes between them, some text
    supervised.
    """
    text = draw(st.integers(1, 40))
    tokens = list(range(10, 10 + text))
    sizes = draw(st.lists(st.tuples(st.integers(5, 99), st.integers(5, 99)), max_size=4))
    for place in sorted((draw(st.integers(0, text)) for _ in sizes), reverse=True):
        tokens.insert(place, IMAGE)
    tokens = np.array(tokens, np.int32)
    said = np.array(draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))) & (tokens != IMAGE)
    return Sample(tokens, np.where(said, tokens, IGNORE).astype(np.int32), tuple(map(str, sizes))), sizes


@settings(max_examples=200)
@given(samples(), st.integers(1, 120), st.sampled_from([TINY, ANYRES]))
def test_truncation_never_cuts_an_image(made, limit, config):
    sample, sizes = made
    try:
        slots, count, views = Layout(encode, config, limit, 10**6).place(sample, sizes, "record 0")
    except TooLong as error:
        assert str(error).startswith("record 0")
        if error.reason == "too_long":
            assert str(limit) in str(error)
        else:
            assert error.reason == "nothing_to_learn" and (sample.labels[1:] == IGNORE).all()
        return
    assert len(slots) <= limit and slots.weights.sum() > 0
    whole = len(sample.tokens) + sum(len(slots_of_image(*size, config)) - 1 for size in sizes)
    assert slots.cut == whole - len(slots), "what is cut off is counted"
    relative = [slots_of_image(*size, config) for size in sizes[:count]]
    assert views == sum(views_of_image(*size, config) for size in sizes[:count])
    firsts = np.cumsum([0] + [P * views_of_image(*size, config) for size in sizes[:count]])
    expected = [np.where(r == NEWLINE, NEWLINE, r + first) for r, first in zip(relative, firsts)]
    shown = np.concatenate(expected or [np.zeros(0)])
    assert (slots.image_slots != -1).sum() == sum(map(len, relative)), "an image is cut"
    assert (slots.image_slots[slots.image_slots != -1] == shown).all(), "each image has its own views"
    text = slots.tokens[slots.image_slots == -1]
    assert text.tolist() == list(range(10, 10 + len(text))), "text is kept from the start, in order"
    supervised = slots.weights > 0
    assert (slots.targets[~supervised] == 0).all() and not supervised[-1]
    after = np.append(slots.tokens, 0)[1:]
    assert (slots.targets[supervised] == after[supervised]).all()


def test_slots_of_a_sample_literally():
    sample = Sample(np.array([5, 7, IMAGE, 9, 4]), np.array([IGNORE, IGNORE, IGNORE, 9, 4]), ("a",))
    s = expand(sample, [np.array([0, 1, NEWLINE])], [1], 2)
    assert s.tokens.tolist() == [5, 7, 0, 0, 0, 9, 4]
    assert s.image_slots.tolist() == [-1, -1, 0, 1, NEWLINE, -1, -1]
    assert s.targets.tolist() == [0, 0, 0, 0, 9, 4, 0]
    assert s.weights.tolist() == [0, 0, 0, 0, 1, 1, 0]
    text = expand(Sample(np.array([5, 6]), np.array([IGNORE, 6])), [], [], 2)
    pixels = np.full((1, 3, 3, 3), 7, np.uint8)
    pieces = [
        Piece(2, 0, text, None),
        Piece(7, 1, s, pixels),
        Piece(3, 1, None, None),
        Piece(7, 1, s, pixels + 1),
    ]
    row = build_row(pieces, RowShape(slots=20, views=4, pixels=3, features=2))
    assert row["segments"].tolist() == [1, 1, *[2] * 7, 0, 0, 0, *[4] * 7, 0]
    assert row["positions"].tolist() == [0, 1, *range(7), 0, 0, 0, *range(7), 0]
    newline = 4 * 2
    assert row["image_slots"].tolist() == [-1] * 4 + [0, 1, newline, -1, -1] + [-1] * 5 + [
        4,
        5,
        newline,
        -1,
        -1,
        -1,
    ]
    assert row["targets"][:2].tolist() == [6, 0] and row["weights"].sum() == 5
    assert row["images"][:, 0, 0, 0].tolist() == [7, 0, 8, 0]
    assert {k: v.dtype.name for k, v in row.items()} == {
        **dict.fromkeys(("tokens", "image_slots", "targets", "segments", "positions"), "int32"),
        "weights": "float32",
        "images": "uint8",
    }


@st.composite
def exchanges(draw):
    """A sample of an encoder-decoder model: a question with images, and an answer."""
    sample, sizes = draw(samples())
    answer = np.arange(draw(st.integers(0, 30)), dtype=np.int32) + 100
    return Sample(sample.tokens, np.full_like(sample.tokens, IGNORE), sample.images, answer=answer), sizes


@settings(max_examples=100)
@given(exchanges(), st.integers(1, 120), st.integers(1, 20))
def test_an_answer_is_cut_but_never_loses_an_image(made, limit, answer_limit):
    sample, sizes = made
    takes = len(sample.tokens) + sum(len(slots_of_image(*size, TINY)) - 1 for size in sizes)
    last_image = max([0, *np.flatnonzero(sample.tokens == IMAGE)])
    until = last_image + sum(len(slots_of_image(*size, TINY)) - 1 for size in sizes) + bool(sizes)
    try:
        slots, count, _ = Layout(encode, TINY, limit, 10**6, answer_limit).place(sample, sizes, "record 0")
    except TooLong as error:
        assert (
            (error.reason == "nothing_to_learn") == (len(sample.answer) == 0)
            and until > limit
            or not len(sample.answer)
        )
        return
    assert count == len(sizes) and until <= limit, "the answer may be about any of the images"
    assert slots.answer.tolist() == sample.answer[:answer_limit].tolist() and len(slots) == min(takes, limit)
    assert slots.cut == takes - len(slots) + len(sample.answer) - len(slots.answer)


def test_answers_of_a_row_literally():
    def piece(tokens, answer, reserved):
        sample = Sample(np.array(tokens), np.full(len(tokens), IGNORE), answer=np.array(answer))
        return Piece(len(tokens), 0, expand(sample, [], [], 2), None, reserved)

    pieces = [piece([5, 6], [8, 9, 1], 4), Piece(1, 0, None, None, 2), piece([7], [4, 1], 2)]
    row = build_row(pieces, RowShape(slots=6, views=1, pixels=3, features=2, answers=10))
    assert row["segments"].tolist() == [1, 1, 0, 3, 0, 0] and row["weights"].sum() == 0
    assert row["answer_tokens"].tolist() == [0, 8, 9, 0, 0, 0, 0, 4, 0, 0], "one place later, behind the padding token"
    assert row["answer_targets"].tolist() == [8, 9, 1, 0, 0, 0, 4, 1, 0, 0]
    assert row["answer_segments"].tolist() == [1, 1, 1, 0, 0, 0, 3, 3, 0, 0]
    assert row["answer_positions"].tolist() == [0, 1, 2, 0, 0, 0, 0, 1, 0, 0]
    assert row["answer_weights"].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert row["answer_weights"].dtype == np.float32 and row["answer_tokens"].dtype == np.int32


def test_a_drawn_sample_may_take_less_than_its_place_but_never_more():
    """What is drawn again in every epoch leaves padding inside its place, or is cut to it."""
    layout, tokens = Layout(encode, TINY, 100, 10), np.array([5, IMAGE, 8, 9, 7])
    sample = Sample(tokens, np.where(tokens > 7, tokens, IGNORE), ("a",))
    slots, _, views = layout.place(sample, [(9, 9)], "record 0", Room(30, 3))
    row = build_row([Piece(10, 2, slots, np.ones((1, 3, 3, 3), np.uint8))] * 2, RowShape(24, 5, 3, P))
    assert row["segments"].tolist() == [1] * 8 + [0, 0] + [2] * 8 + [0] * 6
    assert row["images"][:, 0, 0, 0].tolist() == [1, 0, 1, 0, 0] and views == 1
    assert row["image_slots"][11:15].tolist() == [2 * P, 2 * P + 1, 2 * P + 2, 2 * P + 3]
    short, _, _ = layout.place(sample, [(9, 9)], "record 0", Room(6, 1))
    assert len(short) == 6 and short.cut == 2 and short.weights.tolist() == [0, 0, 0, 0, 1, 0]
    with pytest.raises(TooLong, match="record 0 takes 8 slots and nothing in the first 5 is trained on"):
        layout.place(sample, [(9, 9)], "record 0", Room(5, 1))


def test_rejected_samples_are_counted(tmp_path):
    records = make_records(write_images(tmp_path), 60, most_images=3)
    records[7] = {"tokens": [1, 2], "images": []}
    records[9] = {"tokens": [1, 2, *[IMAGE] * 6, 50], "images": records[4]["images"][:1] * 6}
    table = measure(records, Layout(encode, TINY, 24, 2), Limits(max_bad=0))
    whole = measure(records, Layout(encode, TINY, 10**6, 10), Limits(max_bad=0))
    assert table.count(REJECTED) > 0 and table.count(REJECTED) + table.count(OK) == 60
    needs_nothing = (whole.lengths <= 24) & (whole.views <= 2) & (whole.status == OK)
    assert (table.status[needs_nothing] == OK).all() and (table.lengths == whole.lengths)[needs_nothing].all()
    assert (table.lengths[table.status == OK] <= 24).all() and (table.views[table.status == OK] <= 2).all()
    usable = table.status == OK
    assert (table.lengths + table.cut == whole.lengths)[usable].all() and table.cut_count == (table.cut > 0).sum() > 0
    assert [note.index for note in table.notes] == np.flatnonzero(table.status == REJECTED).tolist()
    assert all(f"record {note.index} " in note.sentence for note in table.notes)
    by_reason = {reason: [n.index for n in table.notes if n.reason == reason] for reason in table.reasons()}
    assert by_reason.keys() == {"too_long", "too_many_images", "nothing_to_learn"}
    assert (
        by_reason["nothing_to_learn"] == [7]
        and 9 in by_reason["too_long"]
        and whole.reasons() == {"nothing_to_learn": 1}
    )
    assert (whole.views[by_reason["too_many_images"]] > 2).all() and (whole.lengths[by_reason["too_long"]] > 24).all()
    assert table.without_loss == 1 + len(by_reason["too_long"])


def test_too_many_unusable_records_stop_the_run_in_one_sentence(tmp_path):
    records = make_records(write_images(tmp_path), 60, most_images=3)
    layout = Layout(encode, TINY, 24, 2)
    notes = measure(records, layout).notes
    measure(records, layout, Limits(max_share=len(notes) / 60), "mine.json")
    with pytest.raises(DataError) as error:
        measure(records, layout, Limits(max_share=(len(notes) - 1) / 60), "mine.json")
    said = str(error.value)
    assert said.startswith(f"{len(notes)} of 60 records (") and f"data.max_bad_share={(len(notes) - 1) / 60:g}" in said
    assert " too_many_images" in said and f"in mine.json; the first: {notes[0].sentence}" in said

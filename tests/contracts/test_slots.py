"""Contract 2: one function owns image size -> slots; no image is ever cut, and rejected samples are counted."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_data import ANYRES, TINY, encode, make_records, write_images
from vlm_jax.config import IGNORE, IMAGE, ConfigError, VisionConfig, VLMConfig
from vlm_jax.data.manifest import OK, REJECTED, Layout, TooLong, measure
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
        assert str(error).startswith("record 0") and str(limit) in str(error)
        return
    assert len(slots) <= limit and slots.weights.sum() > 0
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


def test_rejected_samples_are_counted(tmp_path):
    records = make_records(write_images(tmp_path), 60, most_images=3)
    table = measure(records, Layout(encode, TINY, 24, 2), max_bad=0)
    whole = measure(records, Layout(encode, TINY, 10**6, 10), max_bad=0)
    assert table.count(REJECTED) > 0 and table.count(REJECTED) + table.count(OK) == 60
    needs_nothing = (whole.lengths <= 24) & (whole.views <= 2)
    assert (table.status[needs_nothing] == OK).all() and (table.lengths == whole.lengths)[needs_nothing].all()
    assert (table.lengths[table.status == OK] <= 24).all() and (table.views[table.status == OK] <= 2).all()
    assert [i for i, status, sentence in table.notes] == np.flatnonzero(table.status == REJECTED).tolist()
    assert all(f"record {i} " in sentence for i, _, sentence in table.notes)

"""Drawing smart-watches and writing them as a data set."""

import collections
import dataclasses
import json
import random

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import UserError
from vlm_jax.data.smartwatch import CENTRE, CORNERS, WEATHERS, Watch, render, sample_watch
from vlm_jax.data.smartwatch_files import FEW, WatchSet, draw_all, generate
from vlm_jax.data.smartwatch_icons import SIZE as ICON
from vlm_jax.data.smartwatch_icons import icon
from vlm_jax.data.smartwatch_text import ATTRIBUTES, answer

WATCH = Watch(3, 0, 30, (250, 10, 10), "sunny", 50, "top-left", "bottom-right")


def pixels(**changes):
    return np.array(render(dataclasses.replace(WATCH, **changes)))


@pytest.mark.parametrize("weather", WEATHERS)
def test_icon_fills_its_box_and_differs_from_the_others(weather):
    own = np.array(icon(weather))
    assert own.shape == (ICON, ICON, 4) and own[..., 3].max() == 255 and own[0, 0, 3] < 255
    for other in set(WEATHERS) - {weather}:
        assert (own != np.array(icon(other))).mean() > 0.2


def test_every_attribute_changes_only_its_place():
    base = pixels()
    battery = (pixels(battery=90) != base).any(-1)
    x, y = CORNERS[WATCH.battery_pos]
    assert battery[y : y + 14, x:].any()
    battery[y : y + 14, x:] = False
    assert not battery.any()
    dial = (pixels(second=0) != base).any(-1)
    rows, columns = np.nonzero(dial)
    assert np.hypot(rows - CENTRE, columns - CENTRE).max() < 89


def test_bright_noise_saturates_and_does_not_wrap():
    noisy = pixels(material="noise", material_color=(250, 250, 250))
    assert noisy[150, 150].min() >= 250
    mesh = pixels(material="mesh", material_color=(0, 0, 200))
    assert mesh[151, 151].tolist() == [255, 255, 255] and mesh[150, 151].tolist() == [0, 0, 200]


@pytest.mark.parametrize("changes", [{"material": "wood"}, {"weather": "snowing"}])
def test_unknown_choices_are_refused_by_name(changes):
    with pytest.raises(UserError, match=next(iter(changes.values()))):
        pixels(**changes)


def test_rounds_ask_every_attribute_once_with_its_answer():
    watches, records = draw_all(WatchSet(5, seed=3, wordings=2))
    for watch, record in zip(watches, records, strict=True):
        turns = record["conversations"]
        assert sorted(t["value"] for t in turns[1::2]) == sorted(answer(watch, a) for a in ATTRIBUTES)
        assert [t["value"].startswith("<image>\n") for t in turns[::2]] == [True] + [False] * 4


def test_published_set_has_three_tasks_per_image():
    _, records = draw_all(WatchSet(4, style="published"))
    assert [r["task"] for r in records] == ["generation", "vqa", "caption"] * 4
    assert [r["image"] for r in records[::3]] == [f"{i}.png" for i in range(4)]


def test_generate_goes_on_where_it_stopped(tmp_path):
    settings = WatchSet(6, seed=1)
    records = generate(tmp_path, settings, processes=1, progress=False)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}
    assert len(first) == 6 and len(json.loads(records.read_text())) == 6
    records.unlink()
    (tmp_path / "images" / "2.png").unlink()
    generate(tmp_path, settings, processes=1, progress=False)
    again = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "images").iterdir()}
    assert {n for n in first if again[n] != first[n]} == {"2.png"}
    watch = draw_all(settings)[0][2]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "images" / "2.png")), np.array(render(watch, seed=2)))


def test_processes_draw_what_one_draws(tmp_path):
    settings = WatchSet(FEW, seed=2)
    generate(tmp_path, settings, processes=2, progress=False)
    watches, _ = draw_all(settings)
    for i in (0, 100, FEW - 1):
        np.testing.assert_array_equal(
            np.array(Image.open(tmp_path / "images" / f"{i}.png")), np.array(render(watches[i], seed=i))
        )


def test_a_folder_of_another_set_is_refused(tmp_path):
    generate(tmp_path, WatchSet(1), processes=1, progress=False)
    with pytest.raises(UserError, match="name another folder"):
        generate(tmp_path, WatchSet(2), processes=1, progress=False)


def test_attributes_are_spread_evenly():
    rng = random.Random(0)
    watches = [sample_watch(rng) for _ in range(3000)]
    corners = collections.Counter((w.weather_pos, w.battery_pos) for w in watches)
    assert len(corners) == 12 and max(corners.values()) < 2 * min(corners.values())
    assert {w.hour for w in watches} == set(range(13)) and {w.battery for w in watches} == set(range(101))


def test_another_style_shows_the_same_watches(tmp_path):
    plain, style = (
        WatchSet(3, seed=4),
        WatchSet(3, seed=4, material="mesh", hands=((255, 0, 0), (0, 255, 0), (0, 0, 255))),
    )
    (old, said), (new, says) = draw_all(plain), draw_all(style)
    assert said == says and [w.time for w in old] == [w.time for w in new]
    assert (new[0].hour_color, new[0].second_color, new[0].material) == ((255, 0, 0), (0, 0, 255), "mesh")
    one = draw_all(WatchSet(1, hands=((9, 8, 7),)))[0][0]
    assert one.hour_color == one.minute_color == one.second_color == (9, 8, 7)
    for wrong in ((), ((0, 0, 0),) * 2, ((0, 0, 256),), ((0, 0),)):
        with pytest.raises(UserError, match="must be one colour .* or three of them"):
            WatchSet(1, hands=wrong)
    folder = generate(tmp_path, WatchSet(1), processes=1, progress=False).parent
    settings = json.loads((folder / "settings.json").read_text())
    del settings["hands"]  # as sets were written when all hands were white
    (folder / "settings.json").write_text(json.dumps(settings))
    assert generate(tmp_path, WatchSet(1), processes=1, progress=False).exists()
    with pytest.raises(UserError, match="name another folder or delete it"):
        generate(tmp_path, WatchSet(1, hands=((0, 0, 0),)), processes=1, progress=False)

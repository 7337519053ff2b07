"""The benchmarks of VQAScore on small folders in their published formats: what is asked, the numbers, and files that are not right."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_model
from vlm_jax.__main__ import main
from vlm_jax.config import UserError
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.images import open_image
from vlm_jax.evaluate import vqascore_preferences, vqascore_ratings
from vlm_jax.evaluate.vqascore import QUESTION, VQAScore
from vlm_jax.evaluate.vqascore_files import ImageGrid
from vlm_jax.evaluate.vqascore_metrics import optimise_ties, preferences
from vlm_jax.evaluate.vqascore_sets import BENCHMARKS, open_set, run, table

SQUARE = ("image_0", "image_1", "caption_0", "caption_1")


class Shades:
    """A Scorer that finds a text, which is a shade between 0 and 1, the more probable the closer the image's colour is to it."""

    def picture(self, image):
        return np.asarray(open_image(image)).mean() / 255

    def score_answers(self, pictures, questions, answers):
        shades = [float(q.split('"')[1].rstrip("?").split()[0]) for q in questions]
        return [np.log(np.float32([1.001 - abs(p - s)])) for p, s in zip(pictures, shades)]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def draw(folder, *shades):
    """One image for every (name, shade)."""
    for name, shade in shades:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (round(255 * shade),) * 3).save(folder / name)


def numbers(name, folder):
    result = run(open_set(name, folder), VQAScore(Shades()))
    assert json.dumps(result) and len(table(result).splitlines()) == 1 + len(result["numbers"])
    return result["numbers"]


def squares(folder, images="", between="_"):
    """Three items of two images and captions: right, tied, right."""
    draw(folder, *((f"{images}{k}.png", k / 10) for k in range(11)))
    rows = [("1.png", "9.png", "0.1", "0.9"), ("5.png", "5.png", "0.5", "0.5"), ("6.png", "9.png", "0.4", "0.9")]
    return [dict(zip((k.replace("_", between) for k in SQUARE), row)) for row in rows]


def test_winoground(tmp_path):
    rows = squares(tmp_path, "images/")
    lines = [
        f"{i},images/{r['image_0']},images/{r['image_1']},{r['caption_0']},{r['caption_1']}" for i, r in enumerate(rows)
    ]
    write(tmp_path, "metadata.csv", "\n".join(["id,image_0,image_1,caption_0,caption_1", *lines]))
    examples = [{"id": i, "num_main_preds": 1 + i // 2, "collapsed_tag": ("Object", "Both")[i % 2]} for i in range(3)]
    write(tmp_path, "examples.jsonl", "\n".join(map(json.dumps, examples)))
    write(tmp_path, "why_winoground_hard.json", {"0": [], "1": ["Ambiguous"], "2": ["Ambiguous", "Unusual"]})
    found = numbers("winoground", tmp_path)
    assert found["all"] == {"text": 2 / 3, "image": 2 / 3, "group": 2 / 3, "items": 3}
    assert found["Ambiguous"] == {"text": 0.5, "image": 0.5, "group": 0.5, "items": 2}
    assert found["No Tag"]["group"] == 1 and found["1 Main Pred"]["items"] == 2 and found["Object"]["group"] == 1
    write(tmp_path, "why_winoground_hard.json", {"7": []})
    with pytest.raises(UserError, match="about example 7, which metadata.csv does not have"):
        open_set("winoground", tmp_path)
    write(tmp_path, "metadata.csv", "id,image_0\n0,a.png")
    with pytest.raises(UserError, match="metadata.csv has no column image_1, caption_0, caption_1"):
        open_set("winoground", tmp_path)


def test_preferences_need_both_directions():
    scores = [[[0.6, 0.5], [0.7, 0.8]], [[0.5, 0.6], [0.4, 0.9]], [[0.9, 0.1], [0.2, 0.2]]]
    found = {kind: right.tolist() for kind, right in preferences(scores).items()}
    assert found == {"text": [True, False, False], "image": [False, True, True], "group": [False] * 3}


def test_eqben_and_naturalbench(tmp_path):
    rows = squares(tmp_path, "images/eqbensd/", between="")
    rows = [{k: f"eqbensd/{v}" if "image" in k else v for k, v in row.items()} for row in rows]
    draw(tmp_path, ("images/eqbenkubric_loc/0.png", 0), ("images/other/1.png", 1))
    rows.append({"image0": "eqbenkubric_loc/0.png", "image1": "other/1.png", "caption0": "1.0", "caption1": "0.0"})
    write(tmp_path, "all_select.json", rows)
    found = numbers("eqben", tmp_path)
    assert found["all"]["group"] == 0.5 and found["eqbensd"]["group"] == 2 / 3
    assert found["eqbenk"] == {"text": 0, "image": 0, "group": 0, "items": 1}
    write(tmp_path, "metadata.json", [{"index": i, **row} for i, row in enumerate(squares(tmp_path))])
    assert numbers("naturalbench", tmp_path)["all"]["group"] == 2 / 3


def test_sugarcrepe(tmp_path):
    draw(tmp_path, ("val2017/a.jpg", 0.2), ("val2017/b.jpg", 0.8))
    good = {"filename": "a.jpg", "caption": "0.2", "negative_caption": "0.8"}
    tied = {"filename": "b.jpg", "caption": "0.7", "negative_caption": "0.7"}
    bad = {"filename": "b.jpg", "caption": "0.1", "negative_caption": "0.9"}
    write(tmp_path, "add_obj.json", {"0": good, "1": tied})
    write(tmp_path, "add_att.json", {"0": bad})
    write(tmp_path, "swap_obj.json", {"0": good, "5": bad, "6": bad, "7": bad})
    found = numbers("sugarcrepe", tmp_path)
    accuracy = {name: row["accuracy"] for name, row in found.items()}
    assert accuracy == {"add_obj": 1, "add_att": 0, "swap_obj": 0.25, "add": 0.5, "swap": 0.25, "macro": 1.25 / 3}
    write(tmp_path, "swap_obj.json", {"0": {"filename": "a.jpg", "caption": ""}})
    with pytest.raises(UserError, match="entry 0 of .*swap_obj.json has an empty caption"):
        open_set("sugarcrepe", tmp_path)


def test_pickapic(tmp_path):
    draw(tmp_path, ("a.jpg", 0.0), ("b.jpg", 1.0))
    entries = [
        {"id": i, "caption": "1.0", "label_0": 0, "label_1": 1, "image_0": "a.jpg", "image_1": "b.jpg"}
        for i in range(500)
    ]
    for number in vqascore_preferences.PICKED[:20]:
        entries[number] |= {"label_0": 1, "label_1": 0}
    for number in vqascore_preferences.PICKED[20:30]:  # a tie of people is a choice of the second
        entries[number] |= {"label_0": 0.5, "label_1": 0.5}
    write(tmp_path, "test_captions.json", entries)
    assert numbers("pickapic", tmp_path) == {"all": {"accuracy": 0.8, "items": 100}}
    write(tmp_path, "test_captions.json", entries[:490])
    with pytest.raises(UserError, match="no entries with id 490, 493"):
        open_set("pickapic", tmp_path)


def test_tifa160(tmp_path):
    shades = {"coco_1_mini_dalle": 0.1, "coco_1_stable_diffusion_v1_5": 0.5, "coco_1_vq_diffusion": 0.9}
    draw(tmp_path, *((f"tifa160/{key}.jpg", shade) for key, shade in shades.items()))
    entries = {key: {"text_id": "coco_1", "image_path": f"{key}.jpg", "text": "1.0"} for key in shades}
    write(tmp_path, "tifa160.json", entries)
    head = "data_type,model_type,item_id,source_id,worker_id,question,answer\n"
    said = [("mini-dalle", 1), ("mini-dalle", 2), ("sd1dot5", 3), ("vq-diffusion", 5)]
    write(tmp_path, "dsg_tifa160_anns.csv", head + "".join(f"t,{m},i,coco_1,w,q,{a}\n" for m, a in said))
    found = numbers("tifa160", tmp_path)["all"]
    assert found["kendall_b"] == pytest.approx(1) and found["pairwise_accuracy"] == 1 and found["pearson"] > 99
    write(tmp_path, "dsg_tifa160_anns.csv", head + "t,sd9,i,coco_1,w,q,1\n")
    with pytest.raises(UserError, match="line 2 of .*model_type='sd9'"):
        open_set("tifa160", tmp_path)
    write(tmp_path, "dsg_tifa160_anns.csv", head + "t,sd1dot5,i,coco_1,w,q,1\n")
    with pytest.raises(UserError, match="no rating of coco_1_mini_dalle"):
        open_set("tifa160", tmp_path)


def test_seetrue(tmp_path):
    draw(tmp_path, *((f"images/{k}.png", k / 10) for k in range(5)))
    rows = [(0, 0, "drawbench"), (1, 1, "drawbench"), (2, 0, "drawbench"), (3, 1, "editbench"), (4, 0, "editbench")]
    lines = [f'{k}.png,"1.0, or so",{label},x,{source}' for k, label, source in rows]
    write(
        tmp_path,
        "SeeTRUE.csv",
        "image,text,label,original_dataset_id,dataset_source\n" + "\n".join(lines).replace(", or", " or"),
    )
    assert numbers("seetrue", tmp_path) == {
        "drawbench": {"auroc": 0.5, "items": 3, "positive": 1},
        "editbench": {"auroc": 0.0, "items": 2, "positive": 1},
    }
    assert list(numbers("drawbench", tmp_path)) == ["drawbench"]
    with pytest.raises(UserError, match="no line with dataset_source=coco_t2i"):
        open_set("coco_t2i", tmp_path)


@pytest.mark.parametrize(
    "name, file", [("flickr8k_expert", "flickr8k.json"), ("flickr8k_cf", "crowdflower_flickr8k.json")]
)
def test_flickr8k(tmp_path, name, file):
    draw(tmp_path, ("flickr8k/images/a.jpg", 0.5))
    said = [{"caption": f" {shade}  a  dog . ", "rating": rating} for shade, rating in [(0.5, 4), (0.8, 2.5), (0.9, 1)]]
    write(
        tmp_path,
        f"flickr8k/{file}",
        {"a": {"image_path": "images/a.jpg", "ground_truth": ["x"], "human_judgement": said}},
    )
    assert open_set(name, tmp_path).items[0].texts == ("0.5 a dog",)
    found = numbers(name, tmp_path)["all"]
    assert found["kendall_b"] == found["kendall_c"] == pytest.approx(1) and found["items"] == 3
    said[1]["rating"] = float("nan")
    write(tmp_path, f"flickr8k/{file}", {"a": {"image_path": "images/a.jpg", "human_judgement": said}})
    with pytest.raises(UserError, match=r"human_judgement\[1\] of entry a .* has rating=nan: it must be a number"):
        open_set(name, tmp_path)


def genai(folder, file, models, name):
    """Two prompts and two models; the better image has the better rating but for one."""
    write(folder, file, {
        "00000": {"prompt": "1.0", "models": {models[0]: [5, 5, 4], models[1]: [1, 1, 1]}},
        "00001": {"prompt": "0.0", "models": {models[0]: [3, 3, 3], models[1]: [2, 2, 2]}},
    })  # fmt: skip
    for model, shades in zip(models, ((0.9, 0.5), (0.1, 0.4))):
        draw(folder, *((name.format(model=model, number=n), shade) for n, shade in zip(("00000", "00001"), shades)))


def test_genai_image(tmp_path):
    models = ("SDXL_Base", "DALLE_3")
    genai(tmp_path, "genai_image.json", models, "{model}/{number}.jpeg")
    write(tmp_path, "genai_skills.json", {"counting": [0], "negation": [1], "none of these": [77]})
    assert [item.images[0].path[-18:] for item in open_set("genai_image", tmp_path).items[:2]] == [
        "DALLE_3/00000.jpeg", "DALLE_3/00001.jpeg",
    ]  # fmt: skip
    found = numbers("genai_image", tmp_path)
    assert found["counting"]["kendall_b"] == pytest.approx(1) and found["negation"]["kendall_b"] == pytest.approx(-1)
    assert found["all"]["items"] == 4 and found["DALLE_3"]["mean_score"] == pytest.approx((0.1 + 0.6) / 2, abs=0.01)
    (tmp_path / "DALLE_3/00001.jpeg").unlink()
    with pytest.raises(UserError, match="DALLE_3/00001.jpeg of entry 00001 .* does not exist"):
        open_set("genai_image", tmp_path)
    genai(tmp_path, "genai_image.json", ("unknown", "models"), "{model}/{number}.jpeg")
    with pytest.raises(UserError, match="no model of DALLE_3"):
        open_set("genai_image", tmp_path)


def test_genai_video(tmp_path):
    genai(tmp_path, "genai_video.json", ("Gen2", "Floor33"), "{model}/video_{number}_frame_0000.jpg")
    draw(tmp_path, ("Gen2/video_00000_frame_0001.jpg", 0.1))
    items = open_set("genai_video", tmp_path).items
    assert [len(item.images) for item in items] == [36] * 4
    assert {image.path[-8:] for image in items[2].images[1:]} == {"0001.jpg"}
    assert numbers("genai_video", tmp_path)["all"]["items"] == 4


def test_t2vscore(tmp_path):
    write(tmp_path, "t2vscore_alignment_score.json", {
        "0": {"prompt": "1.0", "models": {"gen2": [4.0], "floor33": [1.0], "pika": []}},
        "12": {"prompt": "0.0", "models": {"gen2": [2.0], "floor33": [3.0]}},
    })  # fmt: skip
    shades = {"gen2/video_0000": 0.9, "gen2/video_0012": 0.4, "floor33/video_0000": 0.1, "floor33/video_0012": 0.5}
    draw(tmp_path, *((f"t2vscore_images/{name}_frame_0000.jpg", shade) for name, shade in shades.items()))
    items = open_set("t2vscore", tmp_path).items
    shown = ["/".join(Path(item.images[0].path).parts[-2:]).removesuffix("_frame_0000.jpg") for item in items]
    assert shown == ["floor33/video_0000", "floor33/video_0012", "gen2/video_0000", "gen2/video_0012"]
    assert len(items) == 4 and len(items[0].images) == 36 and items[1].texts == ("0.0",)
    found = numbers("t2vscore", tmp_path)["all"]
    assert found["items"] == 4 and found["kendall_b"] == pytest.approx(2 / 3)
    (tmp_path / "t2vscore_images/gen2/video_0012_frame_0000.jpg").unlink()
    with pytest.raises(UserError, match="gen2 has no video_0012_frame_0000.jpg: cut the videos"):
        open_set("t2vscore", tmp_path)


def test_genai_ranking(tmp_path):
    points = {"00003": [5, 1, *[3] * 7], "00004": [2, 4, *[3] * 7]}
    write(tmp_path, "human_rating.json", {
        key: {"id": key, "prompt": "1.0", "models": {"DALLE_3": {str(i): [p] for i, p in enumerate(of, 1)}}}
        for key, of in points.items()
    })  # fmt: skip
    draw(tmp_path, *((f"DALLE_3/{key}_{i:02d}.jpeg", 1 - i / 10) for key in points for i in range(1, 10)))
    found = numbers("genai_ranking", tmp_path)
    assert found["DALLE_3"]["ranking_accuracy"] == 0.5 and found["DALLE_3"]["items"] == 2
    assert found["DALLE_3, perfect"] == {"ranking_accuracy": 1, "items": 1}
    assert found["DALLE_3, not perfect"] == {"ranking_accuracy": 0, "items": 1}


def test_stanfordt23d(tmp_path):
    shades = {"instant3d": 0.9, "mvdream": 0.3, "magic3d": 0.6, "shap-e": 0.0}
    ratings = {"instant3d": [5, 5], "mvdream": [2, 1], "magic3d": [3, 4], "shap-e": [5]}
    write(tmp_path, "stanfordt23d.json", {"7": {"prompt": "1.0", "models": ratings}})
    views = vqascore_ratings.VIEWS
    draw(tmp_path, *((f"{m}/7/0/rgb_{v}.jpg", s) for m, s in shades.items() for v in views))
    found = numbers("stanfordt23d", tmp_path)
    assert found["published"]["kendall_b"] == pytest.approx(1) and found["published"]["items"] == 3
    assert found["all"]["items"] == 4 and found["all"]["kendall_b"] < 1
    grid = open_set("stanfordt23d", tmp_path).items[0].images[0]
    assert open_image(grid).size == (24, 18) and len(grid.parts) == 9
    (tmp_path / "mvdream/7/0/rgb_28.jpg").unlink()
    with pytest.raises(UserError, match="mvdream/7 of entry 7"):
        open_set("stanfordt23d", tmp_path)


def test_a_grid_is_filled_row_after_row(tmp_path):
    draw(tmp_path, *((f"{k}.png", k / 5) for k in range(4)))
    grid = ImageGrid("grid", parts=tuple(str(tmp_path / f"{k}.png") for k in range(4)), columns=2)
    corners = np.asarray(open_image(grid))[[2, 2, 8, 8], [3, 11, 3, 11], 0]
    np.testing.assert_allclose(corners, [0, 51, 102, 153], atol=3)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ("[]", "holds no entries"),
        ("[3]", "entry 0 of .* is a number: it must be an object"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    if content is not None:
        write(tmp_path, "metadata.json", content)
    with pytest.raises(UserError, match=words):
        open_set("naturalbench", tmp_path)


def test_every_benchmark_names_what_is_missing(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(UserError, match=str(tmp_path)):
            open_set(name, tmp_path)


def test_commands(tmp_path, capsys):
    model = str(tiny_model.write(tmp_path, [tiny_model.WORDS + " " + QUESTION + " Yes No"]))
    write(tmp_path, "metadata.json", squares(tmp_path))
    flags = ["--model", model, "--out", str(tmp_path / "out.json"), "--batch", "4"]
    task = ["evaluate", *flags, "--task", "naturalbench", "--data", str(tmp_path)]
    assert main([*task, "--limit", "1"]) == 2 and "--limit=1 would" in capsys.readouterr().err
    assert main(task) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["numbers"]["all"]["items"] == 3 and len(result["answers"]) == 3
    assert "group" in capsys.readouterr().out
    images = [str(tmp_path / f"{k}.png") for k in (1, 9)]
    pairs = ["--image", images[0], "--image", images[1], "--text", "0.1", "--text", "0.9"]
    assert main(["score", *flags, *pairs]) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "out.json").read_text())
    assert shown[:2] == ["[1] 0.1", "[2] 0.9"] and len(shown) == 5
    assert np.shape(result["scores"]) == (2, 2) and f"{result['scores'][1][0]:.6f}" in shown[4]
    assert result["images"] == images and result["question"] == QUESTION
    assert main(["score", *flags, *pairs, "--out", str(tmp_path / "out.csv"), "--mode", "yes_no"]) == 0
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "image,0.1,0.9" and lines[1].startswith(images[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "score needs images and texts: --images"),
        (("--images", "a.png", "--texts"), "score needs images and texts"),
        (("--images", "a.png", "b.png", "--texts", "a", " "), "text 2 of 2 is empty"),
        (("--text", "a", "--image", "none.png"), "none.png does not exist"),
        (("--text", "a", "--image", "a.png", "--out", "x.txt"), "must end in .json or .csv"),
        (("--text", "a", "--image", "a.png", "--mode", "best"), "--mode='best' is unknown"),
    ],
)
def test_wrong_flags(arguments, words, capsys):
    assert main(["score", "--model", "nowhere", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_sources_are_compared_by_what_they_show():
    assert ImageGrid("a", parts=("x",)) != ImageGrid("a", parts=("y",)) and ImageSource("a") != ImageGrid("a")


def test_a_sample_of_the_pairs_is_close_to_all():
    rng = np.random.default_rng(0)
    human = rng.integers(1, 6, 300)
    score = human + rng.normal(0, 1.5, 300).round(1)
    whole, part = optimise_ties(human, score), optimise_ties(human, score, sample=20_000)
    assert part != whole and part.value == pytest.approx(whole.value, abs=0.02)
    assert optimise_ties(human, score, sample=10**6) == whole

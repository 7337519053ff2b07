"""The commands `data check`, `data build` and `data show`, as a person types them over a folder that is not in order."""

import ast
import base64
import dataclasses
import functools
import html.parser
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.messy_data import ANSWERS, write_messy
from tests.tiny_tokenizers import t5_directory
from vlm_jax import recipe as recipes
from vlm_jax.__main__ import COMMANDS, main, parse
from vlm_jax.data import check, check_report, show
from vlm_jax.data.dataset import open_rows
from vlm_jax.data.epochs import Packing
from vlm_jax.data.images import REASONS, Preprocess, load_views
from vlm_jax.data.manifest import BAD, Layout
from vlm_jax.data.options import Source
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.train.data_command import open_data

ROOT = Path(__file__).resolve().parent.parent
UNUSABLE = {  # reason -> numbers of the records in photos.json
    "missing": [15, 16, 17],
    "broken": [18],
    "not_an_image": [19],
    "empty": [20],
    "no_conversations": [21],
    "image_count": [22, 23],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_messy(tmp_path_factory.mktemp("messy"))


def command(folder, *arguments):
    """The exit code of `vlm_jax data NAME ...` over the recipe of the folder."""
    return main(["data", arguments[0], f"--config={folder / 'recipe.py'}", *arguments[1:]])


def recipe_of(folder, **data):
    recipe = recipes.from_config(parse("train", ["--config", str(folder / "recipe.py")])["config"])
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))


def rows_of(recipe, cache):
    return open_rows(recipe.data, recipe.model, load_tokenizer(recipe.data.tokenizer), cache=cache)


@pytest.fixture(scope="module")
def checked(folder, tmp_path_factory):
    """(exit code, folder of the report, folder of the run) of `data check`."""
    run = tmp_path_factory.mktemp("run")
    return command(folder, "check", f"--out={run / 'report'}", f"--config.output={run}"), run / "report", run


def test_the_commands_are_listed_and_named(capsys):
    assert main(["data"]) == main(["data", "--help"]) == 0
    said = capsys.readouterr().out
    listed = [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ")]
    assert listed == 2 * [name for name in COMMANDS if name.startswith("data ")] and len(listed) == 6
    assert main(["data", "chekc"]) == 2 and "'data chekc' is no command" in capsys.readouterr().err
    assert main(["data", "show"]) == 2 and "data show needs --config" in capsys.readouterr().err


def test_check_counts_what_is_there(checked):
    code, report, _ = checked
    found = json.loads((report / "check.json").read_text())
    assert code == 0 and (found["records"], found["usable"], found["problem"]) == (30, 20, "")
    photos, chat = found["sources"]["photos"], found["sources"]["chat"]
    assert (photos["records"], photos["usable"], photos["images"]) == (24, 15, 16)
    assert photos["unusable"] == {reason: len(numbers) for reason, numbers in UNUSABLE.items()}
    assert photos["duplicate_ids"] == {"ids": 1, "records": 2, "first": [{"id": "3", "records": [3, 14]}]}
    assert (chat["usable"], chat["unusable"], chat["images"]) == (5, {"not_json": 1}, 0)
    assert found["images"] == {"read": 18, "broken": 5, "per_sample": {"0": 5, "1": 14, "2": 1}}
    assert (found["samples_without_loss"], found["cut_samples"]) == (0, 1) and found["slots_cut_off"] > 400
    missing = found["unusable"]["missing"]
    assert (missing["records"], missing["files"]) == (3, 2)
    assert [name.rsplit("/", 2)[1:] for name in missing["first"]] == [["coco", "lost.jpg"], ["vg", "gone.png"]]


def test_check_names_every_bad_record(checked):
    bad = [json.loads(line) for line in (checked[1] / "bad.jsonl").read_text().splitlines()]
    assert {one["record"]: one["reason"] for one in bad if one["source"] == "photos"} == {
        number: reason for reason, numbers in UNUSABLE.items() for number in numbers
    }
    for one in bad:
        assert one["sentence"].count("\n") == 0 and f"record {one['record']}" in one["sentence"]
        assert all(file in one["sentence"] for file in one["files"])
        assert bool(one["files"]) == (one["reason"] in ("missing", "broken", "not_an_image", "empty"))


def test_check_tells_what_an_epoch_costs(folder, checked):
    found = json.loads((checked[1] / "check.json").read_text())
    rows = rows_of(recipe_of(folder), checked[2] / "cache")
    batch = [rows[k] for k in range(len(rows))]
    slots, loss = (sum(int((row[key] > 0).sum()) for row in batch) for key in ("segments", "weights"))
    assert found["epoch"]["samples"] == 20 and found["epoch"]["of_source"] == {"photos": 15, "chat": 5}
    assert (found["epoch"]["slots"], found["epoch"]["supervised_tokens"]) == (slots, loss)
    assert found["epoch"]["image_views"] == 16
    own = next(f for f in found["packing"] if f["row_length"] == 768)
    assert (own["views"], own["rows"]) == (4, len(rows))
    assert own["slots_used"] == pytest.approx(slots / (768 * len(rows)))
    assert own["views_used"] == pytest.approx(16 / (4 * len(rows)))
    assert [f["row_length"] for f in found["packing"]] == [768, 2048, 4096, 8192]


def test_check_draws_histograms(checked):
    for name in ("lengths.png", "images.png"):
        with Image.open(checked[1] / name) as image:
            assert image.format == "PNG" and image.width > 400
            assert len(set(image.convert("RGB").get_flattened_data())) > 10


def test_training_after_a_check_measures_only_what_was_broken(folder, checked, monkeypatch):
    measured, before = [], Layout.measure
    monkeypatch.setattr(
        Layout, "measure", lambda self, r, a, b: measured.append((len(r), a, b)) or before(self, r, a, b)
    )
    rows = rows_of(recipe_of(folder), checked[2] / "cache")
    bad = sorted(n for numbers in UNUSABLE.values() for n in numbers)
    assert sorted(measured) == [(6, 5, 6), *((24, n, n + 1) for n in bad)], "an image may have been repaired"
    assert rows.manifest.count(BAD) == 10, "also the image that only decoding finds broken"
    for k in range(len(rows)):
        assert rows[k]["segments"].max() == len(rows.records_of(k)), "nothing is found broken any more"
    assert not rows.broken


def test_every_reason_has_words():
    given = set(REASONS)
    for path in (ROOT / "vlm_jax" / "data").glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if getattr(call.func, "id", "") in ("RecordError", "ImageError", "TooLong"):
                reasons = [k.value for k in call.keywords if k.arg == "reason"] + call.args[1:2]
                given |= {reason.value for reason in reasons if isinstance(reason, ast.Constant)}
    assert len(given) > 20 and given <= set(check_report.WORDS)


def test_a_check_that_does_not_decode_finds_less(folder, tmp_path, capsys):
    for how, usable, looked in (("header", 16, [18, 4]), ("skip", 18, [18, 2])):
        assert (
            command(folder, "check", f"--images={how}", f"--out={tmp_path}", f"--config.output={tmp_path / how}") == 0
        )
        found = json.loads((tmp_path / "check.json").read_text())
        assert found["sources"]["photos"]["usable"] == usable
        assert [found["images"]["read"], found["images"]["broken"]] == looked
    assert command(folder, "check", "--images=guess") == 2
    assert "--images='guess' is unknown: use one of decode, header, skip" in capsys.readouterr().err


def test_check_refuses_what_training_refuses_and_still_reports(folder, tmp_path, capsys):
    assert command(folder, "check", f"--config.output={tmp_path}", "--config.data.max_bad_share=0.1") == 2
    said = capsys.readouterr()
    assert "1 of 6 records (16.7%)" in said.err and "data.max_bad_share=0.1" in said.err and said.err.count("\n") == 1
    assert "damaged image file: " in said.out and (tmp_path / "data" / "check.json").is_file()
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    given = ["--config=configs/llava15.py:smoke", "--config.data.generated_watches=0", f"--config.output={tmp_path}"]
    given += [f"--config.data.path=('{tmp_path / 'bad.jsonl'}',)", f"--config.data.tokenizer={folder / 'tokenizer'}"]
    assert main(["data", "check", *given]) == 2
    said = capsys.readouterr()
    assert "1 of 1 records (100.0%) cannot be trained on" in said.err and "1 records, 0 usable" in said.out


def test_without_weights_the_recipe_says_how_large_images_are(folder, tmp_path, capsys):
    given = ["--config.data.tokenizer=", f"--config.init.llm={folder / 'tokenizer'}", f"--config.output={tmp_path}"]
    assert command(folder, "check", *given) == 0
    assert "the weights cannot be read" in capsys.readouterr().err


def test_other_processes_can_look_at_images(folder):
    layout, _ = open_data(parse("train", ["--config", str(folder / "recipe.py")])["config"]).layout()
    decode = functools.partial(load_views, how=Preprocess.of(layout.config))
    looking = dataclasses.replace(layout, look=check.Gallery("decode", decode).look)
    assert pickle.loads(pickle.dumps(looking)).limit == layout.limit


def built(capsys, folder, out, *arguments):
    """Sources of the recipe that `data build` prints."""
    assert command(folder, "build", f"--out={out}", *arguments) == 0
    said = capsys.readouterr().out
    return said, eval(f"dict({said.split('train on it with', 1)[1].strip()})", {"Source": Source})["sources"]


def test_training_on_what_was_built_gives_the_same_rows(folder, checked, tmp_path, capsys):
    said, sources = built(capsys, folder, tmp_path / "built", "--shards=2", f"--config.output={tmp_path}")
    assert (
        "3 image file is missing" in said
        and "lost.jpg" in said
        and "15 records and 16 images of photos in 2 files" in said
    )
    assert not list((tmp_path / "built").glob("*.partial"))
    before = rows_of(recipe_of(folder), checked[2] / "cache")
    after = rows_of(recipe_of(folder, sources=sources), tmp_path / "cache")
    assert len(before) == len(after) > 1 and not after.manifest.notes
    for k in range(len(before)):
        a, b = before[k], after[k]
        assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def test_build_keeps_what_a_mixture_needs_and_never_overwrites(folder, tmp_path, capsys):
    _, sources = built(capsys, folder, tmp_path, "--flatten=pairs", f"--config.output={tmp_path / 'run'}")
    assert sources["photos"] == Source(path=str(tmp_path / "photos-*.array_record"))
    manifest = rows_of(recipe_of(folder, sources=sources), tmp_path / "cache").manifest
    rounds = [1 + k % 3 for k in range(8)] + [1] * 5 + [2, 1] + [1, 2, 3, 4, 1]
    assert manifest.usable.size == sum(rounds)
    assert command(folder, "build", f"--out={tmp_path}", f"--config.output={tmp_path / 'run'}") == 2
    assert "is there already" in capsys.readouterr().err


def test_captions_become_requests_to_draw(folder, tmp_path, capsys):
    out = tmp_path / "requests.json"
    task = ("--task=generation", f"--out={out}", f"--config.output={tmp_path}")
    assert command(folder, "build", *task, "--count=3", "--start=1", "--seed=5") == 0
    said = capsys.readouterr().out
    made = json.loads(out.read_text())
    assert "3 requests" in said and [one["image"] for one in made] == ["coco/1.jpg", "coco/2.jpg", "coco/3.jpg"]
    assert all(one["task"] == "generation" for one in made)
    for k, one in enumerate(made, start=1):
        request, reply = (turn["value"] for turn in one["conversations"])
        assert request.endswith(f": {ANSWERS[k % 3]}") and reply.endswith("<image>")
    source = Source(path=str(out), image_folder=str(folder / "images"))
    rows = rows_of(recipe_of(folder, sources={"drawn": source}), tmp_path / "cache")
    assert rows.manifest.generated.tolist() == [1, 1, 1] and not rows.manifest.images.any()
    assert command(folder, "build", *task, "--start=1000") == 2
    assert "no record is left" in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """What is on a page of `data show`: the tokens of every sample, its images, facts, strips and links."""

    def __init__(self, text):
        super().__init__()
        self.samples, self.images, self.widths, self.links, self.ids = [], [], [], [], set()
        self.legend, self.text, self._open, self._in = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        self.ids.add(given.get("id"))
        if tag == "section":
            self.samples.append([])
        if tag == "img":
            self.images.append(given["src"])
        if tag == "a":
            self.links.append(given.get("href"))
            self.widths.append(float(given["style"].removeprefix("width:").removesuffix("%")))
        self._in = classes if "t" in classes else None
        if self._in and self.samples:
            self.samples[-1].append([set(classes) - {"t"}, "", int(given["title"].removeprefix("id "))])
        elif self._in:
            self.legend.append(classes[1])

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        self.text += data
        if self._in and self.samples:
            self.samples[-1][-1][1] += data


def page(folder, *arguments):
    assert command(folder, "show", *arguments, f"--out={folder / 'page.html'}") == 0
    return Page((folder / "page.html").read_text())


def said(tokens, kind):
    return "".join(text for classes, text, _ in tokens if kind in classes)


def test_the_page_shows_every_token_and_what_becomes_of_it(folder):
    shown = page(folder, "--n=9", "--source=photos", "--config.data.im_start_end=True")
    assert len(shown.samples) == 9 and shown.legend == ["supervised", "masked", "image", "special"]
    for tokens in shown.samples:
        assert {len(c & {"masked", "supervised", "image"}) for c, _, _ in tokens} == {1}
        answers = said(tokens, "supervised").removesuffix("</s>").split("</s>")
        assert all(answer.strip() in ANSWERS for answer in answers)
        masked = said(tokens, "masked")
        assert masked.startswith("<s>A chat between") and masked.count("USER:") == len(answers)
        assert masked.count("<im_start>") == masked.count("<im_end>") == sum("image" in c for c, _, _ in tokens) > 0
        assert "16 slots" in said(tokens, "image") and all(i == -200 for c, _, i in tokens if "image" in c)
        assert {t for c, t, _ in tokens if "special" in c} == {"<s>", "</s>", "<im_start>", "<im_end>"}
    assert "source photos" in shown.text and "Drawn too, but not trained on" in shown.text


def test_the_page_holds_the_images_as_the_model_sees_them(folder):
    shown = page(folder, "--n=15", "--source=photos")
    assert len(shown.images) == 16 and all(s.startswith("data:image/png;base64,") for s in shown.images)
    sizes = {Image.open(io.BytesIO(base64.b64decode(s.split(",", 1)[1]))).size for s in shown.images}
    assert sizes == {(56, 56)} and "131 × 64 pixels" in shown.text
    text = (folder / "page.html").read_text()
    assert "http://" not in text and "https://" not in text and "<script" not in text and "<link" not in text


def test_the_page_shows_how_samples_share_rows(folder):
    shown = page(folder, "--n=4", "--seed=3")
    links = [link for link in shown.links if link]
    assert sorted(links) == ["#s1", "#s2", "#s3", "#s4"] and {link[1:] for link in links} <= shown.ids
    assert len(shown.links) > 4 and 0 < sum(shown.widths) <= 100 * shown.text.count("in a row of 768 slots")
    alone = page(folder, "--n=4", "--config.data.order=shuffled")
    assert sorted(alone.links) == ["#s1", "#s2", "#s3", "#s4"] and alone.text.count("1 sample in a row") == 4


def test_what_is_cut_away_is_shown_as_such(folder):
    shown = page(folder, "--n=5", "--source=chat")
    cut = [tokens for tokens in shown.samples if said(tokens, "cut")]
    assert len(cut) == 1 and "Once upon a time." in said(cut[0], "cut") and "cut" in shown.legend
    assert sum(not c & {"cut"} for c, _, _ in cut[0]) == 384 and "tokens cut away: 505" in shown.text


def test_encoder_and_decoder_have_a_text_each(folder):
    (folder / "t5").mkdir()
    t5_directory(folder / "t5")
    shown = page(folder, "--n=6", "--config.data.template=t5_plain", f"--config.data.tokenizer={folder / 't5'}")
    assert shown.text.count("encoder reads") == shown.text.count("decoder says") == len(shown.samples) == 6
    assert "decoder: " in shown.text and "in a row of 384 slots" in shown.text
    for tokens in shown.samples:
        assert said(tokens, "supervised").removesuffix("</s>") in ANSWERS and "image 1" in said(tokens, "image")


def test_texts_of_tokens_join_to_the_text(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    text = "½ 猫 a  b\nUSER: </s> taxi 🙂"
    ids = tokenizer.encode(text)
    texts = show.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and texts[0] == "<s>" and "".join(texts[1:]).replace(" ", "") == text.replace(" ", "")
    assert "" in texts and "🙂" in texts, "a character is shown at the last of its bytes"


def test_nothing_to_show_is_said(folder, capsys):
    assert command(folder, "show", "--source=nobody") == 2
    assert "--source=nobody is unknown: there are chat, photos" in capsys.readouterr().err
    assert command(folder, "show", "--source=chat", "--config.data.template=plain") == 2
    assert "none of the 6 records that were drawn can be shown; the first: " in capsys.readouterr().err


def mixed(count=6000):
    """Lengths like those of LLaVA's mixture: text of some hundred tokens, mostly with one image of 576 slots."""
    rng = np.random.default_rng(0)
    views = (rng.random(count) < 0.94).astype(np.int64)
    lengths = np.minimum(rng.lognormal(np.log(300), 0.5, count).astype(np.int64) + 576 * views, 2048)
    return check.Samples(lengths, views, np.zeros(count, np.int64))


def test_a_row_length_that_fills_better_is_suggested():
    samples, how = mixed(), Packing(row_length=2048, view_budget=3)
    found = check.fillings(samples, how)
    assert [f.views for f in found] == [3, 6, 12]
    assert found[0].slots_used < found[1].slots_used < found[2].slots_used
    words = check.suggestion(found, samples, how)
    assert words.startswith(f"data.row_length=8192 with data.views_per_row=12 would fill {found[2].slots_used:.1%}")
    thirds = check.Samples(*(np.full(3000, n) for n in (1300, 1, 0)))  # 3 in 4096 slots, 6 in 8192
    assert check.suggestion(check.fillings(thirds, how), thirds, how).startswith("data.row_length=4096 with ")
    best = Packing(row_length=8192, view_budget=12)
    assert check.suggestion(check.fillings(samples, best), samples, best) == ""
    assert check.suggestion(found, samples, dataclasses.replace(how, max_samples=1)) == ""


def test_too_few_views_are_noticed():
    samples, how = mixed(), Packing(row_length=4096, view_budget=3)
    found = check.fillings(samples, how)
    words = check.suggestion(found, samples, how)
    assert words.startswith("data.views_per_row=") and 4 <= int(words.split("=")[1].split()[0]) <= 6
    hidden = dataclasses.replace(samples, views=np.where(np.arange(6000) < 10, 4, samples.views))
    assert check.fill(hidden, how, 4096, 3).left_out == 10

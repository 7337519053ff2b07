"""From images in class folders to pictures: tokenize, train a prior on the codes, stop and go on, imagine; each command reads what the
one before wrote."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.convert.prior import load_prior
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.visual_tokenizers import names

# tokenizer: pixels, words of the prior, what fits it to the tokenizer, what is asked of `imagine`
KINDS = {
    "vq": (8, "gpt_b,c2i,smoke", {"codes": 24, "classes": 2}, ["--classes=0,1", "--count=2"]),
    "rq": (
        8,
        "rq,smoke",
        {"codes": 24, "code_width": 8, "depth": 3, "conditions": 2, "condition_dropout": 0.1},
        ["--classes=0,1", "--count=2"],
    ),
    "hq": (16, "hq,smoke", {"codes": (24, 20), "condition": "none"}, ["--count=4"]),
}


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.long) for kind in ("vq", "rq")), "hq"])
def test_from_images_to_pictures(tmp_path, kind):
    size, words, prior, asked = KINDS[kind]
    rng, codes, run = np.random.default_rng(0), tmp_path / "codes.arrayrecord", tmp_path / "run"
    save_tokenizer(tmp_path / kind, TINY[kind], *names.read(TINY[kind], tensors(TINY[kind])))
    for number in range(8):
        file = tmp_path / "images" / ("ant" if number % 2 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(file)
    model, images = f"--model={tmp_path / kind}", f"--images={tmp_path / 'images'}"
    assert not main(["tokenize", model, images, f"--size={size}", f"--out={codes}", "--batch=8"])
    keys = {f"prior.{key}": value for key, value in prior.items()}
    keys |= {"init.tokenizer": tmp_path / "rq"} if kind == "rq" else {}
    keys |= {"data.generated": 0, "data.codes": f"({str(codes)!r},)", "output": run, "train.save_every": 1}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    for steps in (1, 2):  # the second goes on from the first
        assert main(["train", f"--config=configs/prior.py:{words}", *flags, f"--config.train.steps={steps}"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(0 <= line["accuracy"] <= 1 for line in lines)
    assert main(["convert", f"--from={run}", f"--to={tmp_path / 'copy'}"]) == 0
    assert len(load_prior(tmp_path / "copy").config.levels_of_codes) == (2 if kind == "hq" else 1)
    made = [*asked, f"--out={tmp_path / 'pictures'}", "--batch=8"]
    assert not main(["imagine", f"--prior={run}", f"--tokenizer={tmp_path / kind}", *made])
    said = json.loads((tmp_path / "pictures/samples.json").read_text())
    assert [one.get("class") for one in said["images"]] == ([None] * 4 if kind == "hq" else [0, 0, 1, 1])
    assert said["sampling"]["scale"] == (1.0 if kind == "hq" else 4.0)
    with Image.open(tmp_path / "pictures" / said["images"][3]["file"]) as picture:
        assert picture.size == (size, size)

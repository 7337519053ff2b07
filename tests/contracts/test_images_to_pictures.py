"""From images in class folders to pictures of a class: tokenize, train a prior on the codes, imagine; each command reads what the
one before wrote."""

import json

import numpy as np
from PIL import Image

from tests.tiny_visual_tokenizers import TINY, tensors
from vlm_jax.__main__ import main
from vlm_jax.convert.visual_tokenizer import save_tokenizer
from vlm_jax.visual_tokenizers import names


def test_from_images_to_pictures(tmp_path):
    rng, codes, run = np.random.default_rng(0), tmp_path / "codes.arrayrecord", tmp_path / "run"
    save_tokenizer(tmp_path / "vq", TINY["vq"], *names.read(TINY["vq"], tensors(TINY["vq"])))
    for number in range(8):
        file = tmp_path / "images" / ("ant" if number % 2 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    model, images = f"--model={tmp_path / 'vq'}", f"--images={tmp_path / 'images'}"
    assert not main(["tokenize", model, images, "--size=8", f"--out={codes}", "--batch=8"])
    keys = {"prior.codes": 24, "prior.classes": 2, "data.generated": 0, "data.codes": f"({str(codes)!r},)"}
    keys |= {"output": run, "train.steps": 2, "train.save_every": 2}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    assert main(["train", "--config=configs/prior.py:gpt_b,c2i,smoke", *flags]) == 0
    made = ["--classes=0,1", "--count=2", f"--out={tmp_path / 'pictures'}", "--batch=8"]
    assert not main(["imagine", f"--prior={run}", f"--tokenizer={tmp_path / 'vq'}", *made])
    assert [one["class"] for one in json.loads((tmp_path / "pictures/samples.json").read_text())["images"]] == [
        0,
        0,
        1,
        1,
    ]
    with Image.open(tmp_path / "pictures/00003_1.png") as picture:
        assert picture.size == (8, 8)

"""A data folder as people have it: two image folders, a few broken files, a few malformed records, and a recipe over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.tiny_tokenizers import llama_directory

RECIPE = """
import dataclasses
from vlm_jax.config import VLMConfig
from vlm_jax.data.options import DataConfig, Source
from vlm_jax.recipe import Recipe, config_dict
from vlm_jax.smoke import shrink

def get_config(words=""):
    small = shrink(Recipe(model=VLMConfig(), data=DataConfig()))
    data = dataclasses.replace(
        small.data, generated_watches=0, tokenizer="FOLDER/tokenizer", max_bad_share=0.5, sources={
            "photos": Source(path="FOLDER/photos.json", image_folder="FOLDER/images"),
            "chat": Source(path="FOLDER/chat.jsonl"),
        })
    return config_dict(dataclasses.replace(small, data=data, output="FOLDER/run"))
"""

QUESTIONS = ("What is shown in the image?", "Is it sunny?", "What colour is the taxi?")
ANSWERS = ("A man ironing clothes on the back of a taxi.", "No, it is snowing.", "The battery is at 62%.")


def picture(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> None:
    """Coloured shapes on a gradient."""
    rng = np.random.default_rng(seed)
    low, high = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(low, high, width)[None].repeat(height, 0).astype(np.uint8)
    image = Image.fromarray(ramp)
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, r = rng.integers(0, width), rng.integers(0, height), rng.integers(4, 5 + min(width, height) // 3)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path)


def dialogue(number: int, image=None, rounds: int = 1, text: str = "") -> dict:
    """A record in LLaVA's format; `text` is put before the first answer."""
    shown = "<image>\n" * (0 if image is None else len(image) if isinstance(image, list) else 1)
    turns = []
    for k in range(rounds):
        question = QUESTIONS[(number + k) % len(QUESTIONS)]
        turns.append({"from": "human", "value": (shown if k == 0 else "") + question})
        turns.append({"from": "gpt", "value": (text if k == 0 else "") + ANSWERS[(number + k) % len(ANSWERS)]})
    return {"id": str(number), **({"image": image} if image is not None else {}), "conversations": turns}


def write_messy(folder: Path) -> Path:
    """photos.json over coco/ and vg/ (24 records, 15 of them whole), chat.jsonl without images (6, one of them no JSON),
    tokenizer/ and recipe.py; returns `folder`.
    """
    images = folder / "images"
    for k in range(8):
        picture(images / "coco" / f"{k}.jpg", 40 + 13 * k, 64, k)
    for k in range(4):
        picture(images / "vg" / f"{k}.png", 50, 90 - 11 * k, 20 + k, ("RGB", "RGBA", "P", "L")[k])
    picture(images / "coco" / "print.jpg", 60, 40, 30, "CMYK")
    whole = (images / "coco" / "7.jpg").read_bytes()
    (images / "coco" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "coco" / "page.jpg").write_text("<!doctype html><title>404 Not Found</title>")
    (images / "vg" / "empty.png").write_bytes(b"")
    records = [dialogue(k, f"coco/{k}.jpg", 1 + k % 3) for k in range(8)]
    records += [dialogue(8 + k, f"vg/{k}.png") for k in range(4)]
    records += [dialogue(12, "coco/print.jpg"), dialogue(13, ["coco/1.jpg", "vg/2.png"], 2)]
    records += [dialogue(3, "coco/5.jpg")]  # the id of another record
    records += [dialogue(15, "coco/lost.jpg"), dialogue(16, "coco/lost.jpg"), dialogue(17, "vg/gone.png")]
    records += [dialogue(18, "coco/cut.jpg"), dialogue(19, "coco/page.jpg"), dialogue(20, "vg/empty.png")]
    records += [{"id": "21", "image": "coco/0.jpg"}]  # no conversations
    records += [dialogue(22, "coco/0.jpg")]
    records[-1]["conversations"][0]["value"] = "Where is the image?"  # an image without <image>
    records += [dialogue(23)]
    records[-1]["conversations"][0]["value"] = "<image>\n<image>\nWhich one?"  # <image> without images
    (folder / "photos.json").write_text(json.dumps(records, indent=1))
    lines = [json.dumps(dialogue(100 + k, None, 1 + k)) for k in range(4)]
    lines += [json.dumps(dialogue(104, None, 1, "Once upon a time. " * 60)), '{"id": "105", "conversations": [{"from"']
    (folder / "chat.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.py").write_text(RECIPE.replace("FOLDER", str(folder)))
    (folder / "tokenizer").mkdir()
    llama_directory(folder / "tokenizer")
    return folder

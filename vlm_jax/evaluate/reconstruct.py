"""`python -m vlm_jax reconstruct`: images beside what a visual tokenizer's codes keep of them.

    OUT/0000_NAME.png   original | (coarser pictures |) reconstruction
    OUT/index.html      all of them with PSNR and SSIM
    OUT/metrics.json    {"images": [{"id", "file", "psnr", "ssim"}, ...], "psnr", "ssim", "usage": {...}}

From codes alone there is no original, and nothing to measure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.config import ConfigError, UserError
from vlm_jax.data.code_records import Codes, CodesError, open_codes
from vlm_jax.data.code_views import Views
from vlm_jax.data.image_source import ImageError
from vlm_jax.evaluate import image_metrics
from vlm_jax.evaluate.reconstruction_page import Drawn, write_page
from vlm_jax.generate.tokenize import Item, named_images, views_of
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.parallel import hosts

GAP = 4  # white pixels between pictures

Levels = tuple[np.ndarray, ...]


class Coded(NamedTuple):
    """An image's first view, uint8 [S, S, 3] or None, and its codes, [1, h, w(, depth)] per level."""

    id: str
    original: np.ndarray | None
    codes: Levels


def reconstruct(
    model: str,
    out: str,
    images: Sequence[str] = (),
    codes: str = "",
    crop: str = "",
    size: int = 0,
    batch: int = 32,
    dtype: str = "float32",
    limit: int = 64,
    coarse: bool = False,
) -> None:
    """Write the pictures of `images`, or of `codes` (with their originals where `images` has them) to the folder `out`."""
    if not images and not codes:
        raise ConfigError("reconstruct needs --images, --codes or both")
    coder = VisualCoder.open(model, batch=batch, dtype=dtype)
    items = named_images(images) if images else []
    if codes:
        opened = open_codes(codes)
        if opened.about["hash"] != coder.hash:
            raise CodesError(
                f"{codes} was made by another tokenizer ({opened.about['model']}) than {model}: name that one"
            )
        rule = opened.about["crop"]
        views = Views(rule["rule"], rule["size"], rule.get("margin", 1.1))
        found = of_codes(opened, views, {item.id: item for item in items}, limit)
    else:
        views = views_of(coder.config, crop, size)
        if views.count > 1:
            raise ConfigError(
                f"--crop={views.rule} gives {views.count} views of an image: choose a rule that gives one"
            )
        found = of_images(items, views, coder, limit)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    counts = image_metrics.CodeCounts(coder.config.quantizer)
    drawn = list(draw(found, coder, folder, counts, coarse))
    if not drawn:
        raise UserError("none of the images can be used: the lines above say why")
    _write(folder, Path(model).name, views, drawn, counts.summary(), coarse)


def of_images(items: Sequence[Item], views: Views, coder: VisualCoder, limit: int) -> Iterator[Coded]:
    """Images with their codes; those that are broken are named and left out."""
    known: list[tuple[str, np.ndarray]] = []

    def loaded() -> Iterator[np.ndarray]:
        for item in items[: limit or None]:
            try:
                view = views.load(item.source)[0]
            except ImageError as error:
                hosts.say(str(error))
                continue
            known.append((item.id, view[0]))
            yield view

    for number, levels in enumerate(coder.encode_each(loaded())):
        yield Coded(*known[number], levels)
        known[number] = ("", None)  # its pixels are not needed any more


def of_codes(codes: Codes, views: Views, items: Mapping[str, Item], limit: int) -> Iterator[Coded]:
    """Codes of first views, with the originals where they are among the items."""
    for number in range(min(limit or len(codes), len(codes))):
        one, original = codes[number], None
        if one.id in items:
            original = views.load(items[one.id].source)[0][0]
        elif items:
            raise CodesError(
                f"the image {one.id} of the codes is not among --images: name the folder that the codes were made of"
            )
        yield Coded(one.id, original, tuple(level[:1] for level in one.codes))


def coarser(codes: Levels, kind: str) -> list[Levels]:
    """The same codes without their finest levels, or depths, the coarsest first."""
    if kind == "rq":
        return [(codes[0][..., :depth],) for depth in range(1, codes[0].shape[-1])]
    return [codes[:level] for level in range(1, len(codes))]


def draw(
    found: Iterator[Coded], coder: VisualCoder, folder: Path, counts: image_metrics.CodeCounts, coarse: bool
) -> Iterator[Drawn]:
    """Write the picture of each image; what was drawn, with its measures."""
    for start, group in _groups(found, coder.batch):
        levels = tuple(np.concatenate(level) for level in zip(*(one.codes for one in group)))
        counts.add(levels)
        shown = [coder.decode(part) for part in coarser(levels, coder.config.quantizer.kind)] if coarse else []
        pictures = coder.decode(levels)
        for k, one in enumerate(group):
            psnr = ssim = None
            if one.original is not None:
                pair = one.original[None], pictures[k][None]
                image_metrics.same_size(pair[0].shape[1:], pair[1].shape[1:], one.id)
                psnr = float(image_metrics.psnr(np.asarray(image_metrics.mse(*pair)))[0])
                ssim = float(np.asarray(image_metrics.ssim(*pair))[0])
            parts = [one.original] * (one.original is not None) + [*(x[k] for x in shown), pictures[k]]
            file = f"{start + k:04d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(one.id).stem)[-60:]}.png"
            Image.fromarray(side_by_side(parts)).save(folder / file)
            yield Drawn(one.id, file, psnr, ssim)


def _groups(found: Iterator[Coded], size: int) -> Iterator[tuple[int, list[Coded]]]:
    group: list[Coded] = []
    start = 0
    for one in found:
        group.append(one)
        if len(group) == size:
            yield start, group
            start, group = start + size, []
    if group:
        yield start, group


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [S, W, 3] of pictures [S, S, 3] with white between them."""
    white = np.full((len(pictures[0]), GAP, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (white, picture)][1:], axis=1)


def _write(folder: Path, model: str, views: Views, drawn: Sequence[Drawn], usage: dict[str, Any], coarse: bool) -> None:
    """index.html and metrics.json; the means go to the screen too."""
    means = {
        name: float(np.mean(values))
        if (values := [getattr(one, name) for one in drawn if one.psnr is not None])
        else None
        for name in ("psnr", "ssim")
    }
    listed = [one._asdict() for one in drawn]
    result = {"model": model, "crop": views.rule, "size": views.size, **means, "usage": usage, "images": listed}
    (folder / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    used = ", ".join(f"{name} {of['usage']:.1%} of {of['codes']:,}" for name, of in usage.items())
    facts = [f"{len(drawn):,} images of {views.size} x {views.size} pixels, crop {views.rule}"]
    facts += [f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f}"] if means["psnr"] is not None else []
    columns = ["original"] * (drawn[0].psnr is not None) + ["coarser codes alone"] * coarse + ["reconstruction"]
    write_page(
        folder / "index.html",
        f"Reconstructions by {model}",
        [*facts, f"codes in use: {used}"],
        " | ".join(columns),
        drawn,
    )
    print("; ".join(facts))
    print(f"codes in use: {used}")
    print(folder / "index.html")

"""The page of `data show`: one HTML file that needs no other file and no network; images are embedded as PNG."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_jax.data.show import Picture, Runs, Shown, Strip, Token

KINDS = {
    "supervised": "carries loss: the model has to say it",
    "masked": "is read, carries no loss",
    "image": "an image and the slots it takes",
    "generated": "an image that the model has to make",
    "special": "special token",
    "cut": "behind the end of the longest sample: cut away",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430; background: #f7f8fa; }
h1 { margin-bottom: 0; } h1 + p { margin-top: .3rem; color: #5a6675; }
h2 { font-size: 1.05rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 b { color: #2f7ed8; margin-right: .5rem; }
.panel { background: #fff; border: 1px solid #dde2e8; border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.facts { margin: 0 0 .8rem; color: #5a6675; } .facts b { color: #1c2430; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; padding: 0; margin: 0; list-style: none; font-size: .9rem; }
.sample { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; flex: 0 1 15rem; }
.pictures figure { margin: 0; }
.pictures img { display: block; width: 14rem; border: 1px solid #dde2e8; }
.pictures .tiles { display: flex; flex-wrap: wrap; gap: 3px; width: 15rem; }
.tiles img + img { width: 4.5rem; }
figcaption { font-size: .82rem; color: #5a6675; overflow-wrap: anywhere; max-width: 14rem; }
.texts { flex: 1 1 34rem; min-width: 0; } .texts h3 { font-size: .82rem; font-weight: 600; color: #5a6675; margin: 0 0 .2rem; }
.text { font: 13.5px/1.85 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; margin: 0 0 .8rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.t { padding: .12rem 0; border-radius: 2px; box-shadow: inset -1px 0 0 rgba(28, 36, 48, .13); }
.masked { color: #5a6675; background: #eef0f3; } .supervised { color: #0b5a2b; background: #c9ecd5; }
.image, .generated { background: #2f7ed8; color: #fff; padding: .12rem .5rem; border-radius: .3rem; }
.generated { background: #b3541e; }
.special { color: #6b3fa0; font-weight: 600; outline: 1px solid #b79bd9; outline-offset: -1px; padding-left: .2rem; padding-right: .2rem; }
.cut { color: #c22a2a; background: #fbe9e9; text-decoration: line-through; }
.nl::before { content: "\\21b5"; opacity: .55; } .empty::before { content: "\\00b7"; opacity: .55; }
.strip { display: flex; height: 1.9rem; background: #fff; border: 1px solid #b9c2cc; margin: .15rem 0 .7rem; }
.strip a { display: flex; position: relative; box-sizing: border-box; border-right: 2px solid #1c2430; overflow: hidden; }
.strip i { display: block; height: 100%; padding: 0; border-radius: 0; }
.strip .masked { background: #cdd3da; } .strip .supervised { background: #52b67a; }
.strip .other { background: repeating-linear-gradient(135deg, #e9ecf0 0 6px, #dfe4e9 6px 12px); }
.strip b { position: absolute; left: .3rem; top: .22rem; padding: 0 .35rem; border-radius: .25rem; font-size: .8rem; }
.strip b { color: #fff; background: rgba(28, 36, 48, .72); }
.skipped { color: #8a2222; } .skipped li { overflow-wrap: anywhere; }
"""


def write_page(
    path: Path, title: str, facts: str, shown: Sequence[Shown], strips: Sequence[Strip], skipped: Sequence[str]
) -> None:
    """The page of samples, whole or not at all. facts: one line about recipe and limits; skipped: why other records are not shown."""
    samples = "\n".join(_sample(number, one) for number, one in enumerate(shown, start=1))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(facts)}</p>
<div class="panel"><ul class="legend">{_legend(shown)}</ul></div>
{_rows(strips)}{samples}
{_skipped(skipped)}</body></html>
"""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _legend(shown: Sequence[Shown]) -> str:
    """The kinds that are on the page."""
    tokens = [token for one in shown for token in (*one.tokens, *(one.answer or ()))]
    present = {token.kind for token in tokens} | {"special" for token in tokens if token.special}
    items = [(kind, words) for kind, words in KINDS.items() if kind in present]
    return "".join(f'<li><span class="t {kind}">{kind}</span> {words}</li>' for kind, words in items)


def _sample(number: int, one: Shown) -> str:
    pictures = "".join(map(_picture, one.pictures))
    texts = _text(one.tokens)
    if one.answer is not None:
        texts = f"<h3>encoder reads</h3>{texts}<h3>decoder says</h3>{_text(one.answer)}"
    counts = {
        "slots": one.sizes.slots,
        "tokens with loss": one.supervised,
        "images": len(one.pictures),
        "tokens cut away": one.cut,
    }
    words = [f"source <b>{html.escape(one.source)}</b>", f"task <b>{html.escape(one.task)}</b>"]
    words += [f"{what}: <b>{count:,}</b>" for what, count in counts.items() if count]
    shown = f'<div class="pictures">{pictures}</div>' if pictures else ""
    return f"""<section class="panel" id="s{number}"><h2><b>{number}</b>{html.escape(one.where)}</h2>
<p class="facts">{" &middot; ".join(words)}</p>
<div class="sample">{shown}<div class="texts">{texts}</div></div></section>"""


def _picture(picture: Picture) -> str:
    views = "".join(f'<img alt="{html.escape(picture.name)}" src="{_png(view)}">' for view in picture.views)
    takes = f"{picture.slots:,} slots" if picture.slots else "to be generated"
    several = f", {len(picture.views)} views" if len(picture.views) > 1 else ""
    caption = f"{html.escape(picture.name)} &middot; {picture.size[0]} &times; {picture.size[1]} pixels &middot; {takes}{several}"
    return f'<figure><div class="tiles">{views}</div><figcaption>{caption}</figcaption></figure>'


def _text(tokens: Sequence[Token]) -> str:
    """One span per token; what is special or drawn by the style sheet alone (line ends, empty tokens) is a second class."""
    out, image = [], 0
    for token in tokens:
        classes = ["t", token.kind] + ["special"] * token.special
        text = html.escape(token.text)
        if token.kind in ("image", "generated"):
            image += 1
            text = f"image {image}" + (
                f" &middot; {token.slots:,} slots" if token.kind == "image" else " to be generated"
            )
        elif not text:
            classes.append("empty")
        elif "\n" in text:
            classes.append("nl")
        out.append(f'<span class="{" ".join(classes)}" title="id {token.id}">{text}</span>')
    return f'<div class="text">{"".join(out)}</div>'


def _rows(strips: Sequence[Strip]) -> str:
    """How the shown samples lie in their rows, among random others."""
    if not strips:
        return ""
    drawn = []
    for strip in strips:
        pieces = "".join(_piece(number, parts, strip.length) for number, parts in strip.pieces)
        drawn.append(f'<p class="facts">{_row(strip)}</p><div class="strip">{pieces}</div>')
    words = "How the samples below share rows, with random others (striped) when they are packed"
    return f'<div class="panel"><h2>Rows</h2><p class="facts">{words}</p>{"".join(drawn)}</div>\n'


def _row(strip: Strip) -> str:
    side = f"{strip.side}: " if strip.side else ""
    count = f"{len(strip.pieces)} samples" if len(strip.pieces) > 1 else "1 sample"
    return f"{side}{count} in a row of {strip.length:,} slots, {strip.filled:.0%} full"


def _piece(number: int, parts: Runs, length: int) -> str:
    total = sum(slots for _, slots in parts)
    inside = "".join(
        f'<i class="{kind}" style="width:{100 * slots / max(total, 1):.3f}%"></i>' for kind, slots in parts
    )
    label, link = (f"<b>{number}</b>", f' href="#s{number}"') if number else ("", "")
    return f'<a{link} style="width:{100 * total / length:.3f}%" title="{total:,} slots">{inside}{label}</a>'


def _skipped(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="panel skipped"><h2>Drawn too, but not trained on</h2><ul>{items}</ul></div>\n'


def _png(pixels: np.ndarray) -> str:
    """A data URI of uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

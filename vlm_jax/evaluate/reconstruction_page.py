"""The page of `reconstruct`: one HTML file beside its pictures, which needs no network."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1c2430; background: #f7f8fa; }
h1 { margin-bottom: 0; } p { margin: .3rem 0; color: #5a6675; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1.2rem; }
figure { margin: 0; background: #fff; border: 1px solid #dde2e8; border-radius: .5rem; padding: .7rem; max-width: 100%; }
img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #5a6675; overflow-wrap: anywhere; margin-top: .4rem; } figcaption b { color: #1c2430; }
"""


class Drawn(NamedTuple):
    """A picture: the image's name, the file beside the page, and its measures, None without an original."""

    id: str
    file: str
    psnr: float | None
    ssim: float | None


def write_page(path: Path, title: str, facts: Sequence[str], columns: str, drawn: Sequence[Drawn]) -> None:
    """Write the page, whole or not at all. columns: what the pictures show from left to right."""
    lines = "\n".join(f"<p>{html.escape(fact)}</p>" for fact in (*facts, columns))
    figures = "\n".join(map(_figure, drawn))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{lines}
<div class="pictures">
{figures}
</div></body></html>
"""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _figure(one: Drawn) -> str:
    measures = "" if one.psnr is None else f" &middot; <b>{one.psnr:.2f} dB</b> &middot; SSIM {one.ssim:.4f}"
    name = html.escape(one.id)
    return f'<figure><img loading="lazy" alt="{name}" src="{quote(one.file)}"><figcaption>{name}{measures}</figcaption></figure>'

"""What a finished quickstart shows: loss curves as a PNG, summary.json, and one HTML page that holds everything.

The page needs no other file and no network: pictures and curves are embedded as base64.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "weather": "weather", "weather_pos": "position of the weather", "battery_pos": "position of the battery",
    "battery_exact": "battery, exact", "time_exact": "time, exact to the second", "battery": "battery", "time": "time",
    "all": "all pairs", "best": "true caption above all others", "true": "VQAScore of true captions", "wrong": "of wrong ones",
}  # fmt: skip
SMOOTHING = 25  # updates averaged in the drawn curves

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2430; background: #f7f8fa; }
h1 { margin-bottom: 0; } h1 + p { margin-top: .3rem; color: #5a6675; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.panel { background: #fff; border: 1px solid #dde2e8; border-radius: .5rem; padding: 1rem; margin: 1rem 0; }
.summary { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; } .summary img { max-width: 100%; flex: 1 1 28rem; }
.summary tbody tr { border-top: 1px solid #edf0f3; } .bar { width: 9rem; height: .7rem; background: #e7ebef; position: relative; }
.bar i { position: absolute; inset: 0 auto 0 0; background: #2f7ed8; }
.bar b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; background: #1c2430; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: 1rem; }
.watch { display: flex; gap: .8rem; background: #fff; border: 1px solid #dde2e8; border-radius: .5rem; padding: .7rem; }
.watch img { width: 9.5rem; height: 9.5rem; border: 1px solid #edf0f3; image-rendering: auto; }
.watch dl { margin: 0; font-size: .85rem; line-height: 1.35; } dt { color: #5a6675; } dd { margin: 0 0 .35rem; font-weight: 600; }
.right { color: #12803c; } .wrong { color: #c22a2a; } .truth { font-weight: 400; color: #5a6675; }
"""


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """summary.json, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path, before: Sequence[Mapping[str, Any]] = ()) -> None:
    """PNG of loss and accuracy on supervised tokens by update.

    lines: a run's metrics (`step`, `loss`, `token_accuracy`); before: those of the run that it went on from, drawn to their left.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = before[-1]["step"] if before else 0
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, key, title in zip(axes, ("loss", "token_accuracy"), ("training loss", "accuracy on answer tokens")):
        for first, run in ((0, before), (done, lines)):
            steps, values = [first + line["step"] for line in run], [line[key] for line in run]
            axis.plot(steps, values, color="#b9d2ee", linewidth=0.8)
            axis.plot(steps, _smoothed(values), color="#2f7ed8", linewidth=1.8)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if done:
            axis.axvline(done, color="#5a6675", linewidth=0.8, linestyle="--")
    if all(line["loss"] > 0 for line in (*before, *lines)):
        axes[0].set_yscale("log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean of each value and the SMOOTHING - 1 before it."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - SMOOTHING] if i >= SMOOTHING else 0.0)
        out.append(total / min(i + 1, SMOOTHING))
    return out


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """(what, kind of number, value, chance) for each entry of a summary's accuracy and score."""
    chance, order = summary.get("chance", {}), list(NAMES)
    rows = [(key, kind, value) for kind in ("accuracy", "score") for key, value in summary[kind].items()]
    rows.sort(key=lambda row: order.index(row[0]) if row[0] in order else len(order))
    return [(NAMES.get(key, key), kind, value, chance.get(key)) for key, kind, value in rows]


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    images: Path,
    curves: Path,
    shown: int = 30,
) -> None:
    """report.html: summary, curves, and the first `shown` watches with every question or caption.

    answers: dicts with image, question, answer, truth, right and score, as evaluate.smartwatch gives them, or with image, caption,
    attribute, value and right, as evaluate.watch_claims does.
    """
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        by_image.setdefault(answer["image"], []).append(answer)
    ranked = bool(answers) and "caption" in answers[0]
    items = _captions if ranked else _questions
    watches = "\n".join(_watch(images / name, items(told)) for name, told in list(by_image.items())[:shown])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vlm_jax quickstart</title><style>{STYLE}</style></head><body>
<h1>A vision-language model, trained from nothing</h1>
<p>{_facts(summary)}</p>
<div class="panel summary"><div>{_table(summary)}<p class="truth">Black mark: what answering without looking would reach.</p></div>
<img alt="loss curves" src="{_embedded(curves)}"></div>
<h2>Held-out watches and {"VQAScores of their captions" if ranked else "the model's answers"}</h2>
<div class="grid">{watches}</div>
</body></html>
"""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


def _facts(summary: Mapping[str, Any]) -> str:
    return html.escape(
        f"{summary['parameters']:,} parameters, {summary['steps']:,} steps, {summary['training_seconds']:.0f} s of training at "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['data_stall']:.1%} of it waiting for data, "
        f"{summary['seconds']:.0f} s in total."
    )


def _table(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, kind, value, chance in summary_rows(summary):
        mark = "" if chance is None else f'<b style="left:{100 * chance:.1f}%"></b>'
        guess = "" if chance is None else f"{chance:.3f}"
        bar = f'<div class="bar"><i style="width:{100 * value:.1f}%"></i>{mark}</div>'
        rows.append(
            f'<tr><td>{html.escape(name)}</td><td>{kind}</td><td class="n">{value:.3f}</td><td class="n">{guess}</td><td>{bar}</td></tr>'
        )
    head = '<tr><th>asked</th><th></th><th class="n">result</th><th class="n">chance</th><th></th></tr>'
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _watch(image: Path, items: str) -> str:
    return (
        f'<div class="watch"><img alt="watch {html.escape(image.stem)}" src="{_embedded(image)}"><dl>{items}</dl></div>'
    )


def _questions(asked: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for one in asked:
        kind = "right" if one["right"] else "wrong"
        truth = (
            ""
            if one["right"]
            else f' <span class="truth">truth {html.escape(one["truth"])}, score {one["score"]:.2f}</span>'
        )
        mark = "&#10003;" if one["right"] else "&#10007;"
        items.append(
            f'<dt>{html.escape(one["question"])}</dt><dd class="{kind}">{mark} {html.escape(one["answer"]) or "(nothing)"}{truth}</dd>'
        )
    return "".join(items)


def _captions(told: Sequence[Mapping[str, Any]]) -> str:
    """The true caption and the wrong ones with their scores, as numbers and bars."""
    items = []
    for one in told:
        kind, mark = ("right", "&#10003;") if one["right"] else ("wrong", "&#10007;")
        about = f"wrong {NAMES[one['attribute']]}" if one["attribute"] else "true"
        bar = f'<div class="bar"><i style="width:{100 * one["value"]:.1f}%"></i></div>'
        items.append(
            f'<dt>{about}: {html.escape(one["caption"])}</dt><dd class="{kind}">{mark} {one["value"]:.3f}{bar}</dd>'
        )
    return "".join(items)


def _embedded(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()

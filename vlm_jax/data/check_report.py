"""What `data check` leaves behind: check.json, bad.jsonl, two pictures of the data, and a page of text for the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.data.manifest import Manifest

WORDS = {
    "missing": "image file is missing",
    "folder": "a folder where an image should be",
    "unreadable": "file that may not be read",
    "empty": "image file of 0 bytes",
    "not_an_image": "file that is no image",
    "broken": "damaged image file",
    "bomb": "image too large to be decoded",
    "too_thin": "image too thin to be resized",
    "not_json": "no JSON",
    "encoding": "text that is not UTF-8",
    "not_object": "JSON, but no record",
    "no_conversations": "no conversations",
    "roles": "speakers out of order",
    "text": "turn that is no text",
    "no_answer": "no answer to learn from",
    "image_field": "`image` is no path",
    "image_count": "not one <image> per image",
    "template": "does not fit the template",
    "task": "unknown task",
    "too_long": "nothing with loss in the longest sample",
    "too_many_images": "more images than a row takes",
    "nothing_to_learn": "only empty answers",
    "file": "data file that cannot be read there",
    "record": "record that cannot be used",
    "image": "image that cannot be used",
}  # reason of a record, image or sample -> what a person calls it


def write(
    folder: Path,
    found: Mapping[str, Any],
    bad: Sequence[Mapping[str, Any]],
    manifests: Mapping[str, Manifest],
    limit: int,
) -> None:
    """check.json (data.findings.findings), bad.jsonl (a line per record that is not used), lengths.png and images.png.

    limit: slots of the longest sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "check.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    _replace(folder / "bad.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in bad))
    draw_lengths(folder / "lengths.png", {name: m.lengths[m.usable] for name, m in manifests.items()}, limit)
    counts = {name: (m.images + m.generated)[m.usable] for name, m in manifests.items()}
    sizes = np.concatenate([m.sizes for m in manifests.values()])
    draw_images(folder / "images.png", counts, sizes[sizes.all(axis=1)])


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def draw_lengths(path: Path, lengths: Mapping[str, np.ndarray], limit: int) -> None:
    """PNG: slots per sample, stacked by source; the line is the longest sample that is allowed."""
    figure, axes = _figure(1)
    longest = max([int(values.max()) for values in lengths.values() if len(values)], default=1)
    bins = np.linspace(0, max(longest, 1), 61)
    _stacked(axes[0], lengths, bins)
    axes[0].axvline(limit, color="#c22a2a", linewidth=1)
    axes[0].set(title=f"slots per sample (longest allowed: {limit:,})", xlabel="slots", ylabel="samples")
    axes[0].set_xlim(0, max(longest, limit) * 1.02)
    figure.savefig(path, dpi=110)


def draw_images(path: Path, counts: Mapping[str, np.ndarray], sizes: np.ndarray) -> None:
    """PNG: images per sample by source, and the sizes of the images that were read, int [n, 2] pixels."""
    figure, axes = _figure(2 if len(sizes) else 1)
    most = max([int(values.max()) for values in counts.values() if len(values)], default=0)
    _stacked(axes[0], counts, np.arange(most + 2) - 0.5)
    axes[0].set(
        title="images per sample", xlabel="images", ylabel="samples", xticks=range(0, most + 1, max(1, most // 10))
    )
    if len(sizes):
        _draw_sizes(figure, axes[1], sizes)
    figure.savefig(path, dpi=110)


def _draw_sizes(figure: Any, axis: Any, sizes: np.ndarray) -> None:
    """Width against height on logarithmic axes with plain numbers: one extreme image must not squeeze all others into a corner."""
    low, high = sizes.min() / 1.2, sizes.max() * 1.2
    edges = np.geomspace(low, high, 41)
    drawn = axis.hist2d(sizes[:, 0], sizes[:, 1], bins=(edges, edges), cmap="viridis_r", cmin=1)
    axis.set(title=f"sizes of {len(sizes):,} images", xlabel="width", ylabel="height", xscale="log", yscale="log")
    ticks = [2**k for k in range(20) if low <= 2**k <= high]
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks(ticks, [str(tick) for tick in ticks])
        side.set_ticks([], minor=True)
    figure.colorbar(drawn[3], ax=axis, label="images", ticks=None if drawn[0][drawn[0] > 0].max() > 8 else range(1, 9))


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # here, because --help must not wait for it

    figure = Figure(figsize=(5.5 * panels, 3.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _stacked(axis: Any, values: Mapping[str, np.ndarray], bins: np.ndarray) -> None:
    names = [name for name in values if len(values[name])]
    if names:
        axis.hist([values[name] for name in names], bins=bins, stacked=True, label=names, rwidth=0.9)
        axis.grid(alpha=0.3, axis="y")
        if len(names) > 1:
            axis.legend(fontsize="small")


def describe(found: Mapping[str, Any]) -> str:
    """The numbers of check.json for a terminal."""
    usable, records, sources = found["usable"], found["records"], found["sources"]
    lines = [f"{records:,} records, {usable:,} usable ({usable / records:.1%})", ""]
    head = ("source", "records", "usable", "images", "slots", "with loss")
    keys = ("records", "usable", "images", "slots", "supervised_tokens")
    lines += _table([head, *((name, *(f"{one[key]:,}" for key in keys)) for name, one in sources.items())])
    lines += _bad(found["unusable"], records - usable)
    for name, one in sources.items():
        twice = one["duplicate_ids"]
        if twice["ids"]:
            first = twice["first"][0]
            lines.append(
                f"duplicate ids in {name}: {twice['ids']:,} for {twice['records']:,} records, which are all used; the first is "
                f"{first['id']}, of records {', '.join(map(str, first['records'][:5]))}"
            )
    lines.append(f"samples without loss: {found['samples_without_loss']:,}")
    lines.append(f"samples cut at the end: {found['cut_samples']:,}, by {found['slots_cut_off']:,} slots in all")
    images = found["images"]
    if "read" in images:
        lines.append(f"images: {images['read']:,}, of which {images['broken']:,} cannot be used")
    counts = ", ".join(f"{number} in {count:,}" for number, count in list(images["per_sample"].items())[:8])
    lines += [f"images per sample: {counts}"] if counts else []
    return "\n".join(lines + _epoch(found))


def _bad(reasons: Mapping[str, Any], total: int) -> list[str]:
    """Why records are not used, with the first files or records."""
    if not total:
        return ["", "every record is used", ""]
    lines = ["", f"not trained on: {total:,} (all of them in bad.jsonl)"]
    for reason, one in reasons.items():
        of = max(one["files"], one["records"]) if not one["files"] else one["files"]
        more = f" and {of - len(one['first']):,} more" if of > len(one["first"]) else ""
        lines.append(f"  {one['records']:>6,}  {WORDS.get(reason, reason)}: {', '.join(one['first'])}{more}")
    return [*lines, ""]


def _epoch(found: Mapping[str, Any]) -> list[str]:
    """An epoch's size and how it fills rows; the configured row length is marked."""
    if "epoch" not in found:
        return []
    e, per = found["epoch"], found["slots_per_sample"]
    lines = [
        "",
        f"an epoch: {e['samples']:,} samples, {e['slots']:,} slots (text tokens and image features), {e['supervised_tokens']:,} tokens "
        f"with loss, {e['image_views']:,} image views",
        f"slots per sample: mean {per['mean']:,.0f}, median {per['median']:,.0f}, 99 % up to {per['p99']:,.0f}, "
        f"longest {per['longest']:,.0f}",
        "",
    ]
    lines += [f"answer slots: {e['answer_slots']:,}", ""] if e["answer_slots"] else []
    head = ("row length", "views per row", "rows", "slots used", "views used", "")
    rows = [
        (
            f"{f['row_length']:,}",
            str(f["views"]),
            f"{f['rows']:,}",
            f"{f['slots_used']:.1%}",
            f"{f['views_used']:.1%}",
            ("<- this recipe" if f["row_length"] == found["row_length"] else "")
            + (f"{f['left_out']:,} samples have too many views" if f["left_out"] else ""),
        )
        for f in found["packing"]
    ]
    lines += _table([head, *rows])
    return lines + ([found["suggestion"]] if found["suggestion"] else [])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text: the first and last to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        if not row[-1] or not rows[0][-1]:
            cells[-1] = row[-1]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return lines

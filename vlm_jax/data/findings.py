"""The numbers of `data check`: what is in the manifests of all sources, as one dict for check.json and the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError, UserError
from vlm_jax.data.check import Gallery, Samples, fillings, suggestion
from vlm_jax.data.epochs import Epochs, Packing
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.data.images import REASONS
from vlm_jax.data.manifest import OK, Manifest
from vlm_jax.data.measuring import refuse

EXAMPLES = 5  # names that are given for each reason

Sources = Mapping[str, Sequence[Any]]


def unusable(sources: Sources, manifests: Mapping[str, Manifest], gallery: Gallery) -> list[dict[str, Any]]:
    """A dict for every record that is not trained on: source, record (number in it), reason, files (images that are to blame), sentence."""
    found = []
    for name, manifest in manifests.items():
        for note in manifest.notes:
            files = list(_broken_files(sources[name], note.index, gallery)) if note.reason in REASONS else []
            one = {"source": name, "record": note.index, "reason": note.reason, "files": files}
            found.append({**one, "sentence": note.sentence})
    return found


def _broken_files(records: Sequence[Any], index: int, gallery: Gallery) -> Iterator[str]:
    """Names of the images of a record that cannot be used."""
    for image in records[index].images:
        source = ImageSource.of(image)
        try:
            gallery.look(source)
        except ImageError:
            yield f"{source.path}:{source.member}" if source.member else source.path


def duplicates(manifest: Manifest) -> list[list[int]]:
    """Numbers of the usable records that have the same id, id by id."""
    ids = manifest.ids[manifest.usable]
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(np.diff(ids[order], prepend=~ids[order[:1]]))
    groups = np.split(manifest.usable[order], starts[1:]) if len(ids) else []
    return sorted(group.tolist() for group in groups if len(group) > 1)


def findings(
    sources: Sources,
    manifests: Mapping[str, Manifest],
    bad: Sequence[Mapping[str, Any]],
    gallery: Gallery | None,
    how: Packing,
) -> dict[str, Any]:
    """Everything that check.json holds (JSON); `problem` is the sentence of `refusal`.

    bad: what `unusable` gives. gallery: None where other processes looked at the images.
    """
    whole = Manifest.join(list(manifests.values()))
    usable = whole.usable
    return {
        "records": len(whole),
        "usable": len(usable),
        "row_length": how.row_length,
        "unusable": _by_reason(bad),
        "sources": {name: _source(sources[name], manifest) for name, manifest in manifests.items()},
        "samples_without_loss": whole.without_loss,
        "cut_samples": whole.cut_count,
        "slots_cut_off": int(whole.cut.sum()),
        "slots_per_sample": _distribution(whole.lengths[usable]),
        "images": {
            **({} if gallery is None else {"read": len(gallery), "broken": gallery.broken}),
            "per_sample": _histogram(whole.images[usable] + whole.generated[usable]),
        },
        "problem": refusal(manifests, how),
        **_epoch(manifests, how),
    }


def _by_reason(bad: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """reason -> how many records, and the first files or records that are to blame; most frequent first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in bad:
        groups.setdefault(one["reason"], []).append(one)
    found = {}
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        files = list(dict.fromkeys(file for one in group for file in one["files"]))
        first = files or [f"{one['source']}: record {one['record']}" for one in group]
        found[reason] = {
            "records": len(group),
            "files": len(files),
            "first": first[:EXAMPLES],
            "sentence": group[0]["sentence"],
        }
    return found


def _source(records: Sequence[Any], manifest: Manifest) -> dict[str, Any]:
    usable = manifest.usable
    twice = duplicates(manifest)
    named = [{"id": str(getattr(records[group[0]], "id", "")), "records": group} for group in twice[:EXAMPLES]]
    return {
        "records": len(manifest),
        "usable": len(usable),
        "unusable": manifest.reasons(),
        "images": int(manifest.images[usable].sum()),
        "images_to_generate": int(manifest.generated[usable].sum()),
        "slots": int(manifest.lengths[usable].sum()),
        "supervised_tokens": int(manifest.supervised[usable].sum()),
        "duplicate_ids": {"ids": len(twice), "records": sum(map(len, twice)), "first": named},
    }


def _distribution(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    levels = {"median": 50, "p90": 90, "p99": 99, "longest": 100}
    return {"mean": float(values.mean()), **{name: float(np.percentile(values, q)) for name, q in levels.items()}}


def _histogram(values: np.ndarray) -> dict[str, int]:
    numbers, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, numbers.tolist()), counts.tolist()))


def refusal(manifests: Mapping[str, Manifest], how: Packing) -> str:
    """The sentence with which training would refuse these sources; empty if it takes them."""
    try:
        for name, manifest in manifests.items():
            refuse(manifest, how.limits, name)
        Epochs(manifests, dataclasses.replace(how, epochs=0, least_rows=0))
    except UserError as error:
        return str(error)
    return ""


def _epoch(manifests: Mapping[str, Manifest], how: Packing) -> dict[str, Any]:
    """What an epoch holds and how it fills rows; empty where no epoch can be made."""
    used = {name: manifest for name, manifest in manifests.items() if manifest.count(OK)}
    if not used:
        return {}
    try:
        epochs = Epochs(used, dataclasses.replace(how, epochs=0, least_rows=0))
    except ConfigError:  # of the mixture, which `refusal` reports
        return {}
    whole, samples = epochs.manifest, Samples.of_epoch(epochs)
    chosen = whole.usable[epochs.mixture.order(0)]
    found = fillings(samples, how)
    return {
        "epoch": {
            "samples": len(chosen),
            "of_source": dict(zip(epochs.mixture.names, epochs.mixture.counts.tolist())),
            "slots": int(whole.lengths[chosen].sum()),
            "supervised_tokens": int(whole.supervised[chosen].sum()),
            "image_views": int(whole.views[chosen].sum()),
            "answer_slots": int(whole.answers[chosen].sum()),
        },
        "packing": [dataclasses.asdict(filling) for filling in found],
        "suggestion": suggestion(found, samples, how),
    }

"""Where a run stands in its data, and whether the data is still the same: the part of a checkpoint that is about samples.

{"step": 120, "row": 15360,                        the next batch, and the global row it begins with
 "seed": 0, "sources": {name: manifest.summary()}, what decides the order of samples, compared when the run
 "packing": {...}, "mixture": {...}, ...}          goes on; a difference is refused in words
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.data.manifest import DataError

COUNTED = (
    ("records", "{name} had {then} records then and has {now} now"),
    ("usable", "{name} had {then} usable records then and has {now} now"),
    ("lengths", "the lengths in {name} changed (they were {then} slots in all and are {now} now)"),
    ("answers", "the lengths of answers in {name} changed (they were {then} slots in all and are {now} now)"),
    ("views", "the images of {name} changed ({then} views then, {now} now)"),
    ("digest", "the text or the lengths of samples in {name} changed"),
    ("alike", "which samples of {name} show the same images changed"),
)
SHOWN = 3  # changes that are named


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[int, int]:
    """(step, global row) of a saved state; DataError names what of the data or its order has changed since."""
    if "sources" not in state:
        raise DataError(
            "the checkpoint's data state was written by an earlier version of vlm_jax, whose order of samples is not known: "
            "start a new run from the saved parameters"
        )
    changes = differences(state, identity)
    if changes:
        more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise DataError(
            f"the training data changed since the checkpoint was saved: {'; '.join(changes[:SHOWN])}{more}. "
            "Restore it, or start a new run from the saved parameters"
        )
    return int(state["step"]), int(state["row"])


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two identities (`Rows.identity`), a clause each; empty if the order of samples is the same."""
    found = _of_settings({"data.seed": then["seed"]}, {"data.seed": now["seed"]})
    found += _of_settings(then["packing"], now["packing"])
    found += _of_sources(then, now)
    for name, after in now["mixture"].items():
        before = then["mixture"].get(name, after)
        found += _of_settings(*({f"data.sources.{name}.{key}": one[key] for key in after} for one in (before, after)))
    if not found and then["encoder"] != now["encoder"]:
        found = _of_settings(then["settings"], now["settings"]) or ["what is drawn for a sample changed"]
    return found


def _of_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [*now, *(key for key in then if key not in now)]
    return [f"{k} was {then.get(k)!r} and is {now.get(k)!r} now" for k in keys if then.get(k) != now.get(k)]


def _of_sources(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sources that came, went or hold something else; settings that changed the text of all of them come first."""
    before, after = then["sources"], now["sources"]
    found = [f"the source {name} was not there" for name in after if name not in before]
    found += [f"the source {name} is not there any more" for name in before if name not in after]
    changed = [name for name in after if name in before and not _same_order(before[name], after[name])]
    if changed:
        found += _of_settings(then["settings"], now["settings"])
    for name in changed:
        a, b = before[name], after[name]
        key, words = next((key, words) for key, words in COUNTED if a.get(key) != b.get(key))
        found.append(words.format(name=name or "the data", then=a[key], now=b[key]))
    return found


def _same_order(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Do two summaries of a manifest stand for the same samples; where images are shared, also for the same partners?"""
    return then["digest"] == now["digest"] and ("alike" not in then or then["alike"] == now.get("alike", then["alike"]))

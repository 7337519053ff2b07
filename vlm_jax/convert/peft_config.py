"""adapter_config.json for a set of adapted linears: which modules PEFT shall adapt, with which rank and alpha.

Only the keys that are needed are written, because older versions of PEFT refuse keys that they do not know.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from vlm_jax.config import LoRAConfig, VLMConfig
from vlm_jax.convert import names as naming
from vlm_jax.convert.names import Entry


@dataclasses.dataclass(frozen=True)
class Linear:
    """One adapted linear: factors as in the file (`a` [r, in], `b` [out, r]), what multiplies them, its group, and its name there."""

    entry: Entry
    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    group: LoRAConfig

    @property
    def rank(self) -> int:
        """r of this linear."""
        return self.a.shape[0]

    def alpha(self, rslora: bool) -> int | float:
        """lora_alpha that gives this linear its scale: the group's own where it does."""
        root = math.sqrt(self.rank) if rslora else self.rank
        exact = np.isclose(self.group.alpha / root, self.scale, rtol=1e-6)
        alpha = self.group.alpha if exact else round(self.scale * root, 6)
        return int(alpha) if float(alpha).is_integer() else alpha


def peft_config(config: VLMConfig, linears: list[Linear], base: str, naming_: str, prefix: str = "") -> dict[str, Any]:
    """adapter_config.json of `linears` (of one model, in the order of its layers).

    naming_: of `names.NAMINGS`, in which the linears are named, less `prefix`.
    """
    first = linears[0]
    rslora = first.group.rslora
    usual = first.rank, first.alpha(rslora)
    raw = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual[1],
        "lora_dropout": first.group.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual[0],
        "target_modules": _targets(config, linears, naming_, prefix),
        "task_type": "CAUSAL_LM",
    }
    if rslora:
        raw["use_rslora"] = True
    if any((x.rank, x.alpha(rslora)) != usual for x in linears):
        raw["rank_pattern"], raw["alpha_pattern"] = _patterns(linears, usual, rslora)
    return raw


def _patterns(
    linears: list[Linear], usual: tuple[int, float], rslora: bool
) -> tuple[dict[str, int], dict[str, int | float]]:
    """(rank_pattern, alpha_pattern) of the linears that have not the `usual` rank and alpha."""
    found: dict[tuple, set[int | None]] = {}
    for x in linears:
        if (x.rank, x.alpha(rslora)) != usual:
            found.setdefault((_template(x.name), x.rank, x.alpha(rslora)), set()).add(_number(x.name))
    ranks, alphas = {}, {}
    for (template, rank, alpha), layers in found.items():
        # PEFT before 0.15 wants a part of the name before what a pattern matches: the first one is left out
        pattern = _pattern(template, layers, None).partition(r"\.")[2]
        if pattern.startswith("layers"):  # of LLaVA's decoder, and also the end of the names in the tower
            pattern = rf"(?<!encoder\.){pattern}"
        ranks[pattern], alphas[pattern] = rank, alpha
    return ranks, alphas


def _targets(config: VLMConfig, linears: list[Linear], naming_: str, prefix: str) -> list[str] | str:
    """target_modules: the last parts of the names where they choose exactly these linears, else a regular expression."""
    ours = {linear.name for linear in linears}
    suffixes = sorted({name.rpartition(".")[2] for name in ours})
    there: dict[str, Entry] = {}
    for entry in naming.entries(config):
        if entry.path.endswith("/kernel") and entry.key.endswith(".weight"):
            name = naming.key_of(entry, naming_, config.projector.kind).removesuffix(".weight")
            if name.startswith(prefix):
                there[name.removeprefix(prefix)] = entry
    # LLaVA attaches the decoder's adapters while the tower is not there yet
    tower = naming_ != "llava" or any(linear.entry.room == "tower" for linear in linears)
    hit = {n for n, e in there.items() if n.rpartition(".")[2] in suffixes and (tower or e.room != "tower")}
    if hit == ours:
        return suffixes
    every: dict[str, set[int | None]] = {}
    for name in there:
        every.setdefault(_template(name), set()).add(_number(name))
    chosen: dict[str, set[int | None]] = {}
    for name in sorted(ours, key=list(there).index):
        chosen.setdefault(_template(name), set()).add(_number(name))
    return "|".join(_pattern(t, layers, len(every[t])) for t, layers in chosen.items())


def _template(name: str) -> str:
    """`name` with N in place of its layer."""
    return re.sub(r"\.layers\.\d+\.", ".layers.N.", name)


def _number(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _pattern(template: str, layers: Collection[int | None], count: int | None) -> str:
    """A regular expression for `template` in `layers`, of `count` that there are (None: name each)."""
    if None in layers:
        return re.escape(template)
    some = r"\d+" if len(layers) == count else f"({'|'.join(map(str, sorted(layers)))})"
    return re.escape(template).replace(r"\.N\.", rf"\.{some}\.")

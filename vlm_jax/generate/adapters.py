"""Several adapters on one base, chosen and mixed by name while the programs stay compiled.

    adapters a, b of rank r, s     lora_a [in, r + s] = (A_a | A_b)      lora_b [r + s, out] = (B_a over B_b)
    use({"a": w, "b": v})          lora_scale [r + s] = (w s_a ... | v s_b ...)                          0 is "not there"
    trained whole (projector)      base + w (a's - base) + v (b's - base)

Nothing but the values of some arrays changes between two choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import ConfigError, UserError, VLMConfig
from vlm_jax.convert.merge import open_adapted
from vlm_jax.convert.peft import Adapter
from vlm_jax.convert.read import Checkpoint, open_checkpoint
from vlm_jax.models.adapters import LORA_A, LORA_SCALE, side_by_side

BASE = "base"  # what `--use` calls the model without adapters

Put = Callable[[str, np.ndarray], jax.Array]  # (path, value of the parameter) -> where it belongs
Weights = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters in files, by name, for one base; `config` is the model that holds them all, `base` the checkpoint below them."""

    base: Checkpoint
    config: VLMConfig
    adapters: Mapping[str, Adapter]

    def leaves(self) -> dict[str, np.ndarray]:
        """lora_a and lora_b of all adapters side by side, lora_scale 0: the base."""
        found: dict[str, list[np.ndarray]] = {}
        for adapter in self.adapters.values():
            for path, leaf in adapter.leaves.items():
                found.setdefault(path, []).append(np.asarray(leaf.read()))
        made = {
            p: np.concatenate(parts, -1 if p.endswith(LORA_A) else -2) for p, parts in found.items() if not _scale(p)
        }
        return made | self.scales({})

    def scales(self, weights: Weights) -> dict[str, np.ndarray]:
        """Every lora_scale when the adapters count as `weights` says."""
        found: dict[str, list[np.ndarray]] = {}
        for name, adapter in self.adapters.items():
            for path, leaf in adapter.leaves.items():
                if _scale(path):
                    found.setdefault(path, []).append(np.float32(weights.get(name, 0.0)) * np.asarray(leaf.read()))
        return {path: np.concatenate(parts, -1) for path, parts in found.items()}

    def trained_whole(self) -> dict[str, dict[str, np.ndarray]]:
        """{path: {"base" and every adapter that has its own: value}} of parameters that adapters bring along."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, adapter in self.adapters.items():
            for path in adapter.extra:
                mine = found.setdefault(path, {BASE: self.base.leaves[path].read()})
                mine[name] = adapter.overlay(path, self.base.leaves[path]).read()
        return found


def _scale(path: str) -> bool:
    return path.endswith(LORA_SCALE)


def open_adapters(directory: Path, folders: Mapping[str, str]) -> Adapters:
    """The adapters in `folders` ({name: directory}) for the model in `directory`; every error names the adapter's folder."""
    opened = {name: open_adapted(folder, base=directory) for name, folder in folders.items()}
    configs = {name: dataclasses.replace(checkpoint.config, lora=()) for name, (checkpoint, _) in opened.items()}
    (first, config), *others = configs.items()
    for name, other in others:
        if other != config:
            raise UserError(
                f"the adapters {first} and {name} were trained with other image settings or vocabularies "
                f"({_difference(config, other)}): load one at a time"
            )
    base = open_checkpoint(directory, vocab=config.llm.vocab)
    ranks: dict[str, int] = {}
    for _, adapter in opened.values():
        for path, leaf in adapter.leaves.items():
            if _scale(path):
                linear = path.removesuffix(f"/{LORA_SCALE}")
                ranks[linear] = ranks.get(linear, 0) + leaf.shape[-1]
    whole = dataclasses.replace(config, lora=side_by_side(ranks))
    return Adapters(dataclasses.replace(base, config=config), whole, {n: adapter for n, (_, adapter) in opened.items()})


def _difference(one: Any, other: Any) -> str:
    """The first setting that two configs have otherwise."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a != b:
            inner = dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b)
            return f"{field.name}.{_difference(a, b)}" if inner else f"{field.name} {a!r} and {b!r}"
    return "nothing"


class Switch:
    """The arrays of some adapters on their devices: `values(weights)` are the parameters of that mixture."""

    def __init__(self, adapters: Adapters, put: Put):
        self._adapters, self._put = adapters, put
        self._whole = {
            path: {name: put(path, value) for name, value in values.items()}
            for path, values in adapters.trained_whole().items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were given."""
        return tuple(self._adapters.adapters)

    def values(self, weights: Weights) -> dict[str, jax.Array]:
        """{path: array} of what differs between mixtures; weights: {name: weight}, {} is the base. ConfigError for other names."""
        for name in weights:
            if name not in self.names:
                raise ConfigError(f"there is no adapter {name!r}: there are {', '.join(self.names)}")
        scales = {path: self._put(path, value) for path, value in self._adapters.scales(weights).items()}
        return scales | {path: self._mixed(path, weights) for path in self._whole}

    def _mixed(self, path: str, weights: Weights) -> jax.Array:
        values = self._whole[path]
        used = {name: weight for name, weight in weights.items() if name in values and weight}
        if list(used.values()) in ([], [1.0]):
            return values[next(iter(used), BASE)]
        base = values[BASE].astype(jnp.float32)
        mixed = base + sum(weight * (values[name].astype(jnp.float32) - base) for name, weight in used.items())
        return jax.device_put(mixed.astype(values[BASE].dtype), values[BASE].sharding)


def switch_of(switch: Switch | None) -> Switch:
    """`switch`, or ConfigError where a model was loaded without adapters."""
    if switch is None:
        raise ConfigError("the model was loaded without adapters: give them to load_model, or with --adapter NAME=DIR")
    return switch


def adapter_flags(adapter: Sequence[str], use: Sequence[str]) -> dict[str, Any]:
    """The flags `--adapter NAME=DIR` and `--use NAME[:WEIGHT]`, both repeated, as arguments of load_model."""
    folders: dict[str, str] = {}
    for flag in adapter:
        name, _, folder = flag.partition("=")
        if not name or not folder or name == BASE or name in folders:
            raise ConfigError(f"--adapter={flag} must be NAME=DIR, with a name of its own that is not {BASE!r}")
        folders[name] = folder
    return {"adapters": folders, "use": named_weights(use, tuple(folders))}


def named_weights(flags: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """NAME or NAME:WEIGHT, several times -> {name: weight}; none: the first of `names`; "base": no adapter."""
    if not flags:
        return {name: 1.0 for name in names[:1]}
    found: dict[str, float] = {}
    for flag in flags:
        name, _, weight = flag.partition(":")
        if name not in (BASE, *names):
            raise ConfigError(
                f"{name!r} is no adapter: there are {', '.join(names) or 'none'}, and --adapter NAME=DIR adds one"
            )
        try:
            found[name] = float(weight) if weight else 1.0
        except ValueError:
            raise ConfigError(f"{flag} has no number after the colon: write NAME or NAME:WEIGHT") from None
    found.pop(BASE, None)
    return found

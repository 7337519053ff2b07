"""Weights outside the program, read by path and slice, and the same with kernels quantised while they are read.

    read("llm/blocks/attn/q/kernel_codes", index)   kernel of one layer -> codes; next layer ...   -> the slice of the codes
The scales of a kernel depend on all of it, so whole layers are quantised, and the codes of one linear are kept until another is asked
for. A host holds one layer in 16 bits and one linear in codes; with several hosts each reads and quantises every layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from vlm_jax.config import QuantConfig, VLMConfig
from vlm_jax.models import vlm
from vlm_jax.nn import quantise

Index = tuple[slice, ...]


class LeafSource(Protocol):
    """Weights outside the program, so that no host ever holds a whole model."""

    def __contains__(self, path: str) -> bool:
        """Whether the parameter is there; others start at random."""

    def read(self, path: str, index: Index) -> np.ndarray:
        """The slice `index` of the parameter."""


def quantised(source: LeafSource | None, config: VLMConfig) -> LeafSource | None:
    """`source` with the leaves that a model of `config` has; the source itself where nothing is quantised."""
    if source is None or config.quant is None:
        return source
    plain = vlm.shapes(dataclasses.replace(config, quant=None))
    return QuantisedSource(source, config.quant, {path: like.shape for path, like in plain.items()})


class QuantisedSource:
    """A LeafSource whose kernels can be read as codes; shapes: {path: shape} of the model without quantisation."""

    def __init__(self, source: LeafSource, quant: QuantConfig, shapes: Mapping[str, tuple[int, ...]]):
        self._source, self._quant, self._shapes = source, quant, shapes
        self._held: tuple[str, dict[str, np.ndarray]] = ("", {})

    def __contains__(self, path: str) -> bool:
        return (_kernel(path) if quantise.is_quantised(path) else path) in self._source

    def read(self, path: str, index: Index) -> np.ndarray:
        """The slice `index` of a parameter or of one leaf of a quantised kernel."""
        if not quantise.is_quantised(path):
            return self._source.read(path, index)
        kernel = _kernel(path)
        if self._held[0] != kernel:
            self._held = ("", {})  # before the next linear is read, not after
            self._held = (kernel, self._quantise(kernel))
        return self._held[1][path.rpartition("/")[2]][index]

    def _quantise(self, path: str) -> dict[str, np.ndarray]:
        *layers, inputs, outputs = self._shapes[path]
        whole = (slice(0, inputs), slice(0, outputs))
        if not layers:
            return _arrays(quantise.quantise(np.asarray(self._source.read(path, whole)), self._quant))
        held: dict[str, np.ndarray] = {}
        for layer in range(layers[0]):
            one = np.asarray(self._source.read(path, (slice(layer, layer + 1), *whole)))[0]
            for name, leaf in _arrays(quantise.quantise(one, self._quant)).items():
                held.setdefault(name, np.empty((layers[0], *leaf.shape), leaf.dtype))[layer] = leaf
        return held


def kernel_of(leaves: Mapping[str, Any], path: str, quant: QuantConfig) -> np.ndarray:
    """The float32 kernel [(layers,) in, out] at `path` ("llm/blocks/attn/q/kernel") of quantised {path: array}; one linear at a time."""
    room = path.rpartition("/")[0]
    found = {name: np.asarray(leaves[f"{room}/{name}"]) for name in quantise.NAMES if f"{room}/{name}" in leaves}
    codes = found.get("kernel_codes", found.get("kernel_int8"))
    if codes.ndim == 2:
        return quantise.dequantise(found, quant, np.float32, np)
    layers = [{name: leaf[layer] for name, leaf in found.items()} for layer in range(len(codes))]
    return np.stack([quantise.dequantise(layer, quant, np.float32, np) for layer in layers])


def _kernel(path: str) -> str:
    return f"{path.rpartition('/')[0]}/{quantise.KERNEL}"


def _arrays(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}

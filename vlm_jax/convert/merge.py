"""A base and its adapter as one checkpoint: side by side for training and generation, or merged into the kernels.

    adapted   base + <linear>/lora_a, lora_b, lora_scale, VLMConfig.lora set, whatever was trained whole in its place
    merged    W + A diag(scale) B in float32, cast to the type of W; no adapter is left

Nothing is computed before a parameter is read, and then only the slice that was asked for, one layer at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.config import VLMConfig
from vlm_jax.convert.files import read_json
from vlm_jax.convert.llava_config import tower_directory, vlm_from_llava
from vlm_jax.convert.manifest import Manifest, image_settings, mark_of, read_manifest, same_mark, with_image_settings
from vlm_jax.convert.peft import Adapter, read_adapter, vocabulary
from vlm_jax.convert.read import Checkpoint, kind_of, model_directory, open_checkpoint
from vlm_jax.convert.tensors import CheckpointError, Index, as_leaves, full, resolve

LORA = ("lora_a", "lora_b", "lora_scale")


@dataclasses.dataclass(frozen=True)
class MergedLeaf:
    """A kernel [(L,) in, out] with its adapter merged in: leaves of the kernel, A [(L,) in, R], B [(L,) R, out], scale [(L,) R]."""

    kernel: Any
    a: Any
    b: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return tuple(self.kernel.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the kernel."""
        return self.kernel.dtype

    @property
    def parts(self) -> tuple:
        """The tensors that the kernel comes from, for their names and types."""
        return self.kernel.parts

    def read(self, index: Index | None = None) -> np.ndarray:
        """The slice `index` (default: all) of the merged kernel."""
        index = full(self.shape) if index is None else resolve(index, self.shape)
        if len(self.shape) == 2:
            return self._one((), index)
        layers = range(self.shape[0])[index[0]]
        out = np.empty((len(layers), *(i.stop - i.start for i in index[1:])), self.dtype)
        for row, layer in enumerate(layers):
            out[row] = self._one((slice(layer, layer + 1),), index[1:])
        return out

    def _one(self, layer: Index, index: Index) -> np.ndarray:
        """One layer (or the only one): `layer` is what stands before the two axes of the kernel."""
        rank = slice(0, self.a.shape[-1])
        parts = (self.kernel, (*layer, *index)), (self.a, (*layer, index[0], rank)), (self.b, (*layer, rank, index[1]))
        w, a, b, scale = (
            np.asarray(leaf.read(at), np.float32).reshape([i.stop - i.start for i in at[len(layer) :]])
            for leaf, at in (*parts, (self.scale, (*layer, rank)))
        )
        return (w + (a * scale) @ b).astype(self.dtype)


def merged_parameters(config: VLMConfig, params: Mapping[str, Any]) -> tuple[VLMConfig, dict[str, Any]]:
    """(config without adapters, leaves with every adapter of flat `params` merged in, unread)."""
    leaves = as_leaves(params)
    adapted = [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]
    for path in adapted:
        if f"{path}/kernel" not in leaves:
            raise CheckpointError(
                f"{path} has an adapter but no kernel to merge it into: restore its 16-bit kernel first"
            )
        kernel = leaves[f"{path}/kernel"]
        leaves[f"{path}/kernel"] = MergedLeaf(kernel, *(leaves.pop(f"{path}/{name}") for name in LORA))
    return dataclasses.replace(config, lora=()), leaves


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapter, if it has one, merged into its kernels."""
    config, leaves = merged_parameters(checkpoint.config, checkpoint.leaves)
    return dataclasses.replace(checkpoint, config=config, leaves=leaves)


def adapted(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The base `checkpoint` with `adapter` beside it; an adapter that the base has already stays out of place: merge it first."""
    if checkpoint.config.lora:
        raise CheckpointError(f"{checkpoint.directory} has an adapter already: merge it before another is put on it")
    whole = {path: adapter.overlay(path, checkpoint.leaves.get(path)) for path in adapter.extra}
    leaves = {**checkpoint.leaves, **{path: leaf for path, leaf in whole.items() if leaf is not None}, **adapter.leaves}
    missing = tuple(path for path in checkpoint.missing if path not in leaves)
    config = dataclasses.replace(checkpoint.config, lora=adapter.groups)
    return dataclasses.replace(checkpoint, config=config, leaves=leaves, missing=missing)


def open_model(
    directory: str | os.PathLike, *, base: str | os.PathLike | None = None, **parts: str | os.PathLike | None
) -> Checkpoint:
    """Open a model, or an adapter together with its base, as the manifest of `directory` (or of a run's export) says.

    base: the adapter's base (default: the one it names); parts: vision, llm, projector as in `open_checkpoint`.
    The adapter stays beside the kernels (config.lora is set); `merged` puts it into them.
    """
    directory = model_directory(directory)
    if read_manifest(directory).kind == "adapter":
        return open_adapted(directory, base=base, **parts)[0]
    if base:
        raise CheckpointError(f"{directory} is no adapter: --base {base} has no meaning for it")
    return open_checkpoint(directory, **parts)


def open_adapted(
    directory: str | os.PathLike, *, base: str | os.PathLike | None = None, **parts: str | os.PathLike | None
) -> tuple[Checkpoint, Adapter]:
    """(base with the adapter in `directory` beside it, the adapter); see `open_model`.

    The base is a LLaVA directory, or the language model alone where the adapter brings the projector and a config.json, as
    LLaVA's own program writes them.
    """
    manifest = read_manifest(directory)
    checkpoint = _open_base(manifest, _base_of(manifest, base), parts)
    adapter = read_adapter(manifest.directory, checkpoint.config, str(checkpoint.directory))
    if manifest.mark and not same_mark(manifest.mark, mark_of(checkpoint.leaves)):
        raise CheckpointError(
            f"{directory} is an adapter made for another base: {checkpoint.directory} has the same sizes, but its embeddings are "
            "not those that the adapter was trained with"
        )
    whole = adapted(checkpoint, adapter)
    if whole.missing:
        part, flag = (
            ("vision tower", "--vision") if whole.missing[0].startswith("tower/") else ("projector", "--projector")
        )
        raise CheckpointError(
            f"neither {directory} nor its base {checkpoint.directory} has a {part}: give one with {flag}"
        )
    return whole, adapter


def _base_of(manifest: Manifest, given: str | os.PathLike | None) -> Path:
    """The base's directory: the one given, else the one that the adapter names and that is here."""
    found = Path(given) if given else manifest.base_directory()
    if found is None:
        named = f" (it names {manifest.base})" if manifest.base else ""
        raise CheckpointError(f"{manifest.directory} is an adapter: give the directory of its base with --base{named}")
    found = model_directory(found)
    if read_manifest(found).kind == "adapter":
        raise CheckpointError(f"{found} is an adapter too: merge it into its base first, and give the result as --base")
    return found


def _open_base(manifest: Manifest, base: Path, parts: Mapping[str, Any]) -> Checkpoint:
    """The base as the adapter was trained on it: its image settings, its vocabulary, and parts still missing."""
    raw, rows = read_json(base / "config.json"), vocabulary(manifest.directory)
    own = _own_config(manifest.directory)
    if kind_of(raw, base) != "llm":
        checkpoint = open_checkpoint(base, **parts, vocab=rows, partial=True)
        settings = dict(manifest.image)
        if own and not settings:
            vision = checkpoint.config.vision
            settings = image_settings(vlm_from_llava(own, str(manifest.directory / "config.json"), vision))
        config = with_image_settings(checkpoint.config, settings)
        # an image processor that was copied from the base would make other images
        naming = checkpoint.naming if config == checkpoint.config else None
        return dataclasses.replace(checkpoint, config=config, naming=naming)
    if own is None:
        raise CheckpointError(
            f"{base} is a language model, and {manifest.directory} does not say of which LLaVA model it is a part: "
            "give a LLaVA directory as --base"
        )
    vision = parts.get("vision") or tower_directory(str(own.get("mm_vision_tower") or ""), manifest.directory)
    parts = {**parts, "vision": vision}
    found = open_checkpoint(base, **parts, partial=True).config
    config = vlm_from_llava(
        own, str(manifest.directory / "config.json"), found.vision if vision else None, manifest.directory
    )
    checkpoint = open_checkpoint(base, **parts, config=config, vocab=rows or config.llm.vocab, partial=True)
    return dataclasses.replace(checkpoint, kind="llava", raw=own)


def _own_config(directory: Path) -> dict[str, Any] | None:
    """The LLaVA config.json in an adapter's directory."""
    file = directory / "config.json"
    raw = read_json(file) if file.is_file() else {}
    return raw if "mm_vision_tower" in raw or str(raw.get("model_type", "")).startswith("llava_") else None

"""Which features of an image go to which slots: the one place that knows, for data and models (numpy only).

    flat           view 0 features, view 1 features, ...
    spatial        base view, then all tiles as ONE map read row by row:  (gh, p, gw, p)
    spatial_unpad  the same map without its rows or columns of mere padding, each row closed by image_newline

An entry is a feature index relative to the first view of the image (view v, patch i -> v*P + i) or NEWLINE.
A grid is (gw, gh) tiles of S x S pixels, p patches per tile side. Geometry of LLaVA-1.6 "anyres"
(haotian-liu/LLaVA v1.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm_jax.config import ConfigError, VLMConfig

NEWLINE = -2  # a slot that holds the learned image_newline embedding


def slots_of_image(width: int, height: int, config: VLMConfig) -> np.ndarray:
    """Feature index of every slot that a `width` x `height` image takes, int32 [n], n its number of slots.

    >>> slots_of_image(640, 480, VLMConfig())          # one view, 576 patches
    array([0, 1, ..., 575], dtype=int32)
    """
    if config.aspect != "anyres":
        return np.arange(config.vision.features, dtype=np.int32)
    return slots_of_views(views_of_image(width, height, config), width, height, config)


def views_of_image(width: int, height: int, config: VLMConfig) -> int:
    """Number of S x S views that the tower sees: 1, or under anyres the whole image and its tiles."""
    if config.aspect != "anyres":
        return 1
    columns, rows = tile_grid(width, height, config.pinpoints, config.vision.image_size)
    return 1 + columns * rows


def slots_of_views(views: int, width: int, height: int, config: VLMConfig) -> np.ndarray:
    """Slots of an image given as `views` views; under spatial_unpad a single view is closed by a NEWLINE."""
    features = config.vision.features
    if config.merge == "flat":
        return np.arange(views * features, dtype=np.int32)
    base = np.arange(features, dtype=np.int32)
    if views == 1:
        return np.append(base, np.int32(NEWLINE)) if config.merge == "spatial_unpad" else base
    side = config.vision.grid
    if features != side * side:
        raise ConfigError(
            f"model.merge={config.merge} makes a map of patches: set vision.select=patch, without class token"
        )
    grid = tile_grid(width, height, config.pinpoints, config.vision.image_size)
    if views != 1 + grid[0] * grid[1]:
        raise ValueError(
            f"an image of {width}x{height} pixels makes {1 + grid[0] * grid[1]} views, but {views} were given"
        )
    tiles = features * np.arange(1, views, dtype=np.int32).reshape(grid[1], 1, grid[0], 1)
    patches = np.arange(features, dtype=np.int32).reshape(1, side, 1, side)
    patch_map = (tiles + patches).reshape(grid[1] * side, grid[0] * side)
    if config.merge == "spatial_unpad":
        top, bottom, left, right = unpad_box(width, height, patch_map.shape[1], patch_map.shape[0])
        patch_map = patch_map[top:bottom, left:right]
        patch_map = np.pad(patch_map, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, patch_map.reshape(-1)])


def tile_grid(width: int, height: int, pinpoints: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(columns, rows) of `tile`-pixel tiles for an image, from the best of `pinpoints` (w, h)."""
    best = select_best_resolution(width, height, pinpoints)
    if best[0] % tile or best[1] % tile:
        raise ConfigError(
            f"model.pinpoints has {best}, which is not a multiple of vision.image_size={tile} on both sides"
        )
    return best[0] // tile, best[1] // tile


def select_best_resolution(width: int, height: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (w, h) of `pinpoints` that keeps most pixels; ties: the one that wastes least, then the first."""
    best, most_kept, least_waste = None, -1, 0
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = w * h - kept
        if kept > most_kept or (kept == most_kept and waste < least_waste):
            best, most_kept, least_waste = (w, h), kept, waste
    if best is None:
        raise ConfigError("model.aspect=anyres needs model.pinpoints, the (width, height) grids to choose from")
    return best


def unpad_box(width: int, height: int, columns: int, rows: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what a width x height image, once padded, covers of a rows x columns map.

    An odd difference leaves one extra line; a very thin image can leave nothing.
    """
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return pad, rows - pad, 0, columns
    pad = (columns - int(width * (rows / height))) // 2
    return 0, rows, pad, columns - pad

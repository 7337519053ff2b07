"""Features of a frozen tower computed once, so that epochs after it (and later runs) neither decode nor encode an image.

    first start     every image -> views -> tower -> data.feature_store          then rows hold
    later starts    only images that are new or have changed                     features [I, P, C] for images [I, S, S, 3]

The folder is named after the weights of the tower, the layers that are read, the preprocessing and the dtype: another tower
finds nothing there and computes its own. One view of CLIP-L/14-336 is 576 x 1024 bfloat16 = 1.18 MB, so LLaVA's 558K take 658 GB
(resized pixels: 189 GB): what it takes is said before anything is computed, and refused where the disk has not that much room.
Each process computes a share of the images on its own devices; all of them must see the folder.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from vlm_jax.config import ConfigError, VisionConfig, VLMConfig, to_dict
from vlm_jax.data.feature_store import Entry, Features, Writer
from vlm_jax.data.image_cache import Views, cache_bytes, folder_name, gigabytes, identity, most_views
from vlm_jax.data.image_source import ImageError, ImageSource
from vlm_jax.models import vlm
from vlm_jax.nn.params import merge, split
from vlm_jax.parallel import hosts, rules
from vlm_jax.parallel.mesh_config import AXES
from vlm_jax.train.options import TrainConfig
from vlm_jax.train.state import TrainState, chosen

BATCH = 16  # views per device at a time
TOWER, UNUSED = "tower/", "unused/"

Weights = Mapping[str, np.ndarray]


def check_frozen(model: VLMConfig, config: TrainConfig) -> None:
    """Raise ConfigError if the run trains the tower, whose features then change with every update."""
    trained = sorted(path for path in chosen(model, config) if path.startswith(TOWER))
    if trained:
        raise ConfigError(
            f"data.feature_cache keeps the features of a frozen tower, but train.trainable trains {trained[0]}: "
            "take the tower out of train.trainable or leave data.feature_cache empty"
        )


class FeatureCache:
    """A loader of data.pipeline.Rows that gives features; `fill` must have run before the first row is built.

    folder: of the features of all towers. views: how pixels are read, by `threads` readers.
    """

    key = Features.key

    def __init__(self, folder: str | Path, model: VLMConfig, config: TrainConfig, views: Views, threads: int = 4):
        check_frozen(model, config)
        self.folder, self.model, self.config, self.views, self.threads = Path(folder), model, config, views, threads
        self.view_shape = (model.vision.features, model.vision.feature_width)
        self.dtype = jnp.dtype(config.vision_dtype)

    def __call__(self, source: ImageSource) -> tuple[np.ndarray, tuple[int, int]]:
        return self._features(source)

    def fill(self, state: TrainState, sources: Iterable[ImageSource]) -> None:
        """Compute, with the tower of `state`, what the folder lacks; ConfigError if the disk has no room for it."""
        tower = {path.removeprefix(TOWER): _whole(x) for path, x in state.params.items() if path.startswith(TOWER)}
        self.folder = self.folder / tower_name(self.model.vision, tower, self.views, self.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_shared(self.folder)
        self._features = Features(self.folder, self.view_shape, self.dtype, self.views)
        missing, known = self._missing(sources)
        self._say_room(len(missing), known)
        hosts.wait_for_all("features are counted")  # before any process adds some
        began, count = time.perf_counter(), jax.process_count()
        mine = [(key, missing[key]) for key in sorted(missing)[jax.process_index() :: count]]
        broken = self._compute(mine, tower) if mine else 0
        hosts.wait_for_all("features are written")
        if missing:
            self._features.reopen()
            hosts.say(
                f"data.feature_cache holds features of {len(self._features):,} images, {gigabytes(self._features.bytes)}, "
                f"after {time.perf_counter() - began:.0f} s" + (f"; {broken} images are broken" if broken else "")
            )

    def _missing(self, sources: Iterable[ImageSource]) -> tuple[dict[bytes, ImageSource], int]:
        """({key: image} without features, number of others); files that are not there are left to the pipeline to report."""
        missing: dict[bytes, ImageSource] = {}
        known: set[bytes] = set()
        for source in sources:
            try:
                key = identity(source)
            except (OSError, ValueError):
                continue
            if key in known or key in missing:
                continue
            if key in self._features:
                known.add(key)
            else:
                missing[key] = source
        return missing, len(known)

    def _say_room(self, missing: int, known: int) -> None:
        """Say what the features take; ConfigError if the disk has not that much room."""
        most = most_views(self.views.preprocess)
        one = most * self._features.view_bytes
        at_most = "at most " if most > 1 else ""
        hosts.say(
            f"data.feature_cache: features of {known + missing:,} images take {at_most}{gigabytes((known + missing) * one)} "
            f"in {self.folder}; {missing:,} images ({at_most}{gigabytes(missing * one)}) are not there yet"
        )
        free = shutil.disk_usage(self.folder).free
        if missing * one > free:
            pixels = cache_bytes(known + missing, self.views.preprocess)
            raise ConfigError(
                f"the features of {missing:,} images take {at_most}{gigabytes(missing * one)}, but {self.folder} has only "
                f"{gigabytes(free)} left: put data.feature_cache on a larger disk, or leave it empty and set data.pixel_cache, "
                f"whose resized images take {at_most}{gigabytes(pixels)}"
            )

    def _compute(self, items: Sequence[tuple[bytes, ImageSource]], tower: Weights) -> int:
        """Write the features of `items`; returns how many images are broken."""
        run, writer, waiting = self._program(tower), Writer(self.folder), collections.deque()
        bar = tqdm(total=len(items), desc="features", unit="image", disable=not hosts.is_first(), dynamic_ncols=True)

        def store(entries: Sequence[Entry], features: jax.Array) -> None:
            at, array = 0, np.asarray(features)
            for entry in entries:
                writer.add(entry, array[at : at + entry.count])
                at += entry.count
            bar.update(len(entries))

        done = 0
        try:
            for entries, pixels in self._batches(items):
                waiting.append((entries, run(pixels)))
                done += len(entries)
                if len(waiting) > 1:  # one batch is computed while the one before it is written
                    store(*waiting.popleft())
            while waiting:
                store(*waiting.popleft())
            writer.close()
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written to: {error.strerror}; free it or change data.feature_cache"
            ) from error
        finally:
            bar.close()
        return len(items) - done

    def _batches(self, items: Sequence[tuple[bytes, ImageSource]]) -> Iterator[tuple[list[Entry], np.ndarray]]:
        """Whole images in batches of one static shape [N, S, S, 3]; what an image leaves empty is zero."""
        size = self.views.preprocess.size
        devices = jax.local_device_count()
        room = -(-max(BATCH * devices, most_views(self.views.preprocess)) // devices) * devices
        entries: list[Entry] = []
        pixels, used = np.zeros((room, size, size, 3), np.uint8), 0
        for entry, views in self._decoded(items):
            if used + len(views) > room:
                yield entries, pixels
                entries, pixels, used = [], np.zeros_like(pixels), 0
            pixels[used : used + len(views)] = views
            entries.append(entry)
            used += len(views)
        if entries:
            yield entries, pixels

    def _decoded(self, items: Sequence[tuple[bytes, ImageSource]]) -> Iterator[tuple[Entry, np.ndarray]]:
        """Views of the images in order, read ahead by threads; broken ones are left out, training names and counts them."""
        pool, pending = concurrent.futures.ThreadPoolExecutor(self.threads), collections.deque()

        def load(key: bytes, source: ImageSource) -> tuple[Entry, np.ndarray] | None:
            try:
                views, (width, height) = self.views(source)
            except ImageError:
                return None
            return Entry(key, len(views), (width, height)), views

        try:
            for item in items:
                pending.append(pool.submit(load, *item))
                if len(pending) >= 8 * self.threads and (found := pending.popleft().result()):
                    yield found
            while pending:
                if found := pending.popleft().result():
                    yield found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _program(self, tower: Weights) -> Callable[[np.ndarray], jax.Array]:
        """uint8 [N, S, S, 3] -> features [N, P, C], jitted over the devices of this process, each with a copy of the tower."""
        devices = np.array(jax.local_devices()).reshape(-1, 1, 1, 1)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        graph = split(vlm.abstract(self.model).tower)[0]
        weights = {path: jax.device_put(x, everywhere) for path, x in tower.items()}

        @functools.partial(jax.jit, out_shardings=rows)
        def program(weights, images):
            return merge(graph, weights).features(images, self.dtype, self.config.attention)

        def run(images: np.ndarray) -> jax.Array:
            with rules.use(mesh):
                return program(weights, jax.device_put(images, rows))

        return run


def tower_name(vision: VisionConfig, tower: Weights, views: Views, dtype: np.dtype) -> str:
    """Folder of the features that this tower makes of these views, e.g. clip-336-bfloat16-5f0c21aa90d1e2c4."""
    settings = [to_dict(vision), folder_name(views.preprocess), str(dtype)]
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for path in sorted(path for path in tower if not path.startswith(UNUSED)):
        x = np.ascontiguousarray(tower[path])
        digest.update(f"{path} {x.dtype} {x.shape}".encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return f"{vision.kind}-{vision.image_size}-{dtype}-{digest.hexdigest()}"


def _whole(x: jax.Array) -> np.ndarray:
    """A parameter on this host, wherever its shards are."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x)


def _check_shared(folder: Path) -> None:
    """Raise ConfigError, in every process, if they do not see the same folder."""
    if jax.process_count() == 1:
        return
    token = folder / f"seen-{int(multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % (1 << 31))))}"
    if hosts.is_first():
        token.touch()
    hosts.wait_for_all("a file is there")
    seen = multihost_utils.process_allgather(np.array(token.exists()))
    if hosts.is_first():
        token.unlink()
    if not seen.all():
        raise ConfigError(f"data.feature_cache={folder.parent} must be a folder that all hosts see, and some do not")

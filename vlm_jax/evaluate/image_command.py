"""`evaluate --task fid` and `evaluate --task reconstruction`: how good pictures are, without a question asked about them.

    fid              --images PLACE --reference PLACE --weights INCEPTION                 Fréchet distance of two sets of images
                     --images PLACE --weights INCEPTION --statistics out.npz              only the statistics of one
    reconstruction   --model TOKENIZER --images PLACE [--weights INCEPTION] [--lpips VGG16 --lpips HEADS] [--data WATCHES]
                     --images PLACE --reference PLACE ...                                 originals beside pictures of the same names

A PLACE is a folder, an image file, a pattern, a list or shards (see data.image_lists), and for fid also a statistics file (.npz).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from vlm_jax.config import ConfigError, UserError, one_of
from vlm_jax.convert.shards import read_file
from vlm_jax.convert.torch_pickle import read_tensors
from vlm_jax.data.crops import Crop
from vlm_jax.evaluate import image_metrics, inception
from vlm_jax.evaluate.frechet import Statistics, collect, frechet_distance, over_processes, read_statistics
from vlm_jax.evaluate.image_pairs import Measures, Pair, coded_pairs, folder_pairs, loaded
from vlm_jax.evaluate.inception import Inception, read_inception
from vlm_jax.evaluate.watch_survival import FACTS, Reader, true_watches
from vlm_jax.generate.tokenize import Item, named_images, views_of
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.parallel import hosts
from vlm_jax.visual_tokenizers.perceptual import read_lpips

COMPAT = ("", "ssim_range_2", "rfid_double_rescale")  # defects of LlamaGen's and of UniCode's evaluation


@dataclasses.dataclass(frozen=True)
class ImageFlags:
    """The flags of both tasks; see the module and `python -m vlm_jax evaluate --help`."""

    images: Sequence[str] = ()
    reference: str = ""
    weights: str = ""
    statistics: str = ""
    dims: int = 2048
    lpips: Sequence[str] = ()
    crop: str = ""
    size: int = 0
    compat: str = ""
    model: str = ""
    data: str = ""
    dtype: str = ""
    batch: int = 32
    limit: int = 0

    def __post_init__(self):
        if not self.images:
            raise ConfigError("this task needs --images: a folder, an image file, a pattern, a list or shards")
        if self.batch < 1 or self.limit < 0:
            raise ConfigError(f"--batch={self.batch} must be at least 1 and --limit={self.limit} at least 0")
        one_of("--compat", self.compat, COMPAT)
        one_of("--dims", str(self.dims), tuple(map(str, inception.DIMS)))


def fid(flags: ImageFlags) -> dict[str, Any]:
    """{"fid", "images", "reference", "dims", "full_rank"}, numbers of images (0 where a file does not say); fid only with --reference.

    Processes share the images and end with the same result; the first writes --statistics.
    """
    if not flags.reference and not flags.statistics:
        raise ConfigError(
            "--task fid needs --reference (images or statistics to compare with) or --statistics (to write)"
        )
    hosts.initialise()
    places = {"--images": tuple(flags.images)} | ({"--reference": (flags.reference,)} if flags.reference else {})
    # all places are looked at before anything is computed
    known = {flag: read_statistics(where[0]) for flag, where in places.items() if _is_file(where)}
    items = {flag: _items(where, flag, flags.limit) for flag, where in places.items() if flag not in known}
    network = open_network(flags) if items else None
    for flag, found in items.items():
        known[flag] = _statistics(found, flag, network).moments(", ".join(places[flag]))
    images, reference = known["--images"], known.get("--reference")
    if flags.statistics and hosts.is_first():
        images.save(flags.statistics)
    result = {"images": images.count, "dims": images.mu.size, "full_rank": images.full_rank}
    if reference:
        distance, full = frechet_distance(images, reference), images.full_rank and reference.full_rank
        result |= {"fid": distance, "reference": reference.count, "full_rank": full}
    return result


def _is_file(places: Sequence[str]) -> bool:
    return len(places) == 1 and places[0].endswith(".npz")


def _statistics(items: Sequence[Item], flag: str, network: Inception) -> Statistics:
    """Statistics of all images, of which this process reads its share."""
    mine = items[jax.process_index() :: jax.process_count()]
    images = (image for _, image in loaded(mine))
    with _bar(len(mine), f"features of {flag}") as bar:

        def blocks() -> Iterator[np.ndarray]:
            while group := list(itertools.islice(images, network.batch)):
                yield network(group)
                bar.update(len(group))

        return over_processes(collect(blocks(), network.dims))


def reconstruction(flags: ImageFlags) -> dict[str, Any]:
    """What image_pairs.Measures finds, with `codebooks` where a tokenizer made the pictures; crop and size say what was compared."""
    if bool(flags.model) == bool(flags.reference):
        raise ConfigError(
            "--task reconstruction needs either --model (a visual tokenizer) or --reference (pictures of the same names as --images)"
        )
    items = _items(flags.images, "--images", flags.limit)
    said: dict[str, Any] = {}
    if flags.reference:
        first = loaded(items[:1])
        size, rule = next((len(image) for _, image in first), 0), flags.crop or "squash"
        pairs, total = folder_pairs(items, _items([flags.reference], "--reference", flags.limit)), len(items)
    else:
        coder = VisualCoder.open(flags.model, batch=flags.batch, dtype=flags.dtype or "float32")
        views = views_of(coder.config, flags.crop, flags.size)
        if views.count > 1:
            raise ConfigError(f"--crop={views.rule} gives {views.count} views of an image: choose one that gives one")
        counts, size, rule = image_metrics.CodeCounts(coder.config.quantizer), views.size, views.rule
        pairs, total = coded_pairs(items, coder, lambda source: views.load(source)[0][0], counts), len(items)
        said = {"crop": rule, "size": size}
    measures = Measures(
        flags.batch,
        network=open_network(flags) if flags.weights else None,
        lpips=jax.device_put(read_lpips(_tensors(flags.lpips))) if flags.lpips else {},
        watches={str(i): watch for i, watch in enumerate(true_watches(flags.data))} if flags.data else {},
        reader=Reader(Crop(size, rule)) if flags.data else None,
        data_range=image_metrics.SSIM_RANGE_2 if flags.compat == "ssim_range_2" else 255.0,
        washed=flags.compat == "rfid_double_rescale",
    )
    with _bar(total, "pictures") as bar:

        def counted() -> Iterator[Pair]:
            for pair in pairs:
                yield pair
                bar.update()

        result = said | measures(counted())
    return result if flags.reference else result | {"codebooks": counts.summary()}


def open_network(flags: ImageFlags) -> Inception:
    """FID's network with the weights of --weights."""
    if not flags.weights:
        raise ConfigError(
            f"--weights is empty: features need FID's Inception network, give the file {inception.FILE} that pytorch-fid publishes"
        )
    params = read_inception(_tensors([flags.weights]), flags.weights)
    return Inception(params, flags.dims, flags.batch, file=flags.weights)


def _tensors(files: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of weight files, .safetensors or torch's; CheckpointError names one that is not there or is none."""
    found = {}
    for file in files:
        lazy = read_file(Path(file)) if file.endswith(".safetensors") else read_tensors(file)
        found |= {name: tensor.read(()) for name, tensor in lazy.items()}
    return found


def _items(places: Sequence[str], flag: str, limit: int) -> list[Item]:
    try:
        return named_images(places)[: limit or None]
    except UserError as error:
        raise type(error)(str(error).replace("--images", flag)) from error


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="image", disable=not hosts.is_first(), dynamic_ncols=True)


TASKS = {"fid": fid, "reconstruction": reconstruction}


def run(task: str, flags: ImageFlags) -> dict[str, Any]:
    """The result of a task with the time it took."""
    start = time.monotonic()
    asked = {"model": flags.model, "images": list(flags.images), "reference": flags.reference, "compat": flags.compat}
    asked = {f"--{name}": value for name, value in asked.items() if value}
    result = TASKS[task](flags)
    return {"task": task, "asked": asked, "seconds": round(time.monotonic() - start, 1), **result}


def table(result: dict[str, Any]) -> str:
    """The numbers, a line each."""
    lines = []
    forms = {"fid": ".3f", "rfid": ".3f", "psnr": ".2f", "ssim": ".4f", "lpips": ".4f", "mse": ".6f"}
    for name, form in forms.items():
        if name in result:
            lines.append(f"{name:<12}" + (f"{result[name]:>10{form}}" if result[name] is not None else "  identical"))
    counts = [f"{result['images']:,} images"] if result["images"] else []
    if result.get("reference"):
        counts.append(f"{result['reference']:,} in the reference")
    lines.append(", ".join(counts) or "numbers of images unknown")
    for name, of in result.get("codebooks", {}).items():
        lines.append(f"{name:<12}{of['usage']:>10.2%} of {of['codes']:,} codes, perplexity {of['perplexity']:,.1f}")
    if "watches" in result:
        lines.append(f"{'read back':<12}{'originals':>10}{'pictures':>10}")
        for fact in (*FACTS, "time", "all"):
            lines.append(
                f"{fact:<12}" + "".join(f"{result['watches'][s][fact]:>10.3f}" for s in ("originals", "pictures"))
            )
    if not result.get("full_rank", True):
        lines.append(
            f"fewer images than the {result['dims']} features: the covariance lacks full rank, compare only with equal numbers of images"
        )
    return "\n".join(lines)

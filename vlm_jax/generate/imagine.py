"""`python -m vlm_jax imagine`: pictures from a prior over the codes of a visual tokenizer.

    OUT/00000_207.png ...    one picture per condition and number, named by class or by the caption's number (00000.png without any)
    OUT/grid.png             the first of them, one condition per row
    OUT/samples.json         {"images": [{"file", "class" or "caption"}, ...], "sampling": {...}, "seed": 0}

A picture depends on its condition, its number and the seed, not on the batch that it was drawn in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import ConfigError, UserError
from vlm_jax.convert.prior import Prior, load_prior
from vlm_jax.convert.visual_tokenizer import load_tokenizer
from vlm_jax.generate.caption_features import caption_features
from vlm_jax.generate.load import usual_dtype, usual_mesh
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.parallel import hosts, rules
from vlm_jax.visual_tokenizers.codebook import TABLE
from vlm_jax.visual_tokenizers.encoding import entries_of
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.priors import gpt_sampling, hierarchy_sampling, models
from vlm_jax.visual_tokenizers.priors.hierarchy_options import RQTransformerConfig
from vlm_jax.visual_tokenizers.priors.models import Config
from vlm_jax.visual_tokenizers.priors.options import GPTConfig, Sampling
from vlm_jax.visual_tokenizers.priors.sampling import check_guidance

SHOWN, GAP = 64, 2  # pictures of the grid, white pixels between them
SCALE = 4.0  # of guidance where none is given


class ConditionError(UserError):
    """A condition that a prior cannot be given; the message says which and why."""


class Conditions(NamedTuple):
    """One per row: values (labels int32 [N], tokens of texts [N, S] or features of captions [N, S, C]), mask of the features [N, S] or
    None, and what they are called in names of files ("" where there is no condition).
    """

    values: np.ndarray
    mask: np.ndarray | None
    names: list[str]


def imagine(
    prior: str, tokenizer: str, out: str, classes: str = "", captions: str = "",
    text: Sequence[str] = (), t5: str = "", count: int = 1, batch: int = 8, seed: int = 0,
    dtype: str = "", grid: int = 0, heads: int = 0, scale: float = 0.0, **sampling: Any,
) -> None:  # fmt: skip
    """Draw `count` pictures of every class, of every caption of the file `captions`, or of every `text`, into the folder `out`.

    t5: directory of the T5 that makes features of texts.
    batch: pictures drawn together. dtype: of the prior, default bfloat16 on accelerators. grid, heads: of a foreign checkpoint, see
    convert.prior. scale: 0 is SCALE for a prior that can be guided, else 1. sampling: other fields of priors.options.Sampling.
    """
    if count < 1 or batch < 1:
        raise ConfigError(f"--count={count} and --batch={batch} must be at least 1")
    found = load_prior(prior, grid, heads)
    how = Sampling(scale=scale or (SCALE if found.config.guidable else 1.0), **sampling)
    check_guidance(found.config, how)
    wanted = conditions(found.config, classes, captions, text, t5, dtype or usual_dtype())
    codec = load_tokenizer(tokenizer)
    check_fit(found.config, codec.config, prior, tokenizer)
    coder, table = VisualCoder(codec, batch=batch), codec.codebooks.get("codebook", {}).get(TABLE)
    wanted = Conditions(*(None if x is None else np.repeat(x, count, axis=0) for x in wanted[:2]), wanted.names)
    labels = [name for name in wanted.names for _ in range(count)]
    folder, entries, shown = Path(out), [], []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_codes(found, wanted, how, batch=min(batch, len(labels)), seed=seed, dtype=dtype, table=table)
    bar = tqdm(total=len(labels), desc="pictures", unit="image", disable=not hosts.is_first(), dynamic_ncols=True)
    with bar:
        for number, ((picture,), label) in enumerate(zip(coder.decode_each(drawn), labels)):
            file = f"{number:05d}_{label}.png" if label else f"{number:05d}.png"
            Image.fromarray(picture[0]).save(folder / file)
            what = "class" if found.config.condition == "class" else "caption"
            entries.append({"file": file} | ({what: int(label)} if label else {}))
            shown += [picture[0]] if number < SHOWN else []
            bar.update()
    Image.fromarray(tiled(shown, min(count, SHOWN))).save(folder / "grid.png")
    about = {"images": entries, "sampling": dataclasses.asdict(how), "seed": seed}
    (folder / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
    hosts.say(f"{len(labels)} pictures are in {folder}; grid.png shows the first {len(shown)}")


def conditions(
    config: Config, classes: str, captions: str, text: Sequence[str] = (), t5: str = "", dtype: str = "float32"
) -> Conditions:
    """What the flags ask for; ConditionError in one sentence where the prior cannot be given it."""
    if config.condition == "none":
        if classes or captions or text or t5:
            raise ConditionError(
                "this prior draws without a condition: give only --count, neither classes nor captions"
            )
        return Conditions(np.zeros(1, np.int32), None, [""])
    if config.condition == "text":
        if classes or text or t5 or not captions:
            raise ConditionError("this prior draws texts: give their tokens, --captions FILE.npz with `tokens` [N, S]")
        return tokens_of_file(config, captions)
    if config.condition == "caption":
        if classes or bool(captions) == bool(text) or bool(text) != bool(t5):
            raise ConditionError(
                "this prior draws captions: give --text (several times) with --t5 DIR, or their features, --captions FILE.npz"
            )
        if captions:
            return features_of_file(config, captions)
        return padded(config, *caption_features(t5, text, config.caption_slots, dtype), t5)
    if captions or text or t5 or not classes:
        raise ConditionError("this prior draws classes: give --classes, e.g. 207,360, and neither text nor captions")
    try:
        labels = [int(word) for word in classes.split(",")]
    except ValueError:
        raise ConditionError(f"--classes={classes} must be numbers with commas between them, e.g. 207,360") from None
    outside = next((label for label in labels if not 0 <= label < config.numbers), None)
    if outside is not None:
        raise ConditionError(f"--classes names {outside}, but this prior knows the classes 0 to {config.numbers - 1}")
    return Conditions(np.asarray(labels, np.int32), None, list(map(str, labels)))


def features_of_file(config: GPTConfig, file: str) -> Conditions:
    """Features of captions from an npz with `captions` [N, S, C] and `mask` [N, S], 1 for what is no padding."""
    features, mask = _arrays(file, {"captions": "[N, S, C]", "mask": "[N, S]"})
    return padded(config, features, mask > 0, file)


def tokens_of_file(config: Config, file: str) -> Conditions:
    """Tokens of texts from an npz with `tokens` int [N, S], cut or padded with token 0 at the end as training does."""
    (tokens,) = _arrays(file, {"tokens": "[N, S]"})
    slots, known = config.condition_tokens, tokens.ndim == 2 and tokens.dtype.kind in "iu" and tokens.size
    if not known or tokens.min() < 0 or tokens.max() >= config.numbers:
        raise ConditionError(
            f"{file} has tokens {tokens.dtype} {tokens.shape}: this prior takes integers [N, S] from 0 to {config.numbers - 1}"
        )
    values = np.zeros((len(tokens), slots), np.int32)
    values[:, : tokens.shape[1]] = tokens[:, :slots]
    return Conditions(values, None, list(map(str, range(len(values)))))


def _arrays(file: str, wanted: dict[str, str]) -> list[np.ndarray]:
    """Arrays of an npz file; wanted: their names and shapes."""
    try:
        with np.load(file) as arrays:
            missing = next((key for key in wanted if key not in arrays.files), None)
            found = [] if missing else [arrays[key] for key in wanted]
    except (OSError, ValueError) as error:
        raise ConditionError(f"{file} cannot be read as an npz file ({error})") from error
    if missing:
        needs = " and ".join(f"{key} {shape}" for key, shape in wanted.items())
        raise ConditionError(f"{file} has no array {missing!r}: it needs {needs}")
    return found


def padded(config: GPTConfig, features: np.ndarray, mask: np.ndarray, where: str) -> Conditions:
    """Features [N, S, C] as the prior was trained on them: padding moved to the left and zeroed; `where` they are from."""
    slots, width = config.caption_slots, config.caption_width
    fits = features.ndim == 3 and features.shape[:2] == mask.shape and features.shape[1] <= slots and len(features)
    if not fits or features.shape[2] != width:
        raise ConditionError(
            f"{where} has captions {features.shape} and mask {mask.shape}: this prior takes at most {slots} features of {width} "
            "numbers for each of one or more captions"
        )
    values, real = np.zeros((len(features), slots, width), np.float32), np.zeros((len(features), slots), bool)
    for row, (feature, kept) in enumerate(zip(features, mask)):
        if kept.any():
            values[row, -kept.sum() :], real[row, -kept.sum() :] = feature[kept], True
    return Conditions(values, real, list(map(str, range(len(values)))))


def check_fit(config: Config, codec: TokenizerConfig, prior: str, tokenizer: str) -> None:
    """Raise ConfigError unless the tokenizer decodes what the prior draws."""
    q = codec.quantizer
    depth = q.depth if q.kind == "rq" else 1
    there = entries_of(codec), depth, q.factor
    entries = tuple(n for n, _ in config.levels_of_codes)
    drawn = entries, config.depth if isinstance(config, RQTransformerConfig) else 1, 2
    if there[:2] != drawn[:2] or len(entries) > 1 and there != drawn:
        raise ConfigError(f"{prior} draws {_said(*drawn)}, but {tokenizer} has {_said(*there)}")


def _said(entries: tuple[int, ...], depth: int, factor: int) -> str:
    if len(entries) > 1:
        return f"{len(entries)} levels of {' and '.join(map(str, entries))} codes, each {factor} times as fine"
    return f"one of {entries[0]} codes" + (f" at each of {depth} depths" if depth > 1 else " at each place")


def draw_codes(
    prior: Prior, wanted: Conditions, how: Sampling, *, batch: int = 8, seed: int = 0, dtype: str = "",
    table: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:  # fmt: skip
    """Codes of every condition in order, one int32 [1, h, w(, depth)] per level; the last batch is filled up with its first row.

    table: the tokenizer's, where the prior reads it.
    """
    dtype, mesh = dtype or usual_dtype(), usual_mesh()
    with contextlib.nullcontext() if mesh is None else rules.use(mesh):
        where, run = models.shardings(prior.config), program(prior.config, how, dtype, table)
        params = {path: x.astype(dtype) for path, x in prior.params.items()}
        params = jax.device_put(params, where)
    one = jax.random.key(seed)
    for start in range(0, len(wanted.values), batch):
        numbers = np.arange(start, start + batch)
        rows = np.where(numbers < len(wanted.values), numbers, start)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(one, numbers)
        mask = None if wanted.mask is None else wanted.mask[rows]
        with contextlib.nullcontext() if mesh is None else rules.use(mesh):
            levels = run(params, wanted.values[rows], keys, mask)
        yield from (tuple(level[i : i + 1] for level in levels) for i in range(min(batch, len(wanted.values) - start)))


def program(
    config: Config, how: Sampling, dtype: str, table: np.ndarray | None
) -> Callable[..., tuple[np.ndarray, ...]]:
    """(params, values, keys, mask) -> codes int32 [B, h, w(, depth)] per level: one compiled loop for whole images."""
    if isinstance(config, GPTConfig):
        side, drawn = config.grid, gpt_sampling.sampler(config, how, dtype)
        return lambda *arguments: (np.asarray(drawn(*arguments)).reshape(-1, side, side),)
    several = hierarchy_sampling.sampler(config, how, dtype)
    reads = isinstance(config, RQTransformerConfig) and config.reads_codebook

    def run(params: dict, values: np.ndarray, keys: jax.Array, mask: None) -> tuple[np.ndarray, ...]:
        found = several(params, keys, None if config.condition == "none" else values, table if reads else None)
        return tuple(map(np.asarray, found if isinstance(found, tuple) else (found,)))

    return run


def tiled(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures uint8 [S, S, 3] as one, row by row, white where there is none."""
    columns = columns if columns > 1 else max(1, round(len(pictures) ** 0.5))
    rows, size = -(-len(pictures) // columns), len(pictures[0]) + GAP
    whole = np.full((rows * size - GAP, columns * size - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = number // columns * size, number % columns * size
        whole[y : y + size - GAP, x : x + size - GAP] = picture
    return whole

"""`python -m vlm_jax imagine`: pictures from a prior over the codes of a visual tokenizer.

    OUT/00000_207.png ...    one picture per condition and number, named by class or by the caption's number
    OUT/grid.png             the first of them, one condition per row
    OUT/samples.json         {"images": [{"file", "class" or "caption"}, ...], "sampling": {...}, "seed": 0}

A picture depends on its condition, its number and the seed, not on the batch that it was drawn in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from vlm_jax.config import ConfigError, UserError
from vlm_jax.convert.prior import Prior, load_prior
from vlm_jax.generate.caption_features import caption_features
from vlm_jax.generate.load import usual_dtype, usual_mesh
from vlm_jax.generate.visual_codes import VisualCoder
from vlm_jax.parallel import hosts, rules
from vlm_jax.visual_tokenizers.priors import gpt
from vlm_jax.visual_tokenizers.priors.gpt_sampling import check_guidance, sampler
from vlm_jax.visual_tokenizers.priors.options import GPTConfig, Sampling

SHOWN, GAP = 64, 2  # pictures of the grid, white pixels between them


class ConditionError(UserError):
    """A condition that a prior cannot be given; the message says which and why."""


class Conditions(NamedTuple):
    """One per row: values (labels int32 [N], or features of captions [N, S, C]), mask of the features [N, S] or None, and what they are
    called in names of files.
    """

    values: np.ndarray
    mask: np.ndarray | None
    names: list[str]


def imagine(
    prior: str, tokenizer: str, out: str, classes: str = "", captions: str = "",
    text: Sequence[str] = (), t5: str = "", count: int = 1, batch: int = 8, seed: int = 0,
    dtype: str = "", grid: int = 0, heads: int = 0, **sampling: Any,
) -> None:  # fmt: skip
    """Draw `count` pictures of every class, of every caption of the file `captions`, or of every `text`, into the folder `out`.

    t5: directory of the T5 that makes features of texts.
    batch: pictures drawn together. dtype: of the prior, default bfloat16 on accelerators. grid, heads: of a foreign checkpoint, see
    convert.prior. sampling: fields of priors.options.Sampling.
    """
    if count < 1 or batch < 1:
        raise ConfigError(f"--count={count} and --batch={batch} must be at least 1")
    how = Sampling(**sampling)
    found = load_prior(prior, grid, heads)
    check_guidance(found.config, how)
    wanted = conditions(found.config, classes, captions, text, t5, dtype or usual_dtype())
    coder = VisualCoder.open(tokenizer, batch=batch)
    check_fit(found.config, coder, prior, tokenizer)
    wanted = Conditions(*(None if x is None else np.repeat(x, count, axis=0) for x in wanted[:2]), wanted.names)
    labels = [name for name in wanted.names for _ in range(count)]
    folder, entries, shown = Path(out), [], []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_codes(found, wanted, how, batch=min(batch, len(labels)), seed=seed, dtype=dtype)
    bar = tqdm(total=len(labels), desc="pictures", unit="image", disable=not hosts.is_first(), dynamic_ncols=True)
    with bar:
        for number, ((picture,), label) in enumerate(zip(coder.decode_each(drawn), labels)):
            file = f"{number:05d}_{label}.png"
            Image.fromarray(picture[0]).save(folder / file)
            entries.append({"file": file, found.config.condition: int(label)})
            shown += [picture[0]] if number < SHOWN else []
            bar.update()
    Image.fromarray(tiled(shown, min(count, SHOWN))).save(folder / "grid.png")
    about = {"images": entries, "sampling": dataclasses.asdict(how), "seed": seed}
    (folder / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
    hosts.say(f"{len(labels)} pictures are in {folder}; grid.png shows the first {len(shown)}")


def conditions(
    config: GPTConfig, classes: str, captions: str, text: Sequence[str] = (), t5: str = "", dtype: str = "float32"
) -> Conditions:
    """What the flags ask for; ConditionError in one sentence where the prior cannot be given it."""
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
    outside = next((label for label in labels if not 0 <= label < config.classes), None)
    if outside is not None:
        raise ConditionError(f"--classes names {outside}, but this prior knows the classes 0 to {config.classes - 1}")
    return Conditions(np.asarray(labels, np.int32), None, list(map(str, labels)))


def features_of_file(config: GPTConfig, file: str) -> Conditions:
    """Features of captions from an npz with `captions` [N, S, C] and `mask` [N, S], 1 for what is no padding."""
    try:
        with np.load(file) as arrays:
            missing = next((key for key in ("captions", "mask") if key not in arrays.files), None)
            features, mask = (None, None) if missing else (arrays["captions"], arrays["mask"] > 0)
    except (OSError, ValueError) as error:
        raise ConditionError(f"{file} cannot be read as an npz file ({error})") from error
    if missing:
        raise ConditionError(f"{file} has no array {missing!r}: it needs captions [N, S, C] and mask [N, S]")
    return padded(config, features, mask, file)


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


def check_fit(config: GPTConfig, coder: VisualCoder, prior: str, tokenizer: str) -> None:
    """Raise ConfigError unless the tokenizer decodes what the prior draws."""
    q = coder.config.quantizer
    if q.kind != "vq" or q.codes_of(0) != config.codes:
        what = f"{q.codes_of(0)} codes" if q.kind == "vq" else f"codes of several levels or depths (kind={q.kind})"
        raise ConfigError(f"{prior} draws one of {config.codes} codes at each place, but {tokenizer} has {what}")


def draw_codes(
    prior: Prior, wanted: Conditions, how: Sampling, *, batch: int = 8, seed: int = 0, dtype: str = ""
) -> Iterator[tuple[np.ndarray]]:
    """(codes int32 [1, grid, grid],) of every condition in order; the last batch is filled up with its first row."""
    dtype, mesh, side = dtype or usual_dtype(), usual_mesh(), prior.config.grid
    with contextlib.nullcontext() if mesh is None else rules.use(mesh):
        where, run = gpt.shardings(prior.config), sampler(prior.config, how, dtype)
        params = {path: x.astype(dtype) for path, x in prior.params.items()}
        params = jax.device_put(params, where)
    one = jax.random.key(seed)
    for start in range(0, len(wanted.values), batch):
        numbers = np.arange(start, start + batch)
        rows = np.where(numbers < len(wanted.values), numbers, start)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(one, numbers)
        mask = None if wanted.mask is None else wanted.mask[rows]
        with contextlib.nullcontext() if mesh is None else rules.use(mesh):
            codes = np.asarray(run(params, wanted.values[rows], keys, mask)).reshape(-1, 1, side, side)
        yield from ((row,) for row in codes[: len(wanted.values) - start])


def tiled(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Pictures uint8 [S, S, 3] as one, row by row, white where there is none."""
    columns = columns if columns > 1 else max(1, round(len(pictures) ** 0.5))
    rows, size = -(-len(pictures) // columns), len(pictures[0]) + GAP
    whole = np.full((rows * size - GAP, columns * size - GAP, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        y, x = number // columns * size, number % columns * size
        whole[y : y + size - GAP, x : x + size - GAP] = picture
    return whole

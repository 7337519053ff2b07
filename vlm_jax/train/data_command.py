"""The bodies of `python -m vlm_jax data check | build | show`: a recipe's data, opened as training opens it, without a running model."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_jax import recipe as recipes
from vlm_jax.config import ConfigError, UserError, VLMConfig, one_of
from vlm_jax.data import build as builds
from vlm_jax.data import check_report
from vlm_jax.data import show as shows
from vlm_jax.data.check import Gallery
from vlm_jax.data.dataset import named_sources, open_layout, open_sources, packing_of
from vlm_jax.data.findings import findings, unusable
from vlm_jax.data.image_cache import Views
from vlm_jax.data.images import Preprocess, load_views
from vlm_jax.data.manifest import DECODE, EXISTS, HEADER, Layout
from vlm_jax.data.measuring import Means, measure_sources
from vlm_jax.data.options import DataConfig
from vlm_jax.data.pipeline import Load
from vlm_jax.data.show_page import write_page
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.recipe import Recipe
from vlm_jax.train.weights import open_tokenizer, open_weights

DEPTHS = {"decode": DECODE, "header": HEADER, "skip": EXISTS}
SHOWN = 5  # records that were left out, named for each source


@dataclasses.dataclass(frozen=True)
class RecipeData:
    """A recipe with the records of every source by name."""

    recipe: Recipe
    sources: Mapping[str, Sequence[Any]]

    @property
    def cache(self) -> Path:
        """Where training keeps what it measures."""
        return Path(self.recipe.data.cache or Path(self.recipe.output) / "cache")

    def layout(self) -> tuple[Layout, Tokenizer]:
        """What turns records into slots, as training does it."""
        tokenizer = open_tokenizer(self.recipe)
        return open_layout(self.recipe.data, model_of(self.recipe, tokenizer), tokenizer), tokenizer


def open_data(config: Any, **changes: Any) -> RecipeData:
    """The data of the recipe in ConfigDict `config`; smart-watches are drawn first if it asks for them. changes: of every source."""
    recipe = recipes.of_vlm(config)
    if recipe.data.generated_watches:
        from vlm_jax.train.command import with_generated_data  # here, because it loads all of training

        recipe = with_generated_data(recipe, Path(recipe.output) / "data", progress=sys.stderr.isatty())
    if changes:
        changed = {name: dataclasses.replace(one, **changes) for name, one in named_sources(recipe.data).items()}
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=(), sources=changed))
    cache = Path(recipe.output) / "cache"
    return RecipeData(recipe, open_sources(recipe.data, cache))


def model_of(recipe: Recipe, tokenizer: Tokenizer) -> VLMConfig:
    """How large images are and how many slots they take: as the weights say, or the recipe where they are not at hand."""
    init = recipe.init
    if not (init.checkpoint or init.llm or init.vision):
        return recipe.model
    try:
        return open_weights(recipe, tokenizer)[0]
    except (UserError, OSError) as error:
        print(f"the size of images is that of the recipe, because the weights cannot be read: {error}", file=sys.stderr)
        return recipe.model


def check(config: Any, out: str = "", images: str = "decode") -> int:
    """Read all data once and say what is in it; UserError if training would refuse it. images: one of DEPTHS."""
    one_of("--images", images, tuple(DEPTHS))
    opened = open_data(config)
    data, sources = opened.recipe.data, opened.sources
    layout, _ = opened.layout()
    gallery = Gallery(images, _loader(opened.recipe, layout.config))
    looking = dataclasses.replace(layout, depth=DEPTHS[images], look=gallery.look)
    with tqdm(total=sum(map(len, sources.values())), desc="check", unit="record", disable=None) as bar:
        manifests = measure_sources(
            sources, looking, None, Means(opened.cache, data.threads, data.processes, bar.update)
        )
    how = packing_of(data, max_bad=opened.recipe.train.max_bad_samples)
    bad = unusable(sources, manifests, gallery)
    found = findings(sources, manifests, bad, None if data.processes else gallery, how)
    folder = Path(out or Path(opened.recipe.output) / "data")
    check_report.write(folder, found, bad, manifests, layout.limit)
    print(check_report.describe(found))
    print(f"\nwritten to {folder}: check.json, bad.jsonl, lengths.png, images.png")
    print(
        f"kept in {opened.cache}: what was measured; training with this data and this cache does not measure it again"
    )
    if found["problem"]:
        raise UserError(found["problem"])
    return 0


def _loader(recipe: Recipe, model: VLMConfig) -> Load:
    """How training decodes images; data.pixel_cache is filled by the way unless other processes do the reading."""
    how, d = Preprocess.of(model), recipe.data
    return Views(how, d.pixel_cache) if d.pixel_cache and not d.processes else functools.partial(load_views, how=how)


def build(
    config: Any, out: str, shards: int = 0, format: str = "array_record", flatten: str = "", **generation: Any
) -> int:
    """Write the usable records with their images, or (task="generation") captions as requests to draw the image."""
    opened = open_data(config, **({"flatten": flatten} if flatten else {}))
    data, sources, named = opened.recipe.data, opened.sources, named_sources(opened.recipe.data)
    task = generation.pop("task", "")
    one_of("--task", task, ("", "generation"))
    if task:
        folders = {name: source.image_folder or data.image_folder for name, source in named.items()}
        written, skipped = builds.build_generation(sources, folders, Path(out), **generation)
        print(
            f"{out}: {written:,} requests for an image" + (f", {skipped:,} records cannot be used" if skipped else "")
        )
        print(f"put it into a recipe with the same image folder: Source(path={out!r})")
        return 0
    made = builds.build_shards(
        sources, Path(out), form=format, shards=shards, threads=data.threads, progress=sys.stderr.isatty()
    )
    for name, (path, written) in made.items():
        files = f"{len(written.files)} files" if len(written.files) > 1 else "1 file"
        print(
            f"{path}: {written.records:,} records and {written.images:,} images of {name} in {files}, "
            f"{written.bytes / 1e6:,.1f} MB"
        )
        reasons = ", ".join(f"{count:,} {check_report.WORDS.get(why, why)}" for why, count in written.reasons.items())
        if reasons:
            print(f"  left out: {reasons}")
        for left_out in written.skipped[:SHOWN]:
            print(f"    {left_out.sentence}")
    print(f"train on it with\n{builds.recipe_lines(data, named, made)}")
    return 0


def show(config: Any, n: int = 8, out: str = "", source: str = "", seed: int = 0) -> int:
    """Write the page of `n` random samples."""
    opened = open_data(config)
    data, sources = opened.recipe.data, opened.sources
    if source:
        if source not in sources:
            raise ConfigError(f"--source={source} is unknown: there are {', '.join(sources)}")
        sources = {source: sources[source]}
    layout, tokenizer = opened.layout()
    read = shows.Reader(layout, tokenizer, _loader(opened.recipe, layout.config), data.seed)
    shown, skipped = shows.choose(sources, read, n, seed)
    if not shown:
        first = skipped[0] if skipped else "there is no record"
        raise UserError(f"none of the {len(skipped)} records that were drawn can be shown; the first: {first}")
    page = Path(out or Path(opened.recipe.output) / "data" / "show.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_page(
        page, "What the model reads", _facts(data, layout), shown, shows.rows(sources, read, shown, data), skipped
    )
    print(
        f"{page}: {len(shown)} samples" + (f"; {len(skipped)} more were drawn that cannot be used" if skipped else "")
    )
    return 0


def _facts(data: DataConfig, layout: Layout) -> str:
    """One line about a recipe's format and limits."""
    size = layout.config.vision.image_size
    return (
        f"Template {data.template}. Images: {layout.config.aspect}, {size} x {size} pixels. Rows of {data.row_length:,} slots and "
        f"{data.views_per_row} views, samples of at most {layout.limit:,} slots."
    )

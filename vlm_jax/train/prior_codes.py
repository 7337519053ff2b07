"""Codes of images inside the step of a prior: a frozen tokenizer encodes every batch, hard or with soft labels.

frozen   tokenizer/<path>, codebooks/<book>/<field>      encoder and bottleneck, laid out like those of a tokenizer that trains
hard     codes of `tokenize`                             soft   codes and labels of priors.soft_labels, codes drawn or nearest
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from vlm_jax.config import ConfigError
from vlm_jax.convert.visual_tokenizer import Tokenizer
from vlm_jax.data.code_rows import Levels, code_keys, soft_keys
from vlm_jax.nn.params import logical_axes, merge, split
from vlm_jax.parallel import rules
from vlm_jax.train.prior_options import PriorTrainConfig
from vlm_jax.train.tokenizer_state import TOKENIZER, below, books_of, leaves_of_books, under
from vlm_jax.visual_tokenizers import encoding, language
from vlm_jax.visual_tokenizers.options import TokenizerConfig
from vlm_jax.visual_tokenizers.priors.soft_labels import check_soft, soft_labels


@dataclasses.dataclass(frozen=True)
class ImageCoder:
    """A tokenizer, and how codes are taken from it; raises ConfigError where it has no soft labels."""

    tokenizer: Tokenizer
    how: PriorTrainConfig

    def __post_init__(self):
        if self.how.soft_temperature:
            check_soft(self.tokenizer.config.quantizer)

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """What the state keeps of the tokenizer: not its decoder."""
        wanted = split(encoding.abstract_encoder(self.tokenizer.config))[1]
        params = below(TOKENIZER, {path: self.tokenizer.params[path] for path in wanted})
        return params | leaves_of_books(self.tokenizer.codebooks)

    def shardings(self) -> dict[str, NamedSharding] | None:
        """{path: NamedSharding} of the leaves under the mesh in use, None without one."""
        current = rules.current()
        if current is None:
            return None
        axes = below(TOKENIZER, logical_axes(encoding.abstract_encoder(self.tokenizer.config)))

        def place(path: str, x: np.ndarray) -> NamedSharding:
            names = axes[path] if path in axes else language.AXES.get(path.rpartition("/")[2], ())
            return rules.sharding((None,) * (x.ndim - len(names)) + tuple(names), x.shape, *current)

        return {path: place(path, x) for path, x in self.leaves.items()}

    def __call__(
        self, leaves: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array
    ) -> dict[str, jax.Array]:
        """The batch with codes, and with soft labels where they are asked for, in place of images uint8 [B, S, S, 3]."""
        how, books = self.how, books_of(leaves)
        model = merge(split(encoding.abstract_encoder(self.tokenizer.config))[0], under(TOKENIZER, leaves))
        rest, pixels = {k: x for k, x in batch.items() if k != "images"}, batch["images"]
        if not how.soft_temperature:
            codes = encoding.encode(model, pixels, books, how.tokenizer_dtype)
            return rest | dict(zip(code_keys(len(codes)), codes))
        with encoding.exact(how.tokenizer_dtype):
            z = model.latents(encoding.to_unit(pixels, how.tokenizer_dtype))
            drawn = key if how.stochastic_codes else None
            codes, labels = soft_labels(model.bottleneck, z, books, how.soft_temperature, drawn)
        labels = [rules.shard(x, "batch", *(None,) * (x.ndim - 2), "act_vocab") for x in labels]
        return rest | dict(zip(code_keys(len(codes)), codes)) | dict(zip(soft_keys(len(codes)), labels))


def size_of(c: TokenizerConfig, needed: Levels, name: str) -> int:
    """Pixels of images whose codes are those that a prior needs (entries, shape per level); ConfigError if there are none."""
    size = needed[-1][1][0] * c.autoencoder.reduction
    there = encoding.code_shapes(c, size)
    if there != tuple(needed):
        found, wanted = (
            " and ".join(f"{' x '.join(map(str, shape))} out of {n}" for n, shape in x) for x in (there, needed)
        )
        raise ConfigError(
            f"init.tokenizer={name} makes codes of {found} from images of {size} pixels, but this prior needs {wanted}: see prior.grid, "
            "prior.depth and prior.codes"
        )
    return size

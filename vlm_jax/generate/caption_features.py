"""Features of captions for text-conditional priors: the hidden states of a T5 encoder, as LlamaGen takes them from FLAN-T5 XL.

    text -> lower case, </s> behind -> encoder -> [slots, C], padding and what is beyond `slots` left out

LlamaGen also takes web addresses, HTML and the like out of captions, as PixArt does; of a plain prompt nothing is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlm_jax.config import ConfigError, T5Config
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.models.t5 import T5
from vlm_jax.nn.params import merge, split


def caption_features(
    directory: str, texts: Sequence[str], slots: int, dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [N, slots, C], mask bool [N, slots]) of texts, padded with zeros on the right.

    directory: a T5 with its tokenizer. ConfigError names a text of which nothing is left, or a directory that holds no T5.
    """
    tokenizer, ids = load_tokenizer(directory), []
    for number, text in enumerate(texts):
        found = tokenizer.encode(text.lower().strip(), special=False)
        if not found:
            raise ConfigError(f"text {number} is empty: a caption needs words")
        ids.append([*found[: slots - 1], tokenizer.eos_id])
    mask = np.arange(slots) < np.array([len(one) for one in ids])[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(ids)
    graph, params = _encoder(directory, dtype)

    @jax.jit
    def encode(params: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        model = merge(graph, params)
        hidden = model.encode(model.embed(tokens, jnp.dtype(dtype)), mask.astype(jnp.int32))
        return hidden.astype(jnp.float32) * mask[..., None]

    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        rows = [np.asarray(encode(params, tokens[i : i + 1], mask[i : i + 1])) for i in range(len(texts))]
    return np.concatenate(rows), mask


def _encoder(directory: str, dtype: str) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
    """(structure, parameters) of the encoder of a T5 directory; its decoder is never read."""
    checkpoint = open_checkpoint(directory, partial=True)
    if not isinstance(checkpoint.config.llm, T5Config):
        raise ConfigError(f"{directory} holds no T5: features of captions come from the encoder of one")
    model = nnx.eval_shape(lambda: T5(checkpoint.config.llm, nnx.Rngs(0)))
    model.decoder = model.head = None
    graph, shapes = split(model)
    return graph, {path: jnp.asarray(checkpoint.read(f"llm/{path}"), dtype) for path in shapes}

"""A model directory as training exports it, small enough to be made in a test: random weights, a word tokenizer, template v1."""

import numpy as np

from vlm_jax.config import LLMConfig, VisionConfig, VLMConfig
from vlm_jax.convert.write import export
from vlm_jax.data.chat_template import chat_template
from vlm_jax.data.new_tokenizer import word_level
from vlm_jax.data.templates import template
from vlm_jax.data.tokenizer import load_tokenizer
from vlm_jax.models import vlm

WORDS = (
    "What is it? Is the watch sunny, cloudy or raining: 12:30:05 and 62% at top-left. Yes no a cat dog one two three"
)


def random_params(config):
    """Large random weights (small ones answer with one token for ever), norms at one; numpy, as compiling `init` takes longer."""
    rng, params = np.random.default_rng(0), {}
    for path, like in sorted(vlm.shapes(config).items()):
        value = np.ones(like.shape) if path.endswith("scale") else rng.normal(0, 0.2, like.shape)
        params[path] = value.astype(np.float32)
    return params


def write(folder, texts=(WORDS,)):
    """Write the directory and return its config."""
    t = template("v1")
    word_level([*texts, t.system, *(f"{role}:" for role in t.roles)], folder / "tokenizer")
    vocab = load_tokenizer(folder / "tokenizer").size
    config = VLMConfig(
        vision=VisionConfig(image_size=12, patch_size=4, width=16, layers=2, heads=2, mlp=32),
        llm=LLMConfig(vocab=vocab, width=32, mlp=64, layers=1, heads=2, kv_heads=2, head_dim=16, max_position=512),
    )
    export(
        folder / "model",
        config,
        random_params(config),
        tokenizer=folder / "tokenizer",
        chat_template=chat_template("v1"),
    )
    return folder / "model"

"""config.json of T5 and FLAN-T5 (T5ForConditionalGeneration) and of CLIP-FlanT5 <-> `T5Config`.

Only what the file says counts, not what a config class of transformers would make of it: from version 5 on that class calls every
head tied, and writes `tie_word_embeddings: true, scale_decoder_outputs: false` for a FLAN-T5, whose head is its own and unscaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import ConfigError, T5Config

TYPES = ("t5", "clip_t5")
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}

TOKENS = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # of every T5 that was published

# defaults of transformers' T5Config
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": True,
}


def t5_from_hf(raw: Mapping[str, Any]) -> T5Config:
    """T5Config of a config.json; ConfigError names an activation that is not known."""
    get = {**DEFAULTS, **{name: value for name, value in raw.items() if value is not None}}
    form = get["feed_forward_proj"]
    act = form.removeprefix("gated-")
    if act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(
            f"feed_forward_proj={form!r} is not supported: use one of {known}, with or without gated- before it"
        )
    return T5Config(
        vocab=get["vocab_size"],
        width=get["d_model"],
        mlp=get["d_ff"],
        encoder_layers=get["num_layers"],
        decoder_layers=get.get("num_decoder_layers", get["num_layers"]),
        heads=get["num_heads"],
        head_dim=get["d_kv"],
        buckets=get["relative_attention_num_buckets"],
        max_distance=get["relative_attention_max_distance"],
        eps=float(get["layer_norm_epsilon"]),
        dropout=float(get["dropout_rate"]),
        gated=form != act,
        act="gelu_tanh" if form == "gated-gelu" else ACTIVATIONS[act],  # T5's "gated-gelu" means the tanh form
        tie=bool(get["tie_word_embeddings"] and get["scale_decoder_outputs"]),
    )


def t5_to_hf(llm: T5Config) -> dict[str, Any]:
    """config.json of a T5ForConditionalGeneration, read alike by every version of transformers from 4.36 on."""
    form = "gelu" if llm.gated and llm.act == "gelu_tanh" else HF_ACTIVATIONS[llm.act]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "d_ff": llm.mlp,
        "d_kv": llm.head_dim,
        "d_model": llm.width,
        "dropout_rate": llm.dropout,
        "feed_forward_proj": f"gated-{form}" if llm.gated else form,
        "layer_norm_epsilon": llm.eps,
        "num_decoder_layers": llm.decoder_layers,
        "num_heads": llm.heads,
        "num_layers": llm.encoder_layers,
        "relative_attention_max_distance": llm.max_distance,
        "relative_attention_num_buckets": llm.buckets,
        "tie_word_embeddings": llm.tie,
        "vocab_size": llm.vocab,
        **TOKENS,
    }

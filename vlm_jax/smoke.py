"""Any recipe, shrunk to seconds on a CPU: a tiny model of the same kind, random weights, generated smart-watch data."""

from __future__ import annotations

import dataclasses

from vlm_jax.config import LLMConfig, T5Config
from vlm_jax.recipe import InitConfig, Recipe

VOCABULARY = 512  # byte-level BPE trained on the generated text, so that no template word is unknown

RANK = 4  # of adapters


def shrink(recipe: Recipe) -> Recipe:
    """Same structure (kinds, projector depth, grouping, trainable patterns, template), smoke sizes and six updates."""
    m, d, t = recipe.model, recipe.data, recipe.train
    last = min(m.vision.feature_layers)
    vision = dataclasses.replace(
        m.vision,
        image_size=56,
        patch_size=14,
        width=32,
        heads=2,
        mlp=64,
        layers=2 if last >= -3 else 4,
        feature_layers=tuple(max(i, -3) if i < 0 else min(i, 2) for i in m.vision.feature_layers),
    )
    unpacked = d.max_samples == 1
    data = dataclasses.replace(
        d,
        path=(),
        generated_watches=48,
        generated_task=d.generated_task if d.generated_watches else "caption" if "plain" in d.template else "rounds",
        threads=2,
        row_length=384 if unpacked else 768,
        sample_length=384,
        answer_length=min(d.answer_length, 384),
        views_per_row=1 if unpacked else 4,
    )
    train = dataclasses.replace(
        t,
        steps=6,
        global_batch=8,
        log_every=1,
        save_every=3,
        loss_chunk=64,
        dtype="float32",
        vision_dtype="float32",
        frozen_dtype="float32",
        remat="none",
    )
    lora = tuple(dataclasses.replace(group, rank=min(group.rank, RANK)) for group in m.lora)
    quant = m.quant and dataclasses.replace(m.quant, block=min(m.quant.block, vision.width))
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(m, vision=vision, llm=shrink_llm(m.llm), lora=lora, quant=quant),
        data=data,
        train=train,
        init=InitConfig(random=True),
        output=f"{recipe.output}_smoke",
    )


def shrink_llm(llm: LLMConfig | T5Config) -> LLMConfig | T5Config:
    """A language model of the same kind with two layers (on either side)."""
    sizes = {"vocab": VOCABULARY, "width": 64, "mlp": 128, "heads": 4, "head_dim": 16}
    if isinstance(llm, T5Config):
        return dataclasses.replace(llm, encoder_layers=2, decoder_layers=2, **sizes)
    return dataclasses.replace(llm, layers=2, kv_heads=4 if llm.kv_heads == llm.heads else 2, **sizes)

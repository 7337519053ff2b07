"""A trained watch reader learns another style of watch: meshed faces and coloured hands, by adapters on a frozen base.

    python -m vlm_jax train --config configs/watch_style.py:lora --config.init.checkpoint=runs/quickstart/export

Words: lora | qlora | full; smoke. Adapters lie on tower and LLM, as what changes is what a watch looks like; qlora keeps both in 4 bits.
launch/bench/new_style.py trains all three and compares them.
"""

from vlm_jax.config import LoRAConfig, QuantConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import InitConfig, Recipe, config_dict
from vlm_jax.smoke import shrink
from vlm_jax.train.options import TrainConfig
from vlm_jax.words import read_words

BLOCKS = ("^tower/blocks/", "^llm/blocks/")
HANDS = ((255, 64, 0), (0, 96, 255), (255, 0, 160))  # hour orange, minute blue, second pink; the base knows white
MATERIAL = "mesh"
EVERYTHING = ("^tower/", "^projector/", "^llm/")


def get_config(words: str = ""):
    """The recipe of one way to learn the style (default: lora)."""
    chosen = read_words(words, tuning=("lora", "qlora", "full"), flags=("smoke",))
    tuning = chosen["tuning"]
    adapters = tuning != "full"
    recipe = Recipe(
        model=VLMConfig(
            aspect="square",
            lora=(LoRAConfig(BLOCKS, rank=16, alpha=32.0),) if adapters else (),
            quant=QuantConfig(targets=BLOCKS) if tuning == "qlora" else None,
        ),
        init=InitConfig(checkpoint="runs/quickstart/export"),
        data=DataConfig(
            template="mistral_instruct", generated_watches=6000, generated_material=MATERIAL, generated_hands=HANDS, seed=100,
            row_length=92, sample_length=92, views_per_row=1, max_samples=1, threads=2,
        ),
        train=TrainConfig(
            trainable=(r"/lora_[ab]$", "^projector/") if adapters else EVERYTHING, steps=300, global_batch=64,
            lr=2e-3 if adapters else 2e-4, group_lrs=((r"^projector/", 2e-4),), warmup_steps=20, weight_decay=0.0, beta2=0.98,
            dtype="float32", vision_dtype="float32", frozen_dtype="float32", remat="none", loss_chunk=92, log_every=10, save_every=100,
            keep=1,
        ),
        output=f"runs/watch_style_{tuning}",
    )  # fmt: skip
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

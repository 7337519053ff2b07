"""A small LLaVA trained from nothing in minutes on two CPU cores: generated smart-watches, five questions about each.

    bash launch/quickstart.sh        python -m vlm_jax quickstart --config configs/quickstart.py --config.train.steps=3000

ViT (16 patches) -> two-layer MLP -> Llama, every parameter trained. What each choice is for, and what happens without it, is in the
README under "What made the quickstart learn". Words: smoke (seconds, learns nothing).
"""

from vlm_jax.config import LLMConfig, VisionConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import InitConfig, Recipe, config_dict
from vlm_jax.smoke import shrink
from vlm_jax.train.options import TrainConfig
from vlm_jax.words import read_words

WATCHES = 24000  # training images, drawn before training


def model() -> VLMConfig:
    """2.6 M parameters. The 224-pixel pictures are halved, and each corner of the watch lies in one of the 4 x 4 patches."""
    vision = VisionConfig(
        image_size=112,
        patch_size=28,
        width=256,
        layers=2,
        heads=4,
        mlp=1024,
        feature_layers=(-1,),
        select="full",  # the class token is read too
        mean=(0.5, 0.5, 0.5),
        std=(0.15, 0.15, 0.15),
    )
    llm = LLMConfig(vocab=256, width=128, mlp=384, layers=2, heads=4, kv_heads=4, head_dim=32, max_position=512)
    return VLMConfig(vision, llm=llm, aspect="square", init="scratch")


def get_config(words: str = ""):
    """The quickstart's recipe."""
    chosen = read_words(words, flags=("smoke",))
    recipe = Recipe(
        model=model(), init=InitConfig(random=True),
        data=DataConfig(
            template="mistral_instruct",  # no system prompt: fewer tokens to compute
            generated_watches=WATCHES, generated_task="rounds", generated_tokenizer="word",
            row_length=92, sample_length=92, views_per_row=1, max_samples=1, threads=2,
        ),
        train=TrainConfig(
            trainable=("^tower/", "^projector/", "^llm/"), steps=1400, global_batch=64, lr=3e-4, warmup_steps=40, schedule="wsd",
            weight_decay=0.01, beta2=0.98, clip_norm=1.0, dtype="float32", vision_dtype="float32", remat="none", loss_chunk=92,
            log_every=10, save_every=500, keep=1,
        ),
        output="runs/quickstart",
    )  # fmt: skip
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

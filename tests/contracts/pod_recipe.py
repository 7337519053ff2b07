"""The recipe of test_hosts: a VLM of 30,000 parameters on generated watches, all of it trained in float32."""

from vlm_jax.config import LLMConfig, VisionConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import InitConfig, Recipe, config_dict
from vlm_jax.train.options import TrainConfig


def get_config(words: str = ""):
    """Ten updates of four rows."""
    vision = VisionConfig(image_size=56, patch_size=28, width=16, layers=2, heads=2, mlp=32, feature_layers=(-1,))
    llm = LLMConfig(vocab=256, width=32, mlp=64, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=128)
    data = DataConfig(
        template="mistral_instruct",
        generated_watches=12,
        generated_tokenizer="word",
        row_length=128,
        sample_length=96,
        views_per_row=2,
        threads=2,
        processes=1,
    )
    train = TrainConfig(
        trainable=("^tower/", "^projector/", "^llm/"),
        steps=10,
        global_batch=4,
        lr=1e-3,
        dtype="float32",
        vision_dtype="float32",
        remat="none",
        loss_chunk=128,
        log_every=1,
        save_every=3,
    )
    model = VLMConfig(vision, llm=llm, aspect="square", init="scratch")
    return config_dict(Recipe(model=model, init=InitConfig(random=True), data=data, train=train, export=False))

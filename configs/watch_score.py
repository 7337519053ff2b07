"""A small CLIP-FlanT5 trained from nothing in minutes on two CPU cores: its VQAScore tells true captions of watches from wrong ones.

    bash launch/watch_score.sh          or, stage by stage:
    python -m vlm_jax train --config configs/watch_score.py:stage1
    python -m vlm_jax quickstart --config configs/watch_score.py:stage2

Words: stage1 (captions, split at a random character) | stage2 (questions: is this caption true? what is the weather?); smoke (seconds,
learns nothing). Both stages have the templates of configs/clip_flant5.py, and stage 2 trains what the published one does, everything but
the tower. Stage 1 does not: there it trains the projector alone, because tower and T5 come trained; here both are random numbers at
first, so that stage 1 trains everything.
"""

from vlm_jax.config import T5Config, VisionConfig, VLMConfig
from vlm_jax.data.options import DataConfig
from vlm_jax.recipe import InitConfig, Recipe, config_dict
from vlm_jax.smoke import shrink
from vlm_jax.train.options import STAGE2, TrainConfig
from vlm_jax.words import read_words

EVERYTHING = ("^tower/", "^projector/", "^llm/")


def model() -> VLMConfig:
    """The quickstart's tower in front of a T5 of two and two layers."""
    vision = VisionConfig(
        image_size=112,
        patch_size=28,
        width=256,
        layers=2,
        heads=4,
        mlp=1024,
        feature_layers=(-1,),
        select="full",
        mean=(0.5, 0.5, 0.5),
        std=(0.15, 0.15, 0.15),
    )
    llm = T5Config(vocab=640, width=128, mlp=384, encoder_layers=2, decoder_layers=2, heads=4, head_dim=32, dropout=0.0)
    return VLMConfig(vision, llm=llm, aspect="square", init="scratch")


def stage1() -> tuple[InitConfig, DataConfig, TrainConfig]:
    """Captions of watches with every fact; the beginning is read, the rest is said."""
    data = DataConfig(
        template="t5_plain_split_text", generated_task="claim_captions", generated_watches=9600, seed=2, threads=2,
        row_length=40, sample_length=40, answer_length=32, views_per_row=1, max_samples=1,
    )  # fmt: skip
    return InitConfig(random=True), data, training(EVERYTHING, steps=700, global_batch=32, lr=3e-4, loss_chunk=32)


def stage2() -> tuple[InitConfig, DataConfig, TrainConfig]:
    """Five questions about each watch in one row: a true and a wrong claim about one fact, such a pair about several, and a fact."""
    data = DataConfig(
        template="t5_v1", generated_task="claims", generated_watches=9600, seed=0, threads=2,
        row_length=400, sample_length=96, answer_length=20, views_per_row=1, shared_images=True,
    )  # fmt: skip
    start = InitConfig(checkpoint="runs/watch_score/stage1/export")
    return start, data, training(STAGE2, steps=1200, global_batch=8, lr=5e-4, loss_chunk=20)


def training(trainable: tuple[str, ...], **sizes: float) -> TrainConfig:
    """What both stages have in common."""
    return TrainConfig(
        trainable=trainable, warmup_steps=40, schedule="wsd", weight_decay=0.01, beta2=0.98, dtype="float32", vision_dtype="float32",
        frozen_dtype="float32", remat="none", log_every=10, save_every=500, keep=1, **sizes,
    )  # fmt: skip


def get_config(words: str = ""):
    """The recipe of one stage (default: stage1)."""
    chosen = read_words(words, stage=("stage1", "stage2"), flags=("smoke",))
    init, data, train = {"stage1": stage1, "stage2": stage2}[chosen["stage"]]()
    recipe = Recipe(model=model(), init=init, data=data, train=train, output=f"runs/watch_score/{chosen['stage']}")
    return config_dict(shrink(recipe) if "smoke" in chosen else recipe)

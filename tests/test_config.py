"""Configs: typed, checked by name, and the published sizes and hyperparameters."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax import recipe as recipes
from vlm_jax.__main__ import parse
from vlm_jax.config import (
    ACTIVATIONS,
    ConfigError,
    LLMConfig,
    ProjectorConfig,
    RopeConfig,
    VisionConfig,
    VLMConfig,
    from_dict,
    to_dict,
)
from vlm_jax.models import vlm
from vlm_jax.nn import layers
from vlm_jax.prior_recipe import PriorRecipe
from vlm_jax.tokenizer_recipe import TokenizerRecipe
from vlm_jax.train.state import select
from vlm_jax.words import read_words

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def get_config(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def llava15(words):
    return recipes.from_config(get_config(ROOT / "configs" / "llava15.py")(words))


def test_round_trip_through_config_dict_and_json(tmp_path):
    recipe = llava15("13b,stage1")
    assert recipes.from_config(recipes.config_dict(recipe)) == recipe
    recipes.save(recipe, tmp_path / "a" / "config.json")
    assert recipes.load(tmp_path / "a" / "config.json") == recipe


def test_dataclass_round_trip():
    config = VLMConfig(llm=LLMConfig(rope=RopeConfig("yarn", factor=4.0)), aspect="anyres", pinpoints=((336, 672),))
    assert from_dict(VLMConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"llm": {"widht": 1}}, "unknown config key llm.widht"),
        ({"llm": {"width": "big"}}, "llm.width must be of type int"),
        ({"llm": {"width": True}}, "llm.width must be of type int"),
        ({"vision": {"mean": [0.5]}}, "vision.mean needs 3 values"),
        ({"vision": {"feature_layers": 3}}, "vision.feature_layers must be a sequence"),
        ({"vision": {"feature_layers": [-30]}}, "does not exist in a tower of 24 layers"),
        ({"vision": {"kind": "dino"}}, "vision.kind='dino' is unknown: use one of clip, siglip"),
        ({"vision": {"kind": "siglip"}}, "use vision.select=full"),
        ({"projector": {"kind": "mlpx"}}, "projector.kind='mlpx' is unknown"),
        ({"llm": {"heads": 6, "kv_heads": 4}}, "not a multiple of llm.kv_heads"),
        ({"merge": "spatial_unpad"}, "set model.image_newline=True"),
        ({"aspect": "anyres"}, "needs model.pinpoints"),
        ({"vision": {"feature_layers": []}}, "vision.feature_layers is empty"),
        ({"vision": {"patch_size": 0}}, "vision.patch_size=0 must be at least 1"),
        ({"llm": {"act": "tanh"}}, "llm.act='tanh' is unknown"),
        ({"projector": {"act": "tanh"}}, "projector.act='tanh' is unknown"),
    ],
)
def test_what_is_wrong_is_named(values, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        from_dict(VLMConfig, values)


def test_every_named_activation_is_computed():
    assert set(layers.ACTIVATIONS) == set(ACTIVATIONS)


def test_overrides_reach_a_config_wherever_the_arguments_come_from():
    values = parse("train", ["--config", "configs/llava15.py:7b,smoke", "--config.train.lr=0.5"])  # not sys.argv
    assert recipes.from_config(values["config"]).train.lr == 0.5


def test_projector_depth():
    depths = {"identity": 0, "linear": 1, "mlp1x_gelu": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}
    assert {k: ProjectorConfig(k).depth for k in depths} == depths


def test_words():
    assert read_words("b,smoke", size=("a", "b"), flags=("smoke",)) == {"size": "b", "smoke": "smoke"}
    with pytest.raises(ConfigError, match="config word 'c' is unknown: use a, b | smoke"):
        read_words("c", size=("a", "b"), flags=("smoke",))
    with pytest.raises(ConfigError, match="'a' and 'b' exclude each other"):
        read_words("a,b", size=("a", "b"))


def test_published_sizes():
    """Parameter counts of the checkpoints: LLM + projector + the whole CLIP-L tower."""
    clip = vlm.count(
        VLMConfig(
            llm=LLMConfig(vocab=8, width=8, mlp=8, layers=1, heads=1, kv_heads=1, head_dim=8),
            projector=ProjectorConfig("identity"),
        )
    )
    tiny_llm = 2 * 8 * 8 + 4 * 8 * 8 + 3 * 8 * 8 + 3 * 8
    assert clip - tiny_llm == 303_507_456  # CLIPVisionModel L/14-336
    assert vlm.count(llava15("7b,stage2").model) == 6_738_415_616 + 20_979_712 + 303_507_456
    assert (
        vlm.count(llava15("13b,stage2").model)
        == 13_015_864_320 + (1024 * 5120 + 5120 + 5120 * 5120 + 5120) + 303_507_456
    )


@pytest.mark.parametrize(
    "words",
    [",".join(w) for w in itertools.product(("7b", "13b"), ("stage1", "stage2"), ("", "compat", "unpacked,compat"))],
)
def test_llava15_hyperparameters_are_the_published_ones(words):
    recipe = llava15(words.strip(","))
    first = "stage1" in words
    t = recipe.train
    assert (
        t.lr == (1e-3 if first else 2e-5)
        and t.epochs == 1
        and t.warmup_ratio == 0.03
        and t.schedule == "cosine"
        and t.weight_decay == 0
    )
    assert (t.beta1, t.beta2, t.eps, t.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert recipe.model.aspect == ("square" if first else "pad") and recipe.data.template == (
        "plain" if first else "v1"
    )
    if "unpacked" in words:
        assert (
            t.global_batch == (256 if first else 128)
            and recipe.data.max_samples == 1
            and recipe.data.row_length == 2048
        )
        assert t.global_batch // t.accum == (32 if first else 16) if "compat" in words else t.accum == 1  # per device
    chosen = select(t.trainable, vlm.shapes(recipe.model))
    assert {p.split("/")[0] for p in chosen} == ({"projector"} if first else {"projector", "llm"})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_a_default_and_a_smoke_version(path):
    make = get_config(path)
    full, small = recipes.from_config(make()), recipes.from_config(make("smoke"))
    if isinstance(full, TokenizerRecipe):
        assert small.train.steps <= 20 and small.data.generated_watches > 0 and small.init.random
        assert small.adversary.weight == full.adversary.weight and small.critic.kind == full.critic.kind
        return
    if isinstance(full, PriorRecipe):
        assert small.train.steps <= 20 and small.data.generated > 0 and small.prior.width <= 64
        assert small.prior.condition == full.prior.condition and small.train.lr == full.train.lr
        return
    assert vlm.count(small.model) < 2_000_000 and small.train.steps <= 20 and small.data.generated_watches > 0
    assert small.model.projector == full.model.projector and small.train.trainable == full.train.trainable
    assert (
        dataclasses.replace(
            small.model.vision, **{f.name: getattr(full.model.vision, f.name) for f in dataclasses.fields(VisionConfig)}
        )
        == full.model.vision
    )


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "vlm_jax", *arguments], capture_output=True, text=True, cwd=ROOT)


def test_help_needs_no_heavy_library():
    code = (
        "import sys, vlm_jax.__main__ as m; m.main(['--help']);"
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'transformers', 'numpy'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "chat" in done.stdout


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("fly",), "'fly' is no command: use one of train"),
        (("train",), "train needs --config"),
        (("generate",), "generate needs --model"),
        (("train", "--config", "nowhere.py"), "config file nowhere.py does not exist: there are clip_flant5.py"),
        (("train", "--config", "configs/llava15.py:7b,stage9"), "config word 'stage9' is unknown"),
        (
            ("train", "--config=configs/llava15.py:7b", "--config.train.learning_rate=1"),
            "unknown config key config.train.learning_rate",
        ),
        (("train", "--config=configs/llava15.py:7b", "--config.llm.layers=1"), "unknown config key config.llm.layers"),
        (("train", "--config=configs/llava15.py:7b", "--config.train.lr=fast"), "--config.train.lr=fast"),
        (
            ("train", "--config=configs/llava15.py:7b", "--config.train.global_batch=1.5"),
            "--config.train.global_batch=1.5",
        ),
        (("train", "--config=configs/llava15.py:7b", "extra"), "unexpected argument 'extra'"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, tuple) else None,
)
def test_typing_errors_end_in_one_sentence(arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("vlm_jax: ") and done.stderr.count("\n") == 1

"""SQ-LLaVA's two adapters, of the language model and of the tower, in the folders that it writes.

Compared are the tower's features and the logits in front of the first image, which no projector has a part in.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.convert.models import write_tensors
from tests.golden_model import model_config
from tests.goldens import cases
from vlm_jax.config import IMAGE, ProjectorConfig
from vlm_jax.convert.files import write_json
from vlm_jax.convert.llava_config import vlm_to_llava
from vlm_jax.convert.manifest import VIT_FOLDER
from vlm_jax.convert.merge import merged, open_adapted
from vlm_jax.convert.read import open_checkpoint
from vlm_jax.convert.shards import Planned, write_file
from vlm_jax.models import vlm

PATHS = cases("sq_llava", "lora_model*.npz")
TOWER = "model.vision_tower."


def config_of(info: dict):
    """Our config of a golden's, without its projector."""
    mm = {key: value for key, value in info.items() if key.startswith("mm_")} | {"mm_projector_type": "identity"}
    defaults = {"max_position_embeddings": 256, "tie_word_embeddings": False}
    return model_config({"llm_config": defaults | info["llm"], "vision_config": info["vision"], "mm": mm})


def write_adapter(folder: Path, pairs: dict[str, np.ndarray], settings: dict) -> None:
    """adapter_config.json and adapter_model.safetensors of {name in the base: factor}."""
    folder.mkdir(parents=True)
    tensors = [Planned(f"base_model.model.{name}", v.shape, v.dtype, lambda v=v: v) for name, v in pairs.items()]
    write_file(folder / "adapter_model.safetensors", tensors)
    raw = {"peft_type": "LORA", "r": settings["r"], "lora_alpha": settings["alpha"]}
    write_json(folder / "adapter_config.json", raw | {"target_modules": settings["target_modules"]})


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def case(request, tmp_path):
    """(recorded numbers, base, base with both adapters beside its kernels)."""
    z = np.load(request.param)
    info = json.loads(str(z["config"]))
    config = config_of(info)
    assert config.projector == ProjectorConfig("identity")
    weights = {k.removeprefix("param/"): z[k] for k in z.files if k.startswith("param/") and "mm_projector" not in k}
    base = write_tensors(tmp_path / "base", weights, vlm_to_llava(config, {}, "float32", None))
    lora = {k.removeprefix("lora/"): z[k] for k in z.files if k.startswith("lora/")}
    tower = {k.removeprefix(TOWER): v for k, v in lora.items() if k.startswith(TOWER)}
    # the main file also has the tower's pairs, which are not to be read with its scale
    write_adapter(tmp_path / "adapter", lora, info["llm_lora"])
    write_adapter(tmp_path / "adapter" / VIT_FOLDER, tower, info["vision_lora"])
    return z, open_checkpoint(base), open_adapted(tmp_path / "adapter", base=base)[0]


def model_of(checkpoint) -> vlm.VLM:
    return vlm.build(checkpoint.config, {path: leaf.read() for path, leaf in checkpoint.leaves.items()})


def test_features_of_the_adapted_tower(case):
    z, base, adapted = case
    pixels = z["images"].transpose(0, 2, 3, 1)
    for checkpoint in (adapted, merged(adapted)):
        np.testing.assert_allclose(model_of(checkpoint).tower(pixels), z["vision_features_with_lora"], atol=2e-5)
    assert np.abs(np.asarray(model_of(base).tower(pixels)) - z["vision_features_with_lora"]).max() > 1e-2


def test_logits_in_front_of_the_image(case):
    z, base, adapted = case
    ids, length = z["input_ids"], z["input_ids"].shape[1]
    before = np.cumsum(ids == IMAGE, 1) == 0
    assert before.sum() > 2
    batch = {
        "tokens": np.where(before, ids, 0), "image_slots": np.full(ids.shape, -1, np.int32),
        "segments": before.astype(np.int32), "positions": np.tile(np.arange(length, dtype=np.int32), (len(ids), 1)),
    }  # fmt: skip
    for name, checkpoint in (("base", base), ("lora", adapted), ("merged", merged(adapted))):
        model = model_of(checkpoint)
        logits = np.asarray(jax.jit(lambda batch, model=model: model.logits(vlm.forward(model, batch)))(batch))
        np.testing.assert_allclose(logits[before], z[f"{name}_logits"][:, :length][before], atol=1e-4, err_msg=name)

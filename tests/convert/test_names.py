"""The name table: every naming is a bijection, and prefixes do not mix rooms up."""

import pytest

from tests.convert.models import TINY, VARIANTS
from vlm_jax.config import ProjectorConfig
from vlm_jax.convert import names
from vlm_jax.models import vlm


@pytest.mark.parametrize("variant", VARIANTS)
def test_entries_are_the_models_parameters(variant):
    config = VARIANTS[variant]
    shapes: dict[str, list] = {}
    for entry in names.entries(config):
        shapes.setdefault(entry.path, []).append((entry.layer, entry.layout.shape(entry.shape)))
    ours = {
        path: (len(parts), *parts[0][1]) if parts[0][0] is not None else parts[0][1] for path, parts in shapes.items()
    }
    assert ours == {path: s.shape for path, s in vlm.shapes(config).items()}
    for path, parts in shapes.items():
        assert [layer for layer, _ in parts] in ([None], list(range(len(parts)))), path


@pytest.mark.parametrize("naming", names.NAMINGS)
@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_naming_is_invertible(naming, kind):
    if naming != "llava" and kind != "mlp2x_gelu":
        return
    entries = names.entries(TINY.__class__(TINY.vision, ProjectorConfig(kind), TINY.llm))
    keys = [names.key_of(entry, naming, kind) for entry in entries]
    assert len(set(keys)) == len(keys)
    assert [names.room_and_key(key) for key in keys] == [(entry.room, entry.key) for entry in entries]
    assert names.naming_of(keys) == naming
    assert names.projector_kind(keys) == kind


@pytest.mark.parametrize("key, place", [
    ("model.layers.3.mlp.up_proj.weight", ("llm", "layers.3.mlp.up_proj.weight")),
    ("layers.3.mlp.up_proj.weight", ("llm", "layers.3.mlp.up_proj.weight")),
    ("encoder.layers.3.mlp.fc1.weight", ("tower", "encoder.layers.3.mlp.fc1.weight")),
    ("vision_model.head.probe", ("tower", "head.probe")),
    ("lm_head.weight", ("head", "weight")),
    ("model.image_newline", ("newline", "image_newline")),
    ("base_model.model.model.mm_projector.2.bias", ("projector", "1.bias")),
    ("model.mm_projector.weight", ("projector", "0.weight")),
    ("transformer.h.0.attn.c_attn.weight", None),
])  # fmt: skip
def test_prefixes(key, place):
    assert names.room_and_key(key) == place


@pytest.mark.parametrize("key", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.vision_model.embeddings.position_ids",
    "logit_scale",
    "text_model.encoder.layers.0.mlp.fc1.weight", "visual_projection.weight",
])  # fmt: skip
def test_buffers_and_text_towers_are_ignored(key):
    assert names.IGNORED.fullmatch(key)

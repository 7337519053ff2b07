"""The assembled model against haotian-liu/LLaVA: features, splicing, logits, loss and gradients of every case and variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_model import assign_images, load, our_name, our_value, row_batch
from tests.goldens import cases
from vlm_jax.config import IMAGE
from vlm_jax.models import vlm

CASES = [p for pattern in ("case_*.npz", "variant_*.npz") for p in cases("llava_model", pattern)]
MODEL_CASES = [p for p in CASES if "logits" in np.load(p).files]


def images_of(path, z, config):
    """(views per row, (w, h) per image of each row) in the three ways the goldens give images."""
    ids, keep = z["input_ids"], z["attention_mask"]
    if "views_0" in z.files:
        rows = [[z[f"views_{r}"]] for r in range(len(ids))]
        return rows, [[tuple(int(x) for x in z["image_sizes"][r])] for r in range(len(ids))]
    images = list(z["images"] if "images" in z.files else np.load(path.parent / "case_mixed_right.npz")["images"])
    extra = [k for k in z.files if k.startswith("extra_view_for_image_")]
    for k in extra:
        i = int(k.rsplit("_", 1)[1])
        images[i] = np.stack([images[i], z[k]])
    return assign_images(ids, keep, images)


@pytest.fixture(params=MODEL_CASES, ids=lambda p: p.stem)
def case(request):
    path = request.param
    z = np.load(path)
    config, params = load(path.parent, z)
    views, sizes = images_of(path, z, config)
    length = int(z["tokenizer_model_max_length"]) if "tokenizer_model_max_length" in z.files else None
    left = bool((z["new_attention_mask"][:, -1] > z["new_attention_mask"][:, 0]).any())
    batch = row_batch(
        config, z["input_ids"], z["attention_mask"], z["labels"], views, sizes, length=length, pad_left=left
    )
    return z, config, params, batch


def loss_of(config, params, batch):
    model = vlm.build(config, params)
    logits = model.logits(vlm.forward(model, batch))
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return (nll * batch["weights"]).sum() / batch["weights"].sum(), logits


def test_logits_loss_and_gradients(case):
    z, config, params, batch = case
    real = z["new_attention_mask"]
    np.testing.assert_array_equal(batch["segments"] > 0, real)
    np.testing.assert_array_equal(batch["labels"][real], z["new_labels"][real])
    trained = {k: v for k, v in params.items() if not k.startswith("tower/")}
    rest = {k: v for k, v in params.items() if k.startswith("tower/")}
    step = jax.jit(jax.value_and_grad(lambda p: loss_of(config, {**rest, **p}, batch), has_aux=True))
    (loss, logits), grads = step(trained)
    np.testing.assert_allclose(np.asarray(logits)[real], z["logits"][real], atol=2e-4)
    np.testing.assert_allclose(loss, z["loss"], atol=1e-5)
    if "grad_norm_names" in z.files:
        check_gradients(z, config, grads)


def check_gradients(z, config, grads):
    total = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    np.testing.assert_allclose(total, z["global_grad_norm"], rtol=1e-3)
    for name, norm in zip(z["grad_norm_names"], z["grad_norms"]):
        path, layer = our_name(str(name), config)
        ours = grads[path] if layer is None else grads[path][layer]
        np.testing.assert_allclose(np.linalg.norm(ours), norm, rtol=1e-3, err_msg=str(name))
    for key in (k for k in z.files if k.startswith("grad:")):
        path, layer = our_name(key[5:], config)
        ours = grads[path] if layer is None else grads[path][layer]
        np.testing.assert_allclose(ours, our_value(path, z[key]), atol=1e-5, rtol=1e-3, err_msg=key)


def test_features_and_splicing(case):
    z, config, params, batch = case
    model = vlm.build(config, params)
    if "inputs_embeds" in z.files:
        x = model.embed(
            jnp.asarray(batch["tokens"]),
            jnp.asarray(batch["image_slots"]),
            model.encode_images(jnp.asarray(batch["images"])),
        )
        real = z["new_attention_mask"]
        np.testing.assert_allclose(np.asarray(x)[real], z["inputs_embeds"][real], atol=2e-4)
    if "tower_features" in z.files:
        pixels = jnp.asarray(z["images"].transpose(0, 2, 3, 1))
        features = model.tower(pixels)
        np.testing.assert_allclose(features, z["tower_features"], atol=2e-4)
        np.testing.assert_allclose(model.projector(features), z["image_features"], atol=2e-4)


def test_every_image_of_a_row_is_used_once():
    """A text-only row consumes one dummy image, as in the original collator."""
    ids = np.array([[1, 2], [1, IMAGE]])
    views, _ = assign_images(ids, np.ones((2, 2), bool), np.arange(2)[:, None, None, None] * np.ones((2, 3, 4, 4)))
    assert views[0] == [] and views[1][0].max() == 1

"""Only the views that a row shows are encoded, and that changes nothing that anybody reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models.views import encode_shown, shown_views


def test_shown_views_are_those_that_a_slot_points_to():
    slots = jnp.array([[-1, 0, 1, 2, -1], [3, 9, 8, -1, 12]])  # three features a view, four views, 12: the newline
    np.testing.assert_array_equal(shown_views(slots, 4, 3).reshape(2, 4), [[1, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize("count", [3, 8, 37])
def test_what_is_shown_is_as_before_with_gradients(count):
    draw = np.random.default_rng(count)
    images, kernel = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((count, 6), (6, 5)))
    shown = draw.random(count) < 0.4

    def loss(kernel, skip):
        def encode(x):
            return jnp.tanh(x @ kernel)[:, None]

        features = encode_shown(encode, images, shown) if skip else encode(images)
        features = jnp.where(shown[:, None, None], features, 0)
        return (features * jnp.arange(1, count + 1)[:, None, None]).sum(), features

    (a, of_a), da = jax.value_and_grad(loss, has_aux=True)(kernel, False)
    (b, of_b), db = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(kernel, True)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(of_a, of_b, atol=1e-6)
    np.testing.assert_allclose(da, db, atol=1e-4)


def test_groups_without_a_view_are_skipped():
    seen = []

    def encode(x):
        jax.debug.callback(lambda some: seen.append(len(some)), x)
        return x[:, None]

    shown = np.zeros(32, bool)
    shown[[3, 20, 30]] = True
    features = jax.jit(lambda x: encode_shown(encode, x, jnp.asarray(shown)))(jnp.ones((32, 6)))
    jax.effects_barrier()
    assert seen == [4]
    np.testing.assert_array_equal(features.any((1, 2)), shown)

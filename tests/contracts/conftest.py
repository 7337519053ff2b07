"""What tests of TPU kernels share."""

import types

import jax
import pytest


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run in interpret mode."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    whole = flash.pl.pallas_call

    def pallas_call(*args, **options):
        return whole(*args, **{**options, "interpret": True})

    for kernels in (flash, splash):
        patched = types.SimpleNamespace(**{**vars(kernels.pl), "pallas_call": pallas_call})
        monkeypatch.setattr(kernels, "pl", patched)
    jax.clear_caches()
    yield
    jax.clear_caches()

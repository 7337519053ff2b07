"""The cache of compiled programs: in the run's folder, elsewhere or nowhere, and only while a run lasts."""

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.train import compiled


@pytest.fixture
def every_program(monkeypatch):
    """Programs that compile fast are kept too."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compile_one(factor):
    jax.jit(lambda x: x * factor).lower(jnp.ones(3)).compile()


def kept(folder):
    return sorted(p.name for p in folder.rglob("jit_*-cache"))


def test_two_runs_keep_their_own_programs(every_program, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    for run, factor in (("a", 2.0), ("b", 3.0)):
        with compiled.kept("run", tmp_path / run):
            compile_one(factor)
            first = kept(tmp_path / run / "cache" / "compiled")
            compile_one(factor)
        assert first and kept(tmp_path / run) == first, "the second time nothing new is compiled"
        assert jax.config.jax_compilation_cache_dir == before
    compile_one(4.0)
    assert kept(tmp_path) == sorted(kept(tmp_path / "a") + kept(tmp_path / "b")), "after a run nothing is written"


def test_another_folder_none_and_the_variable(every_program, tmp_path, monkeypatch):
    with compiled.kept(str(tmp_path / "shared"), tmp_path / "run"):
        compile_one(5.0)
    assert kept(tmp_path / "shared") and not (tmp_path / "run").exists()
    before = jax.config.jax_compilation_cache_dir
    with compiled.kept("", tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    with compiled.kept("run", tmp_path / "run"):
        assert jax.config.jax_compilation_cache_dir == before, "jax has read the variable when it was imported"

"""Compiled programs kept on disk, so that a run that goes on does not compile again.

train.compile_cache=run                 RUN/cache/compiled, which all hosts see as they see the checkpoints (the default)
train.compile_cache=~/.cache/vlm_jax    shared by runs; of those who may write there everybody can run code here
train.compile_cache=                    none
JAX_COMPILATION_CACHE_DIR=DIR           wins over all
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept(where: str, run: Path) -> Iterator[None]:
    """Inside, programs that take over a second to compile are read from the cache `where` (see the module), or written to it."""
    if not where or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield
        return
    folder = run / "cache" / "compiled" if where == "run" else Path(where).expanduser()
    before = jax.config.jax_compilation_cache_dir
    try:
        _use(str(folder.absolute()))
        yield
    finally:
        _use(before)


def _use(folder: str | None) -> None:
    compilation_cache.reset_cache()  # jax reads the folder's name once
    jax.config.update("jax_compilation_cache_dir", folder)

"""Tests run on eight fake CPU devices, so that every mesh shape can be built on a laptop, and keep what they compiled for the next time.

Two thirds of a first run are XLA compiling small programs. ~/.cache/vlm_jax/tests may be deleted at any time; JAX_COMPILATION_CACHE_DIR
names another folder.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
_CACHES = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHES / "vlm_jax" / "tests"))
os.environ.setdefault(
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05"
)  # seconds; smaller programs are not worth a file

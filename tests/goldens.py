"""Where recorded numbers lie, and how tests find their cases: by globbing, never by name.

VLM_JAX_GOLDENS replaces tests/goldens, so that other cases of the same kinds run through the same tests. Material of other projects
is not in this repository; VLM_JAX_SHARED (default: a folder `shared` beside the checkout) says where it is, if anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
GOLDENS = Path(os.environ.get("VLM_JAX_GOLDENS", ROOT / "goldens"))
SHARED = Path(os.environ.get("VLM_JAX_SHARED", ROOT.parent.parent / "shared"))


def cases(folder: str, pattern: str) -> list[Path]:
    """Sorted files of one kind, e.g. cases("llava", "preprocess_*.json"); empty where the root has none."""
    return sorted((GOLDENS / folder).glob(pattern))


def needs_shared(relative: str) -> Path:
    """A file of another project, or skip."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} belongs to another project and is not in this repository; set VLM_JAX_SHARED to the folder that has it")
    return path

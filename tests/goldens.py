"""Where recorded numbers lie, and how tests find their cases: by globbing, never by name.

VLM_JAX_GOLDENS replaces tests/goldens, so that other cases of the same kinds run through the same tests.
Material of other projects is not in this repository; VLM_JAX_SHARED (default: a folder `shared` beside the
checkout) says where it is, if anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        pytest.skip(
            f"{relative} belongs to another project and is not in this repository; "
            "set VLM_JAX_SHARED to the folder that has it"
        )
    return path


def golden(folder: str, *patterns: str, holds: Callable[[Any], bool] | None = None):
    """Run a test with argument `path` once per file of a kind; where the root has none the test is not
    collected at all.

    `holds` chooses JSON files by what they contain, where several kinds share a pattern.
    """
    paths = sorted({path for pattern in patterns for path in cases(folder, pattern)})
    if holds is not None:
        paths = [path for path in paths if holds(json.loads(path.read_text(encoding="utf-8")))]

    def mark(test):
        return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)(test) if paths else None

    return mark


def beside(path: Path, name: str) -> Path:
    """What a case needs beyond its own file: next to it, else this project's own copy, else another
    project's, or skip.
    """
    own = ROOT / "goldens" / path.parent.relative_to(GOLDENS) / name
    found = next((p for p in (path.parent / name, own) if p.exists()), None)
    return found or needs_shared(f"goldens/{path.parent.relative_to(GOLDENS)}/{name}")

"""The plan of the house, enforced: who may import whom, file and function length, words that name no room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "vlm_jax").rglob("*.py"))
ROOMS = (
    "nn",
    "parallel",
    "models",
    "visual_tokenizers",
    "data",
    "train",
    "generate",
    "evaluate",
    "serve",
    "convert",
    "planning",
)

# room -> rooms it may import (itself is always allowed; `config` and the top-level options are open to all)
DOORS = {
    "parallel": set(),
    "nn": {"parallel"},
    "models": {"nn", "parallel"},
    "visual_tokenizers": {"nn", "parallel"},
    "data": {"models"},
    "convert": {"visual_tokenizers"},
    "train": {"models", "visual_tokenizers", "nn", "parallel", "convert", "data"},
    "generate": {"models", "visual_tokenizers", "nn", "parallel", "convert", "data"},
    "evaluate": {"generate", "data", "models", "visual_tokenizers", "convert", "parallel"},
    "planning": {"train", "generate", "models", "visual_tokenizers", "parallel"},
    "serve": {"generate", "data", "models", "parallel"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of this package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {n for n in found if n.startswith("vlm_jax")}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "vlm_jax").parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_doors(path):
    room = room_of(path)
    for name in imports(path):
        assert not name.startswith("vlm_jax.__main__"), f"{path.name} imports the command line"
        parts = name.split(".")
        if room and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
            assert parts[1] in DOORS[room], f"{room} may not import {name}: its doors are {sorted(DOORS[room])}"
        if room == "nn" and parts[1:2] == ["parallel"]:
            assert name.startswith("vlm_jax.parallel.rules") or name == "vlm_jax.parallel.rules"
        if room == "data" and parts[1:2] == ["models"]:
            assert parts[2] == "slots", "data may only ask the models how many slots an image takes"


@pytest.mark.parametrize(
    "path", FILES + sorted((ROOT / "configs").glob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400, f"{path} has over 400 lines: split it along what it is about"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name} is over 60 lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_are_documented(path):
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py" and path.parent != ROOT / "vlm_jax":
        assert not path.read_text().strip(), f"{path} must be empty"
        return
    assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_names_of_files_say_what_they_hold():
    vague = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
    assert not [p for p in FILES if p.stem in vague]


def test_nothing_from_this_package_needs_torch():
    assert not [
        p
        for p in FILES
        if any(line.strip().startswith(("import torch", "from torch")) for line in p.read_text().splitlines())
    ]

"""Python objects that lie beside the tensors of a training checkpoint: what a pickle says about them is kept, none of them is made.

    {"model": {...}, "optimizer": {...}, "args": Namespace(...)}        LlamaGen
    {"state_dict": {...}, "callbacks": {ModelCheckpoint: {...}}}        PyTorch Lightning: HQ-VAE, UniCode

A global of KNOWN becomes a class of ours that only remembers. Nothing of the named module is imported or called; every other global
is refused by `torch_pickle` with one sentence.
"""

from __future__ import annotations

from typing import Any

# settings, paths, schedules and the like: they say how the weights came about, and never hold them
PACKAGES = (
    "omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "typing", "torch.optim", "torch.torch_version",
    "easydict", "yacs", "ml_collections", "rqvae", "hqvae",
)  # fmt: skip
PLAIN = ("dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "str", "bytes", "bool", "object")
KNOWN = {
    *((module, name) for module in ("builtins", "__builtin__") for name in PLAIN),
    *((module, "_reconstructor") for module in ("copyreg", "copy_reg")),
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("argparse", "Namespace"),
    ("collections", "defaultdict"),
    ("numpy", "dtype"),
    ("torch", "device"),
    ("_codecs", "encode"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
}


class Remembered:
    """An object of a pickle: `kind` says what it was, `args` what it was called with, `state` what it was given after."""

    kind = ""

    def __new__(cls, *args: Any, **_: Any) -> Remembered:
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.state.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.state[key] = value

    def append(self, value: Any) -> None:
        """An item of a list, which is not kept."""

    def extend(self, values: Any) -> None:
        """Items of a list, which are not kept."""


def remembered(module: str, name: str) -> type[Remembered] | None:
    """A class that stands for the global `module.name`, or None where it is not one of those that training programs save."""
    room = next((p for p in PACKAGES if module == p or module.startswith(p + ".")), None)
    if room is None and (module, name) not in KNOWN:
        return None
    return type("Remembered", (Remembered,), {"kind": f"{module}.{name}"})

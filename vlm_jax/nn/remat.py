"""What a backward pass finds saved of a block, by name; the rest is computed again.

    none        everything                        linears     every matrix product (softmax, norms, activations again)
    full        only the blocks' inputs           attention   the attention output
Where no gradient passes through the blocks (a frozen tower) nothing is saved whatever the name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from vlm_jax.config import REMATS, one_of

_POLICIES = jax.checkpoint_policies
POLICIES = {
    "full": _POLICIES.nothing_saveable,
    "linears": _POLICIES.save_only_these_names("qkv", "attention", "o", "gate_up", "down"),
    "attention": _POLICIES.save_only_these_names("attention"),
}


def remat(name: str) -> Callable | None:
    """Wrapper of a scan's body for `name`, None for "none"."""
    one_of("remat", name, REMATS)
    return None if name == "none" else functools.partial(jax.checkpoint, policy=POLICIES[name])

"""FLOPs of the convolutions and matrix products of a function, counted from its equations; nothing is computed.

    convolution      2 x numbers that come out x kernel positions x channels that go in (of a group) / dilation of the input
    matrix product   2 x numbers that come out x length of the sums
Loops count by their turns, and of the branches of a condition the dearest counts. Positions outside the image count like those
inside, everything that is neither (norms, activations) counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from vlm_jax.parallel import rules


class Products(NamedTuple):
    """FLOPs by kind."""

    convolutions: float = 0.0
    matrices: float = 0.0

    @property
    def total(self) -> float:
        """Both together."""
        return self.convolutions + self.matrices


def products(function: Callable[..., Any], *arguments: Any) -> Products:
    """Of function(*arguments), which may be ShapeDtypeStructs; as written, not as a CPU saves some of them (visual_tokenizers.winograd)."""
    with rules.usual_ways():
        return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> Products:
    convolutions = matrices = 0.0
    for one in jaxpr.eqns:
        name = one.primitive.name
        if name == "conv_general_dilated":
            convolutions += _convolution(one)
        elif name == "dot_general":
            (contracted, _), _ = one.params["dimension_numbers"]
            left = one.invars[0].aval.shape
            matrices += 2 * one.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
        inner = [_count(x) for x in _inside(one)]
        if inner and name == "cond":
            inner = [max(inner, key=lambda p: p.total)]
        turns = one.params["length"] if name == "scan" else 1
        convolutions += turns * sum(p.convolutions for p in inner)
        matrices += turns * sum(p.matrices for p in inner)
    return Products(convolutions, matrices)


def _convolution(one: Any) -> float:
    """See the module; zeros that a transposed convolution puts between its inputs are no work."""
    kernel, spec = one.invars[1].aval.shape, one.params["dimension_numbers"].rhs_spec
    positions = math.prod(kernel[axis] for axis in spec[2:]) / math.prod(one.params["lhs_dilation"])
    return 2 * one.outvars[0].aval.size * positions * kernel[spec[1]]


def _inside(one: Any) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in one.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr

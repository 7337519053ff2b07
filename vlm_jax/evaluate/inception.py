"""InceptionV3 as FID uses it (Heusel et al. 2017; pytorch-fid's port of the 2015 TensorFlow graph): images -> features.

    uint8 [B, H, W, 3] -> x / 255 -> bilinear to 299 x 299 without antialiasing -> 2 x - 1 -> blocks -> mean over space

    features   64               192            768           2048
    after      Conv2d_2b, pool  Conv2d_4a, pool  Mixed_6e    Mixed_7c

Weights are those of pt_inception-2015-12-05-6726825d.pth under their published names. Every convolution is followed by a batch norm
(eps 1e-3), folded into its kernel and bias when it is read, and a ReLU. Unlike torchvision's network, average pools leave padding out
of the count and the last one takes the maximum. All in float32 at the highest precision: features of lower precision shift an FID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.config import UserError, one_of
from vlm_jax.parallel.mesh import MeshConfig, make_mesh
from vlm_jax.parallel.rules import sharding

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 299
CLASSES = 1008  # of the FID network; torchvision's has the same names and shapes but 1000 classes and other weights
EPS = 1e-3

# A module joins the results of its branches. A branch is a chain of steps: a convolution that keeps the size; "name/s", one with stride
# s and no padding; "a|b", both of them side by side; or a pooling of 3 x 3, "max/2" with stride 2 and no padding.
_A = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "average branch_pool")
_B = ("branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2")
_C = (
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "average branch_pool",
)
_D = ("branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2")
_E = (
    "branch1x1",
    "branch3x3_1 branch3x3_2a|branch3x3_2b",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
)
BLOCKS = {  # width of the features -> modules up to there
    64: (("", ("Conv2d_1a_3x3/2 Conv2d_2a_3x3/1 Conv2d_2b_3x3 max/2",)),),
    192: (("", ("Conv2d_3b_1x1 Conv2d_4a_3x3/1 max/2",)),),
    768: (
        *((f"Mixed_{name}", _A) for name in ("5b", "5c", "5d")),
        ("Mixed_6a", _B),
        *((f"Mixed_{name}", _C) for name in ("6b", "6c", "6d", "6e")),
    ),
    2048: (
        ("Mixed_7a", _D),
        ("Mixed_7b", (*_E, "average branch_pool")),
        ("Mixed_7c", (*_E, "max branch_pool")),
    ),
}
DIMS = tuple(BLOCKS)


def convolutions() -> list[str]:
    """Published names of all convolutions, e.g. "Mixed_5b.branch1x1"."""
    found = []
    for modules in BLOCKS.values():
        for module, branches in modules:
            steps = [step for branch in branches for step in branch.replace("|", " ").split()]
            found += [_name(module, s) for s in steps if s.partition("/")[0] not in ("max", "average")]
    return found


def _name(module: str, step: str) -> str:
    return f"{module}.{step.partition('/')[0]}".removeprefix(".")


def read_inception(tensors: Mapping[str, np.ndarray], file: str = "the file") -> dict[str, np.ndarray]:
    """{"<convolution>/kernel" [h, w, in, out], "<convolution>/bias" [out]}, float32, of the published tensors.

    Raises UserError naming `file` where a tensor is absent or the weights are torchvision's.
    """
    head = tensors.get("fc.weight")
    if head is not None and len(head) != CLASSES:
        raise UserError(
            f"{file} is an Inception of {len(head)} classes, trained for ImageNet: FID is defined by the one of {CLASSES}, {FILE}"
        )
    params = {}
    for name in convolutions():
        keys = [f"{name}.conv.weight", *(f"{name}.bn.{k}" for k in ("weight", "bias", "running_mean", "running_var"))]
        absent = next((key for key in keys if key not in tensors), None)
        if absent:
            raise UserError(f"{file} lacks the tensor {absent}: it is not FID's Inception network, give {FILE}")
        kernel, scale, bias, mean, variance = (np.asarray(tensors[key], np.float64) for key in keys)
        factor = scale / np.sqrt(variance + EPS)
        params[f"{name}/kernel"] = (kernel.transpose(2, 3, 1, 0) * factor).astype(np.float32)
        params[f"{name}/bias"] = (bias - mean * factor).astype(np.float32)
    return params


def resize(images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 [B, 299, 299, 3] in [-1, 1]."""
    x = images.astype(jnp.float32) / 255
    return jax.image.resize(x, (len(x), SIZE, SIZE, 3), "bilinear", antialias=False) * 2 - 1


def features(params: Mapping[str, jax.Array], pixels: jax.Array, dims: int = 2048) -> jax.Array:
    """[B, dims] of what `resize` gives: the spatial mean after the block that is `dims` wide."""
    x = pixels
    with jax.default_matmul_precision("highest"):
        for width, modules in BLOCKS.items():
            for module, branches in modules:
                x = jnp.concatenate([_branch(params, module, branch, x) for branch in branches], -1)
            if width == dims:
                break
        return x.mean((1, 2))


def _branch(params: Mapping[str, jax.Array], module: str, branch: str, x: jax.Array) -> jax.Array:
    for step in branch.split():
        x = jnp.concatenate([_step(params, module, one, x) for one in step.split("|")], -1)
    return x


def _step(params: Mapping[str, jax.Array], module: str, step: str, x: jax.Array) -> jax.Array:
    kind, _, stride = step.partition("/")
    strides, padding = (int(stride or 1),) * 2, "VALID" if stride else "SAME"
    if kind not in ("max", "average"):
        name = _name(module, step)
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}/kernel"], strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(y + params[f"{name}/bias"])
    window, by = (1, 3, 3, 1), (1, *strides, 1)
    if kind == "max":
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, by, padding)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, by, padding)
    return total / jax.lax.reduce_window(jnp.ones_like(x[:1, :, :, :1]), 0.0, jax.lax.add, window, by, padding)


class Inception:
    """The network on the devices of this process, `batch` images at a time: called with images, it gives their features.

    params: of `read_inception`; dims: one of DIMS; mesh: default all devices of this process; file: the weights', for messages.
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        dims: int = 2048,
        batch: int = 64,
        mesh: Mesh | None = None,
        file: str = "the file",
    ):
        one_of("--dims", str(dims), tuple(map(str, DIMS)))
        try:
            jax.eval_shape(lambda: features(params, jnp.zeros((1, SIZE, SIZE, 3)), dims))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{file}: the tensors of the convolutions do not have the shapes of FID's Inception network, give {FILE}"
            ) from error
        self.mesh = mesh or make_mesh(MeshConfig(data=-1, fsdp=1), jax.local_devices())
        self.dims, self.batch = dims, -(-batch // self.mesh.size) * self.mesh.size
        self.params = jax.device_put(dict(params), NamedSharding(self.mesh, PartitionSpec()))
        # two programs, so that a folder of many sizes compiles the network once
        self._resize = jax.jit(resize)
        self._features = jax.jit(lambda params, pixels: features(params, pixels, dims))

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, dims] of N uint8 images [H, W, 3], which may differ in size."""
        found = [self._some(images[at : at + self.batch]) for at in range(0, len(images), self.batch)]
        return np.concatenate(found) if found else np.zeros((0, self.dims), np.float32)

    def _some(self, images: Sequence[np.ndarray]) -> np.ndarray:
        alike = len({image.shape for image in images}) == 1
        blocks = [np.stack(images)] if alike else [image[None] for image in images]
        if alike and len(images) < self.batch:  # the shape that is compiled already
            blocks = [np.resize(blocks[0], (self.batch, *blocks[0].shape[1:]))]
        pixels = jnp.concatenate([self._resize(block) for block in blocks])
        pixels = jnp.pad(pixels, ((0, self.batch - len(pixels)), (0, 0), (0, 0), (0, 0)))
        where = sharding(("batch", None, None, None), pixels.shape, self.mesh)
        return np.asarray(self._features(self.params, jax.device_put(pixels, where)))[: len(images)]

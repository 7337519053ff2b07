"""Mean and covariance of features in float64, and the Fréchet distance of two normal distributions (FID, Heusel et al. 2017).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2),   S = scatter / (n - 1)
    tr sqrt(S1 S2) = sum of the singular values of sqrt(S1) sqrt(S2)

The second line needs no square root of a matrix that is not symmetric, has no imaginary part, and is as exact for covariances
without full rank, for which the original adds 1e-6 to the diagonals when its square root fails.

statistics file: npz with mu [D] and sigma [D, D], as pytorch-fid writes them; `count` beside them where we wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from vlm_jax.config import UserError
from vlm_jax.convert.files import replacing

ROWS = 1024  # features that enter the sums at once
NEGATIVE = (
    1e-4  # a covariance's most negative eigenvalue, as a share of the largest, that may be rounding (float32 files)
)


@dataclasses.dataclass(frozen=True)
class Moments:
    """mu [D] and sigma [D, D], float64. count: images they were made of, 0 if unknown; source: words for messages."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int = 0
    source: str = "the statistics"

    def __post_init__(self):
        d = self.mu.size
        if self.mu.shape != (d,) or self.sigma.shape != (d, d) or not d:
            raise UserError(
                f"{self.source}: mu has shape {self.mu.shape} and sigma {self.sigma.shape}, which must be [D] and [D, D]"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise UserError(f"{self.source}: mu or sigma has values that are not finite; compute them again")

    @property
    def full_rank(self) -> bool:
        """Whether there were enough images for a covariance of full rank; True if their number is unknown."""
        return not self.count or self.count > self.mu.size

    def save(self, path: str | Path) -> None:
        """Write a statistics file."""
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma, count=self.count)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums that can be merged: n rows, their mean [D], and scatter [D, D] = sum of (x - mean)(x - mean)^T, in float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def nothing(cls, dims: int) -> Statistics:
        """Of no rows."""
        return cls(0, np.zeros(dims), np.zeros((dims, dims)))

    @classmethod
    def of(cls, rows: np.ndarray) -> Statistics:
        """Of features [N, D], N > 0."""
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def merge(self, other: Statistics) -> Statistics:
        """Of both sets of rows together (Chan, Golub and LeVeque 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, gap = self.count + other.count, other.mean - self.mean
        between = np.outer(gap, gap) * (self.count * other.count / count)
        return Statistics(count, self.mean + gap * (other.count / count), self.scatter + other.scatter + between)

    def moments(self, source: str) -> Moments:
        """mu and sigma (divided by n - 1); UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"{source} has {self.count} usable images: a covariance needs at least 2")
        return Moments(self.mean, self.scatter / (self.count - 1), self.count, source)


def collect(blocks: Iterable[np.ndarray], dims: int) -> Statistics:
    """Statistics of features that come in blocks [n, D]; a pass over D x D sums is made once in ROWS rows."""
    total, waiting = Statistics.nothing(dims), []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= ROWS:
            total, waiting = total.merge(Statistics.of(np.concatenate(waiting))), []
    rows = np.concatenate(waiting) if waiting else ()
    return total.merge(Statistics.of(rows)) if len(rows) else total


def over_processes(mine: Statistics) -> Statistics:
    """The statistics of the rows of all processes, the same in each; `mine` where there is one process."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils  # here, because it starts the backend

    flat = np.concatenate([[mine.count], mine.mean, mine.scatter.reshape(-1)])
    total, d = Statistics.nothing(len(mine.mean)), len(mine.mean)
    for bits in multihost_utils.process_allgather(flat.view(np.uint32)):  # JAX would make float32 of float64
        part = np.ascontiguousarray(bits).view(np.float64)
        total = total.merge(Statistics(int(part[0]), part[1 : d + 1], part[d + 1 :].reshape(d, d)))
    return total


def read_statistics(path: str | Path) -> Moments:
    """A statistics file; UserError in one sentence if it is none."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files if name in ("mu", "sigma", "count", "mu_s")}
            names = file.files
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give a folder of images or a statistics file (.npz)") from error
    except Exception as error:  # numpy raises anything for a file that is none of its own
        raise UserError(f"{path} is no npz file with mu and sigma ({error})") from error
    if "mu_s" in arrays:
        raise UserError(
            f"{path} holds statistics of the ADM evaluator, whose features are not those of this network: "
            "give the reference images, or statistics made of them with --statistics"
        )
    if not {"mu", "sigma"} <= arrays.keys():
        raise UserError(f"{path} has no mu and sigma, only {', '.join(names)}: write one with --statistics")
    mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    return Moments(mu, sigma, int(arrays.get("count", 0)), str(path))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The distance, at least 0; UserError where the numbers of features differ or a sigma is no covariance."""
    if a.mu.size != b.mu.size:
        raise UserError(
            f"{a.source} has {a.mu.size} features and {b.source} {b.mu.size}: compare statistics of the same --dims"
        )
    cross = np.linalg.svd(_root(a).T @ _root(b), compute_uv=False).sum()
    gap = a.mu - b.mu
    return max(0.0, float(gap @ gap + np.trace(a.sigma) + np.trace(b.sigma) - 2 * cross))


def _root(m: Moments) -> np.ndarray:
    """R [D, r] with R R^T = sigma, of its r positive eigenvalues."""
    values, vectors = np.linalg.eigh((m.sigma + m.sigma.T) / 2)
    largest = max(values[-1], 0.0)
    if values[0] < -NEGATIVE * largest - 1e-12:
        raise UserError(
            f"{m.source}: sigma has the eigenvalue {values[0]:.3g}, so it is no covariance; compute it again"
        )
    keep = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, keep] * np.sqrt(values[keep])

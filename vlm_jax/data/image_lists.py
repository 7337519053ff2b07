"""Images without text, from whatever holds them: one sequence of sources, in an order that depends on names alone.

a folder                    every image below it, by path
*.png, x.jpg                image files
list.txt                    a path per line
*.tar, *.array_record       the images of shards, texts or not; also a folder of shards
x.json, x.jsonl             the images of LLaVA records, each once
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vlm_jax.config import UserError
from vlm_jax.data.array_records import ArrayShard
from vlm_jax.data.image_options import ImageDataConfig
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.manifest import DataError
from vlm_jax.data.records import Records
from vlm_jax.data.sources import expand
from vlm_jax.data.tar_shards import IMAGES, TarShard

SHARDS = (".array_record", ".tar")


class ImageList(Sequence[ImageSource]):
    """Images in order; `fingerprint`: hash of where they are, `skipped`: sentences about records that could not be read."""

    def __init__(self, images: Sequence[ImageSource], skipped: Sequence[str] = (), roots: Sequence[str] = ()):
        self._images, self.skipped = list(images), list(skipped)
        places = ((_below(image.path, roots), *(image.piece or ()), image.member) for image in self._images)
        self.fingerprint = hash_of(*("|".join(map(str, place)) for place in places))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> ImageSource:
        return self._images[index]


def open_images(config: ImageDataConfig, cache: str | Path | None = None) -> ImageList:
    """The images of data.path; DataError or RecordError in one sentence if there are none, or a place is of no kind we know.

    cache: folder for what is found out about shards (default: none).
    """
    if not config.path:
        raise DataError(
            "there are no images: set data.path to folders, image files, lists or shards, or data.generated_watches"
        )
    images, skipped, places = [], [], []
    for pattern in config.path:
        for path in expand(pattern):
            images += _open(path, config, cache, skipped)
            places.append(path)
    if not images:
        first = f"; the first record that could not be read: {skipped[0]}" if skipped else ""
        raise DataError(f"there are no images in {', '.join(config.path)}: check data.path{first}")
    return ImageList(images, skipped, [path for path in places if os.path.isdir(path)])


def _open(path: str, config: ImageDataConfig, cache: str | Path | None, skipped: list[str]) -> Iterator[ImageSource]:
    kinds: dict[str, Callable[[str], Iterator[ImageSource]]] = {
        ".txt": lambda path: _listed(Path(path), config.image_folder),
        ".tar": lambda path: TarShard(path, cache=cache).images(),
        ".array_record": lambda path: ArrayShard(path).images(),
        ".json": lambda path: _of_records(path, config.image_folder, cache, skipped),
    }
    kinds[".jsonl"] = kinds[".json"]
    if os.path.isdir(path):
        for ending in SHARDS:
            found = sorted(str(file) for file in Path(path).glob(f"*{ending}"))
            if found:
                return (image for file in found for image in kinds[ending](file))
        return (ImageSource(file) for file in _below_folder(path))
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist: check data.path")
    ending = os.path.splitext(path)[1].lower()
    if ending in kinds:
        return kinds[ending](path)
    if ending[1:] in IMAGES:
        return iter((ImageSource(path),))
    raise DataError(
        f"{path} is of an unknown kind: images come from folders, image files, .txt lists, .tar, .array_record, .json and .jsonl files"
    )


def _below_folder(folder: str) -> Iterator[str]:
    """Paths of all images below `folder`, sorted; hidden files and folders are left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGES:
                yield os.path.join(place, name)


def _listed(path: Path, folder: str) -> Iterator[ImageSource]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text, a list has one path per line: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield ImageSource(os.path.join(folder or path.parent, line.strip()), f"line {number} of {path}")


def _of_records(path: str, folder: str, cache: str | Path | None, skipped: list[str]) -> Iterator[ImageSource]:
    records, seen = Records(path, image_folder=folder or os.path.dirname(path), cache=cache), set()
    for index in range(len(records)):
        try:
            record = records[index]
        except UserError as error:
            skipped.append(str(error))
            continue
        for image in record.images:
            source = ImageSource.of(image, record.where)
            if (source.path, source.piece) not in seen:
                seen.add((source.path, source.piece))
                yield source


def named(images: Sequence[ImageSource], places: Sequence[str]) -> dict[str, ImageSource]:
    """{name: image} in order, from the images of `places`: names are those below a folder that was given, where that makes them unique.

    An image that was given twice is there once.
    """
    roots = [place for place in places if os.path.isdir(place)]
    plain, whole = ([_name(image, roots) for image in images] for roots in (roots, []))
    unique: dict[str, ImageSource] = {}
    for name, image in zip(plain if len(set(plain)) == len(plain) else whole, images):
        unique.setdefault(name, image)
    return unique


def _name(image: ImageSource, roots: Sequence[str]) -> str:
    path = Path(_below(image.path, roots)).as_posix()
    return f"{path}:{image.member}" if image.member else path


def _below(path: str, roots: Sequence[str]) -> str:
    """`path` from the folder of data.path that it lies in, so that a copy of the folder elsewhere has the same fingerprint."""
    root = next((root for root in roots if path.startswith(os.path.join(root, ""))), None)
    return path if root is None else os.path.relpath(path, root)

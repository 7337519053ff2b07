"""The TFDS data set `llava_mixture`: dialogues with their encoded images in ArrayRecord files, built and read without TensorFlow.

    {"id", "task", "conversations": [{"from", "value"}, ...], "images": [bytes, ...], "image_names": [name, ...]}

For pods and for programs that read TFDS; images are ordinary TFDS image features to them. Records keep their order. Reading a text
reads its images too, which shards of `data.array_records` do not.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.config import ConfigError
from vlm_jax.data.array_records import Skipped, Written, whole_records
from vlm_jax.data.image_source import ImageSource
from vlm_jax.data.kept_arrays import hash_of
from vlm_jax.data.records import Record, RecordError, Records, record_of

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ConfigError("TFDS data sets need the package tensorflow-datasets: pip install 'vlm_jax[tfds]'") from error

log = logging.getLogger(__name__)
SPLIT = "train"


class LlavaMixture(tfds.core.GeneratorBasedBuilder):
    """Dialogues about images in LLaVA's format.

    path, image_folder, image_roots: a LLaVA .json or .jsonl file and where its images lie (see data.records.ImagePaths); or `records`,
    any sequence of Record. After the build `skipped` holds the records that were left out, `counts` records and images.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        path: str = "",
        image_folder: str = "",
        image_roots: Mapping[str, str] | None = None,
        records: Sequence[Record] | None = None,
        threads: int = 8,
        **options: Any,
    ):
        self.records = Records(path, image_folder, roots=image_roots) if records is None and path else records
        self.threads, self.skipped, self.counts = threads, [], [0, 0]
        super().__init__(**{"file_format": "array_record", **options})

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "id": text,
            "task": text,
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "image_names": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Dialogues about images in LLaVA's format.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        if self.records is None:
            raise ConfigError("llava_mixture has no records: give it path and image_folder, or records")
        return {SPLIT: self._generate_examples(self.records)}

    def _generate_examples(self, records: Sequence[Record]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.skipped, self.counts = [], [0, 0]
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            for one in whole_records(records, range(len(records)), pool):
                if isinstance(one, Skipped):
                    self.skipped.append(one)
                    continue
                self.counts = [self.counts[0] + 1, self.counts[1] + len(one.images)]
                yield (
                    one.index,
                    {
                        "id": one.record.id,
                        "task": one.record.task,
                        "conversations": [{"from": role, "value": text} for role, text in one.record.turns],
                        "images": [data for _, _, data in one.images],
                        "image_names": [name for _, name, _ in one.images],
                    },
                )


def build(records: Sequence[Record], folder: str | Path, *, shards: int | None = None, threads: int = 8) -> Written:
    """Write `records` as a TFDS data set under the data_dir `folder`; returns what it came to.

    A record that cannot be used, or an image that cannot be decoded, is left out and returned with its reason.
    """
    builder = LlavaMixture(records=records, threads=threads, data_dir=str(folder))
    home = Path(builder.data_dir)
    if home.exists():
        raise ConfigError(f"{home} is there already: write into another folder, or remove it")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    for empty in ("downloads/extracted", "downloads"):  # TFDS makes them, and nothing was downloaded
        if (Path(folder) / empty).is_dir() and not any((Path(folder) / empty).iterdir()):
            (Path(folder) / empty).rmdir()
    files = tuple(sorted(home.glob("*array_record*")))
    size = sum(file.stat().st_size for file in files)
    return Written(files, builder.counts[0], builder.counts[1], size, tuple(builder.skipped))


class TfdsRecords(Sequence[Record]):
    """The records of a TFDS folder with the features above, random access; images are bytes in memory.

    folder: that of the version, which holds dataset_info.json. split: "" takes train, or the only one there is.
    """

    def __init__(self, folder: str | Path, split: str = ""):
        self.folder = Path(folder)
        try:
            builder = tfds.builder_from_directory(str(folder))
            splits = list(builder.info.splits)
            if not split:
                split = SPLIT if SPLIT in splits or not splits else splits[0]
            missing = {"id", "conversations", "images"} - set(builder.info.features)
        except Exception as error:  # a damaged folder raises anything
            raise RecordError(f"{folder} cannot be read as a TFDS data set: {_line(error)}", "file") from error
        if missing:
            raise RecordError(
                f"{folder} is a TFDS data set without {', '.join(sorted(missing))}: only llava_mixture is read", "file"
            )
        if split not in splits:
            raise RecordError(f"{folder} has no split {split!r}: it has {', '.join(splits) or 'none'}", "file")
        self._examples = builder.as_data_source(split, decoders={"images": _Encoded()})
        stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.folder.iterdir())]
        self.fingerprint = hash_of(split, (self.folder / "dataset_info.json").read_text(encoding="utf-8"), stamps)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} records, there is no number {index}")
        index %= len(self)
        try:
            example = self._examples[index]
        except RuntimeError as error:
            raise RecordError(f"{self.folder}: record {index} cannot be read: {_line(error)}", "file") from error
        data = example["images"]
        names = [name.decode() for name in example.get("image_names", [])] or [f"{k}" for k in range(len(data))]
        turns = example["conversations"]
        raw = {
            "id": example["id"].decode(),
            "task": example.get("task", b"").decode(),
            "image": names,
            "conversations": [
                {"from": a.decode(), "value": b.decode()} for a, b in zip(turns["from"], turns["value"], strict=True)
            ],
        }
        images = [ImageSource(name, data=bytes(encoded)) for name, encoded in zip(names, data, strict=True)]
        return record_of(raw, index, self.folder, place=lambda _: images)

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))


class _Encoded(tfds.decode.SkipDecoding):
    """SkipDecoding for a sequence of images, which TFDS leaves out where TensorFlow is not used."""

    def decode_batch_example_np(self, example: Sequence[bytes]) -> list[bytes]:
        return list(example)


def tfds_folders(path: str | Path) -> list[Path]:
    """The version folders of TFDS data sets at or up to three levels below `path` (data_dir/name/config/version)."""
    path = Path(path)
    found = [file.parent for depth in range(4) for file in path.glob("*/" * depth + "dataset_info.json")]
    return sorted(folder for folder in found if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) or folder == path)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Where the bytes of an image are: a file, a piece of a larger file (a tar shard), or memory. Nothing is read until it is opened."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import BinaryIO

from vlm_jax.config import UserError


class ImageError(UserError):
    """An image that cannot be used; the message names the file and the record, `reason` is one of data.images.REASONS."""

    def __init__(self, message: str, reason: str = "broken"):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An image file, a piece of a file, or bytes; `record` says who needs it.

    path: the file, or only a name where there is `data`. piece: (offset, bytes) inside the file; `member` is then the name of the
    image there.
    """

    path: str
    record: str = ""
    data: bytes | None = None
    piece: tuple[int, int] | None = None
    member: str = ""

    @property
    def label(self) -> str:
        """Words for messages."""
        name = f"{self.path}:{self.member}" if self.member else self.path
        return f"image {name}" + (f" of {self.record}" if self.record else "")

    @property
    def key(self) -> tuple[str, tuple[int, int] | None, bytes | None]:
        """What tells images apart: the file and the piece of it, or the bytes."""
        return ("", None, self.data) if self.data is not None else (self.path, self.piece, None)

    @classmethod
    def of(cls, image: ImageSource | str | Path | bytes, record: str = "") -> ImageSource:
        """A source from whatever a sample holds: a source (given the record's name if it has none), a path, or encoded bytes."""
        if isinstance(image, ImageSource):
            return image if image.record else dataclasses.replace(image, record=record)
        return cls("in memory", record, image) if isinstance(image, bytes) else cls(str(image), record)

    def exists(self) -> bool:
        """Whether the file is there (it is not opened)."""
        return self.data is not None or os.path.isfile(self.path)

    def open(self) -> BinaryIO | str:
        """What Pillow can open: the path, or the bytes as a file; raises OSError."""
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.piece is None:
            return self.path
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """The encoded bytes; raises OSError."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            if self.piece is None:
                return file.read()
            file.seek(self.piece[0])
            data = file.read(self.piece[1])
        if len(data) != self.piece[1]:
            raise OSError(f"{self.path} ends inside {self.member or 'an image'}: it is cut short")
        return data

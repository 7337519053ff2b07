"""torch.save files without torch: a reader that runs no code, and a writer of plain state dicts.

    zip (torch >= 1.6)   <root>/data.pkl, <root>/data/<key> = raw storage, <root>/byteorder, <root>/version;
                         entries are stored, not deflated
    legacy (< 1.6)       pickles: magic, protocol, system info, object, storage keys;
                         then per key: int64 element count, raw storage

Both pickle a tensor as `_rebuild_tensor_v2(storage, offset, size, stride, ...)`, the storage as a persistent
id `("storage", torch.FloatStorage, key, location, elements)`. Storages are memory-mapped on reading, never
loaded ahead.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_jax.convert.files import replacing
from vlm_jax.convert.pickled_objects import remembered
from vlm_jax.convert.tensors import DTYPES, CheckpointError, Index, Tensor, resolve

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "FloatStorage": DTYPES["f32"], "HalfStorage": DTYPES["f16"], "BFloat16Storage": DTYPES["bf16"],
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
    "UntypedStorage": np.dtype(np.uint8),
}  # fmt: skip
SCALARS = {
    "float32": DTYPES["f32"], "float": DTYPES["f32"], "float16": DTYPES["f16"], "half": DTYPES["f16"],
    "bfloat16": DTYPES["bf16"],
    "float64": np.dtype(np.float64), "double": np.dtype(np.float64), "int64": np.dtype(np.int64),
    "long": np.dtype(np.int64),
    "int32": np.dtype(np.int32), "int": np.dtype(np.int32), "int16": np.dtype(np.int16),
    "short": np.dtype(np.int16),
    "int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32), "uint64": np.dtype(np.uint64),
}  # fmt: skip
WRITTEN = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


class _Storage:
    """A run of elements somewhere in the file; `bytes_at()` maps it as uint8."""

    __slots__ = ("dtype", "elements", "map")

    def __init__(self, dtype: np.dtype, elements: int):
        self.dtype, self.elements, self.map = dtype, elements, None


class _Strided:
    """A tensor of the file: storage, offset, size and strides in elements (gets its name from the dict that
    holds it).
    """

    __slots__ = ("storage", "offset", "shape", "strides", "dtype")

    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, dtype: np.dtype):
        self.storage, self.offset, self.dtype = storage, int(offset), dtype
        self.shape, self.strides = tuple(map(int, shape)), tuple(map(int, strides))
        reach = (
            self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1 if math.prod(self.shape) else 0
        )
        room = storage.elements * storage.dtype.itemsize
        if (
            len(self.shape) != len(self.strides)
            or min((self.offset, *self.shape, *self.strides)) < 0
            or reach * dtype.itemsize > room
        ):
            raise pickle.UnpicklingError(f"a tensor of shape {self.shape} does not fit its storage")

    def read(self, index: Index) -> np.ndarray:
        """The slice `index`, contiguous."""
        index = resolve(index, self.shape)
        shape = tuple(max(0, i.stop - i.start) for i in index)
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        flat = self.storage.map().view(self.dtype)[self.offset :]
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [s * self.dtype.itemsize for s in self.strides], writeable=False
        )
        return np.array(view[index], order="C")


class _Known:
    """Stands for a global of a torch pickle; calling it runs the function of ours given here, nothing of the
    file.
    """

    __slots__ = ("call",)

    def __init__(self, call: Callable):
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Strided:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return _Strided(storage, offset, shape, strides, storage.dtype)


def _typed_tensor(
    storage: _Storage, offset: int, shape: tuple, strides: tuple, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Strided:
    """torch._utils._rebuild_tensor_v3: the storage is untyped, the type comes apart."""
    return _Strided(storage, offset, shape, strides, dtype)


def _first(value: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    return value


def _subclass(rebuild: Callable, _kind: Any, args: tuple, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, which are dropped."""
    return rebuild(*args)


CALLS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """Resolves a short list of names to functions of this file and refuses every other global."""

    def __init__(self, file: BinaryIO, path: Path, storage: Callable[[str, np.dtype, int], _Storage], objects: bool):
        super().__init__(file, encoding="utf-8")
        self.path, self.storage, self.objects = path, storage, objects

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in SCALARS:
            return SCALARS[name]
        if (module, name) in CALLS:
            return _Known(CALLS[module, name])
        if self.objects and (found := remembered(module, name)):
            return found
        raise CheckpointError(
            f"{self.path} holds the Python object {module}.{name}, not only tensors: it was not run; save a "
            "plain state dict or "
            "safetensors instead"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], np.dtype):
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r:.80}")
        storage = self.storage(str(pid[2]), pid[1], int(pid[4]))
        view = pid[5] if len(pid) > 5 else None
        if view is None:
            return storage
        _, offset, elements = view  # a storage that is a window into another (very old files)
        window = _Storage(storage.dtype, int(elements))
        start, size = int(offset) * storage.dtype.itemsize, int(elements) * storage.dtype.itemsize
        window.map = lambda: storage.map()[start : start + size]
        return window


def load(path: str | os.PathLike, objects: bool = False) -> Any:
    """The object that `torch.save` wrote, with lazy `Tensor`s in place of tensors (named by their keys,
    joined with dots).

    No code of the file is run. Any global other than torch's tensor constructors, a truncated file, or a file
    of another kind raises one sentence naming the file. objects: what training programs save beside tensors
    becomes `pickled_objects.Remembered`.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            found = (_load_zip if start == b"PK\x03\x04" else _load_legacy)(file, path, objects)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except CheckpointError:
        raise
    except Exception as error:  # a pickle can fail in any way; whatever it is, the file is at fault
        raise CheckpointError(f"{path} is damaged or not a file written by torch.save ({error})") from error
    return _named(found, "", str(path))


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Lazy tensors of a state dict file (`pytorch_model.bin`, `mm_projector.bin`); values that are no tensors
    are refused.
    """
    found = load(path)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is not a flat state dict of tensors: save model.state_dict() itself")
    return dict(found)


def _named(value: Any, name: str, file: str) -> Any:
    """Replace every `_Strided` by a `Tensor` that knows its key."""
    if isinstance(value, _Strided):
        return Tensor(name, value.shape, value.dtype, file, value.read)
    join = name + "." if name else ""
    if isinstance(value, Mapping):
        return {k: _named(v, f"{join}{k}", file) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_named(v, f"{join}{i}", file) for i, v in enumerate(value))
    return value


def _load_zip(file: BinaryIO, path: Path, objects: bool) -> Any:
    """The object of a zip archive; storages are mapped at the offset of their entry."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "constants.pkl" in entries or "data.pkl" not in entries:
        raise CheckpointError(
            f"{path} is a TorchScript or other zip archive, not a state dict: save model.state_dict() with torch.save"
        )
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine: save it again on a little-endian one")

    def storage(key: str, dtype: np.dtype, elements: int) -> _Storage:
        entry = entries[f"data/{key}"]
        made = _Storage(dtype, elements)
        size = elements * dtype.itemsize
        if size > entry.file_size:
            raise pickle.UnpicklingError(f"storage {key} has {entry.file_size} bytes, {size} are needed")
        if entry.compress_type == zipfile.ZIP_STORED:
            made.map = _mapping(path, _data_offset(file, entry), size)
        else:
            made.map = lambda: np.frombuffer(zipfile.ZipFile(path).read(entry), np.uint8)[:size]
        return made

    return _Unpickler(io.BytesIO(archive.read(entries["data.pkl"])), path, storage, objects).load()


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: after its local header, whose name and padding have their own lengths."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry at byte {entry.header_offset}")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def _mapping(path: Path, offset: int, size: int) -> Callable[[], np.ndarray]:
    """A function that maps `size` bytes at `offset`, anew each time, so that no file stays open."""
    return lambda: np.asarray(np.memmap(path, np.uint8, "r", offset, (size,))) if size else np.empty(0, np.uint8)


def _load_legacy(file: BinaryIO, path: Path, objects: bool) -> Any:
    """The object of a pre-1.6 file; storages follow the pickles in the order of the key list."""
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: np.dtype, elements: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, elements))

    def part() -> Any:
        return _Unpickler(file, path, storage, objects).load()

    if part() != MAGIC or part() != PROTOCOL:
        raise pickle.UnpicklingError("no torch header")
    if not part().get("little_endian", True):
        raise CheckpointError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
    found, keys = part(), part()
    end = os.fstat(file.fileno()).st_size
    for key in keys:
        made = storages[str(key)]
        (elements,) = struct.unpack("<q", file.read(8))
        offset, size = file.tell(), elements * made.dtype.itemsize
        if elements != made.elements or offset + size > end:
            raise pickle.UnpicklingError(f"storage {key} is cut off")
        made.map = _mapping(path, offset, size)
        file.seek(size, os.SEEK_CUR)
    return found


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `{name: array}` as `torch.save` would: `torch.load(path, weights_only=True)` gives the state dict
    back.

    Types: float32, float16, bfloat16, float64, integers, bool. The file appears under its name only when it
    is complete.
    """
    root = Path(path).stem
    with replacing(path) as partial, open(partial, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(f"{root}/data.pkl", 0), _pickled(tensors))
            archive.writestr(_entry(f"{root}/byteorder", 0), b"little")
            for key, values in enumerate(tensors.values()):
                flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                archive.writestr(_entry(f"{root}/data/{key}", file.tell()), flat.tobytes())
            archive.writestr(_entry(f"{root}/version", 0), b"3\n")


def _entry(name: str, at: int) -> zipfile.ZipInfo:
    """A zip entry with a fixed date, its data aligned to 64 bytes by a padding field as torch does (`at` = 0:
    not aligned).
    """
    entry = zipfile.ZipInfo(name)
    if at:
        gap = -(at + 30 + len(name) + 4) % 64
        entry.extra = b"FB" + struct.pack("<H", gap) + b"Z" * gap
    return entry


def _pickled(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Protocol-2 pickle of the state dict, spelled out because its globals name torch, which is not there to
    be imported.
    """
    out = [b"\x80\x02}("]
    for key, (name, values) in enumerate(tensors.items()):
        if values.dtype not in WRITTEN:
            raise CheckpointError(
                f"tensor {name} of type {values.dtype} cannot be written to a torch file: cast it to float32"
            )
        strides = [math.prod(values.shape[i + 1 :]) for i in range(values.ndim)]
        storage = (
            _text("storage")
            + f"ctorch\n{WRITTEN[values.dtype]}\n".encode()
            + _text(str(key))
            + _text("cpu")
            + _int(values.size)
        )
        out += [
            _text(name), b"ctorch._utils\n_rebuild_tensor_v2\n(", b"(", storage, b"tQ", _int(0),
            b"(", *map(_int, values.shape), b"t(", *map(_int, strides),
            b"t\x89ccollections\nOrderedDict\n)RtR",
        ]  # fmt: skip
    return b"".join(out) + b"u."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(8, "little")
    return b"\x8a\x08" + data

"""The torch file reader: what it accepts, and that nothing in a file can make it run code."""

import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.convert import torch_pickle
from vlm_jax.convert.tensors import CheckpointError, full

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.float64,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_save_and_read(tmp_path_factory, data):
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4))
    arrays = {}
    for i, shape in enumerate(shapes):
        dtype = np.dtype(data.draw(st.sampled_from(DTYPES)))
        arrays[f"layer.{i}.wéight"] = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    path = tmp_path_factory.mktemp("bin") / "x.bin"
    torch_pickle.save(path, arrays)
    read = torch_pickle.read_tensors(path)
    assert list(read) == list(arrays)
    for key, tensor in read.items():
        assert tensor.dtype == arrays[key].dtype and tensor.name == key
        np.testing.assert_array_equal(tensor.read(full(tensor.shape)), arrays[key])


class Code:
    def __init__(self, call, *args):
        self.state = (call, args)

    def __reduce__(self):
        return self.state


def write_zip(path, data: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")


def legacy(value) -> bytes:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


@pytest.mark.parametrize(
    "call, args",
    [(os.system, ("touch {mark}",)), (eval, ("open('{mark}', 'w')",)), (getattr, ("x", "upper"))],
)
@pytest.mark.parametrize("style", ["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, call, args, style):
    mark = tmp_path / "ran"
    evil = {"a": Code(call, *(a.format(mark=mark) for a in args))}
    path = tmp_path / "model.bin"
    write_zip(path, pickle.dumps(evil, protocol=2)) if style == "zip" else path.write_bytes(legacy(evil))
    with pytest.raises(CheckpointError, match=rf"model\.bin holds the Python object .*{call.__name__}.* not run"):
        torch_pickle.load(path)
    assert not mark.exists()


@pytest.mark.parametrize("opcodes", [
    # a known global with its function replaced through a slot state, then called
    b"\x80\x02ctorch\nSize\nN}X\x04\x00\x00\x00callcposix\nsystem\ns\x86b.",
    b"\x80\x02cbuiltins\ngetattr\n.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    b"\x80\x04\x8c\x05torch\x8c\x0f_utils.__dict__\x93.",
    b"\x80\x02(K\x01K\x02icollections\nnamedtuple\n.",
    b"\x80\x02\x82\x01.",
])  # fmt: skip
def test_tricks_are_refused(tmp_path, opcodes):
    write_zip(tmp_path / "m.bin", opcodes)
    with pytest.raises(CheckpointError, match=r"m\.bin"):
        torch_pickle.load(tmp_path / "m.bin")


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    torch_pickle.save(tmp_path / "x.bin", {"a": np.zeros((4, 4), np.float32)})
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["x/data.pkl"] = files["x/data.pkl"].replace(b"J" + struct.pack("<i", 4) * 1, b"J" + struct.pack("<i", 4096))
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="does not fit its storage"):
        torch_pickle.load(tmp_path / "x.bin")


def test_damaged_files(tmp_path):
    torch_pickle.save(tmp_path / "x.bin", {"a": np.zeros((4, 4), np.float32)})
    whole = (tmp_path / "x.bin").read_bytes()
    for name, content in (
        ("half.bin", whole[: len(whole) // 2]),
        ("text.bin", b"version https://git-lfs"),
        ("empty.bin", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or not a file written by torch.save"):
            torch_pickle.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="nowhere.bin does not exist"):
        torch_pickle.load(tmp_path / "nowhere.bin")
    write_zip(tmp_path / "list.bin", pickle.dumps([1, 2], protocol=2))
    with pytest.raises(CheckpointError, match="list.bin is not a flat state dict"):
        torch_pickle.read_tensors(tmp_path / "list.bin")


def test_nested_objects_keep_their_shape(tmp_path):
    value = collections.OrderedDict(epoch=3, names=["a", (1.5, None)])
    write_zip(tmp_path / "x.pt", pickle.dumps(value, protocol=2))
    assert torch_pickle.load(tmp_path / "x.pt") == {"epoch": 3, "names": ["a", (1.5, None)]}


def test_writing_fails_whole_or_not_at_all(tmp_path):
    path = tmp_path / "mm_projector.bin"
    torch_pickle.save(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="complex"):
        torch_pickle.save(path, {"a": np.zeros(3, np.complex64)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_torch_writes_and_we_read(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    linear = torch.nn.Linear(3, 2)
    values = {
        "transposed": base.t(), "window": base[1:3, 2:5], "every_other": base[:, ::2],
        "expanded": base[:1].expand(4, 6),
        "parameter": torch.nn.Parameter(base[0]), "bf16": base.bfloat16(), "scalar": torch.tensor(2),
        "empty": torch.zeros(0, 3),
        "u16": torch.arange(3).to(torch.uint16), "shared": base,
    }  # fmt: skip
    for zipped in (True, False):
        kept = {k: v for k, v in values.items() if zipped or k != "u16"}
        torch.save({**kept, **linear.state_dict()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        got = torch_pickle.read_tensors(tmp_path / "x.bin")
        for key, value in {**kept, **linear.state_dict()}.items():
            tensor = got[key]
            np.testing.assert_array_equal(
                tensor.read(full(tensor.shape)).astype(np.float64),
                value.detach().double().numpy(),
                err_msg=key,
            )
    torch.save(linear, tmp_path / "module.bin")
    with pytest.raises(CheckpointError, match=r"module.bin holds the Python object torch\.nn\.modules\.linear\.Linear"):
        torch_pickle.load(tmp_path / "module.bin")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", b"N.")
    with pytest.raises(CheckpointError, match="script.pt is a TorchScript"):
        torch_pickle.load(tmp_path / "script.pt")

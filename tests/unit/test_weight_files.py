"""Reading the weight files of others: containers and formats that are understood, and files made to harm."""

from __future__ import annotations

import argparse
import errno
import io
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from proxydet.errors import CheckpointError, RuntimeEnvironmentError
from proxydet.weight_files import (
    check_seal,
    read_arrays,
    read_content,
    read_safetensors,
    read_shapes,
    read_state_dict,
    seal,
    write_safetensors,
    write_state,
)

NAMES = {"backbone.weight": torch.arange(6.0).reshape(2, 3), "backbone.bias": torch.ones(2)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in NAMES.items()}


@pytest.mark.parametrize(
    "content",
    [
        NAMES,
        {"model": NAMES, "iteration": 3},
        {"ema": NAMES},
        {"state_dict": prefixed("model."), "hyper_parameters": {"model": {"depth": 50}}},
        {"model": prefixed("module._orig_mod.")},
        prefixed("_orig_mod.module."),
        {"backbone._orig_mod.weight": NAMES["backbone.weight"], "backbone.bias": NAMES["backbone.bias"]},
        {"ema": {"module": NAMES, "updates": 7}, "epoch": 1},
        {"model_ema": {"n_averaged": torch.tensor(7), **prefixed("module.")}},
        {"model": {"ema": {"state_dict": prefixed("module.")}}},
        {"model": NAMES, "args": argparse.Namespace(lr=0.1), "seen": {1, 2}, "best": np.float64(0.5)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("legacy", [False, True])
def test_containers_and_wrappers_are_taken_off(tmp_path, content, legacy):
    path = tmp_path / "w.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_state_dict(path)
    assert found.keys() == NAMES.keys()
    assert all(torch.equal(found[name], value) for name, value in NAMES.items())
    assert read_shapes(path) == {"backbone.weight": (2, 3), "backbone.bias": (2,)}


def test_two_kinds_of_weights_are_reported(tmp_path, caplog):
    path = tmp_path / "w.pth"
    torch.save({"ema": {"x": torch.ones(1)}, "model": NAMES}, path)
    assert read_state_dict(path).keys() == NAMES.keys()
    assert "model and ema" in caplog.text


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays(tmp_path, protocol):
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "half": np.float16([1, 2]),
        "empty": np.zeros((0, 3)),
        "flag": np.array([True]),
    }
    path = tmp_path / "w.pkl"
    others = {"objects": np.array([None]), "text": np.array(["a"])}
    path.write_bytes(pickle.dumps({"model": {**arrays, **others}}, protocol=protocol))
    found = read_state_dict(path)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name].numpy(), value)


def test_numbers_of_every_type_and_shared_storages(tmp_path):
    base = torch.arange(12.0)
    kinds = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
    )
    content = {kind: torch.tensor([0, 1, 1]).to(getattr(torch, kind)) for kind in kinds.split()}
    content |= {"view": base.reshape(3, 4)[1:, ::2], "base": base, "none": torch.empty(0)}
    content["scalar"] = torch.nn.Parameter(torch.tensor(3.0))
    for legacy in (False, True):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        found = read_content(tmp_path / "w.pth")
        assert all(torch.equal(found[name], value) for name, value in content.items())
        assert all(found[name].dtype == value.dtype for name, value in content.items())
        found["base"][4] = 77
        assert found["view"][0, 0] == 77


# ---- files that proxydet writes ----------------------------------------------------------------------------------------


def test_final_weights_with_metadata(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "model_final.safetensors"
    shared = torch.arange(8.0)
    tensors = {"b": shared[::2], "a": shared, "flag": torch.tensor(True)}
    write_safetensors(path, tensors, {"recipe": "tiny", "classes": ["red", "blå"]})
    found, metadata = read_safetensors(path)
    assert metadata["recipe"] == "tiny"
    assert metadata["classes"] == ["red", "blå"]
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert read_state_dict(path).keys() == tensors.keys()
    with safe_open(path, "pt") as file:  # as others read it
        assert torch.equal(file.get_tensor("b"), tensors["b"])


def test_the_same_weights_are_written_as_the_same_bytes(tmp_path):
    path, written = tmp_path / "model_final.safetensors", set()
    for _ in range(12):  # of six orders of the metadata
        write_safetensors(path, NAMES, {"recipe": "tiny"})
        written.add(path.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("kind", ["final", "final.pth", "state", "weights"])
def test_a_flipped_bit_never_loads_other_values(tmp_path, kind):
    """Two hundred bits, of all parts of the file; most of a small file is structure."""
    path = tmp_path / ("model_final.safetensors" if kind == "final" else "model_final.pth")
    tensors = {f"layer.{i}": torch.rand(6, 5) for i in range(5)}
    if kind == "final":
        write_safetensors(path, tensors, {"recipe": "tiny"})
    elif kind == "weights":  # of version 0.1, or of others
        torch.save({"model": tensors}, path)
    else:
        write_state({"model": tensors, "iteration": 3, "window": {"a": 1.5}}, path)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in random.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            found = read_content(path)["model"] if kind == "state" else read_state_dict(path)
        except CheckpointError as error:
            refused += error.path == path and bool(error.hint)
            continue
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert refused > (190 if kind == "final" else 60)
    # Damage to a name in the metadata, and to a weight: not a file without a digest.
    if kind == "final":
        for name in (b'"proxydet"', b'"sha256"'):
            path.write_bytes(whole[:-1].replace(name, name[:-2] + b'x"') + bytes([whole[-1] ^ 1]))
            with pytest.raises(CheckpointError, match="SHA-256"):
                read_state_dict(path)


@pytest.mark.parametrize("name", ["model_final.safetensors", "model_best.safetensors"])
def test_damaged_weights_name_others_of_the_run(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{damaged")
    with pytest.raises(CheckpointError) as alone:
        read_state_dict(path)
    assert "--weights" not in str(alone.value.hint)
    (tmp_path / "checkpoints").mkdir()
    for number in (3, 4):
        state = {"model": NAMES, "iteration": number}
        write_state(state, tmp_path / "checkpoints" / f"step_000000{number}.pth")
    (tmp_path / "checkpoints" / "step_0000004.pth").write_bytes(b"damaged too")
    (tmp_path / "model_final.pth").write_bytes(b"damaged too")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert "step_0000003.pth" in str(caught.value.hint)


def test_a_number_under_format_does_not_make_it_ours(tmp_path):
    torch.save({"format": 2, "model": NAMES}, tmp_path / "other.pth")
    assert read_state_dict(tmp_path / "other.pth").keys() == NAMES.keys()


@pytest.mark.parametrize("key", ["format", "sha256"])
def test_damage_to_the_key_of_the_digest_is_seen(tmp_path, key):
    path = tmp_path / "w.pth"
    write_state({"model": NAMES, "iteration": 3}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(key.encode(), key.upper().encode()))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_state_dict(tmp_path / "new.pth")


def test_a_seal(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"what was written")
    assert not check_seal(path, b"mark", hint="")
    seal(path, b"mark")
    assert check_seal(path, b"mark", hint="")
    whole = path.read_bytes()
    for place in range(len(whole)):
        if 16 <= place < 20:  # the mark itself: as if there were none
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.bin"):
            check_seal(path, b"mark", hint="export it again")


# ---- files made to harm ----------------------------------------------------------------------------------------------


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def forged_dtype() -> bytes:
    """A type of eight plain bytes that claims a field of Python objects, whose flags say that there are none."""
    objects = named("numpy", "dtype") + group(text("O8"), b"\x89", b"\x88") + b"R"
    fields = b"}" + text("a") + group(objects, number(0)) + b"s"
    state = group(
        number(3), text("|"), b"N", group(text("a")), fields, number(8), number(1), number(0)
    )
    return named("numpy", "dtype") + group(text("V8"), b"\x89", b"\x88") + b"R" + state + b"b"


POINTER = struct.pack("<Q", 0x4141414141414141)
ARRAY = (
    b"\x80\x03" + named("numpy.core.multiarray", "_reconstruct")
    + group(named("numpy", "ndarray"), group(number(0)), b"C\x01b") + b"R"
    + group(number(1), group(number(1)), forged_dtype(), b"\x89", b"C\x08" + POINTER) + b"b"
    + text("a") + b"Ns."
)  # fmt: skip
SCALAR = (
    b"\x80\x02" + named("numpy.core.multiarray", "scalar")
    + group(forged_dtype(), named("_codecs", "encode") + group(text("A" * 8), text("latin1")) + b"R")
    + b"R" + text("a") + b"Ns."
)  # fmt: skip
# Sixty lists, each with the one before it twice: 2**60 values.
LAUGHS = b"".join(b"](h" + bytes([i, 104, i]) + b"eq" + bytes([i + 1]) for i in range(60))
REPEATED = text("x" * 3_000_000) + b"q\x00" + text("latin1") + b"q\x01" + named("_codecs", "encode")
# A few bytes each, that name five million again: they took hours.
TEXT, BIG = b"h\x00", text("x" * 5_000_000) + b"q\x000"
EMPTY_ARRAY = named("numpy.core.multiarray", "_reconstruct") + b")Rq\x010"
DTYPE = named("numpy", "dtype") + text("f4") + b"\x85R"
LONG_NUMBER = b"\x8a\x10" + b"\xff" * 15 + b"\x7f"
AGAIN = {
    "arguments": BIG + named("numpy", "foo") + b"q\x010]" + (b"h\x01" + TEXT + b"Ra") * 4000,
    "pairs": BIG + named("collections", "OrderedDict") + b"](" + TEXT * 4000 + b"e\x85R",
    "states": BIG + DTYPE + (TEXT + b"b") * 4000,
    "storages": BIG + (TEXT + b"Q") * 4000,
    "names": BIG + b"](" + (TEXT + TEXT + b"\x93") * 4000 + b"e",
    "shape": EMPTY_ARRAY + b"h\x01" + group(number(1), group(LONG_NUMBER * 20_000), DTYPE, b"\x89", text("")) + b"b",
    "keys": BIG + (b"}" + TEXT) * 300 + b"N" + b"s" * 300,
}  # fmt: skip
HOSTILE = {
    **{f"again {kind}": b"\x80\x02" + content + b"." for kind, content in AGAIN.items()},
    "array of a forged type": ARRAY,
    "scalar of a forged type": SCALAR,
    "laughs": b"\x80\x02]q\x00" + LAUGHS + b".",
    "cycle": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "many": b"\x80\x02" + b"]" * 1_000_002 + b".",
    "announced": b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "copies": b"\x80\x02" + REPEATED + b"q\x02" + b"h\x02h\x00h\x01\x86R" * 1000 + b".",
    "long": b"\x80\x02\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".",
    "nothing": b"\x80\x02.",
}


# Those that take seconds are tried in one kind of file only.
IN_PICKLES = [kind for kind in HOSTILE if kind != "many" and not kind.startswith("again")]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [*((".pth", kind) for kind in HOSTILE), *((".pkl", kind) for kind in IN_PICKLES)],
)
def test_hostile_pickles_are_refused(tmp_path, kind, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", HOSTILE[kind])
    else:
        path.write_bytes(HOSTILE[kind])
    started = time.process_time()
    with pytest.raises(CheckpointError, match=f"w{suffix}"):
        read_state_dict(path)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("kind", ["array of a forged type", "scalar of a forged type"])
def test_a_forged_type_is_named(tmp_path, kind):
    (tmp_path / "w.pkl").write_bytes(HOSTILE[kind])
    with pytest.raises(CheckpointError, match="V8"):
        read_state_dict(tmp_path / "w.pkl")


@pytest.mark.parametrize(
    "start", [b"\0\0\0\x20ftypmp42", b"\x80\x04\x8e" + bytes(6) + b"\1\0", b"clang", b"In a text"]
)
def test_a_large_file_of_another_kind_is_not_read(tmp_path, start):
    path = tmp_path / "video.mp4"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(200 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"video\.mp4"):
            read_state_dict(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_the_table_of_contents_is_not_searched_for_every_tensor(tmp_path, monkeypatch):
    torch.save({f"w{i}": torch.zeros(1) for i in range(50)}, tmp_path / "w.pth")
    listed, infolist = [], zipfile.ZipFile.infolist
    monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda s: listed.append(s) or infolist(s))
    assert len(read_state_dict(tmp_path / "w.pth")) == 50
    assert 0 < len(listed) < 10


@pytest.mark.parametrize(
    "change", ["huge", "negative", "beyond", "stride", "type", "contradiction", "big-endian"]
)
def test_tensors_that_do_not_fit_their_bytes(tmp_path, change):
    storage = torch.arange(4.0).untyped_storage()

    class Forged:
        def __init__(self, offset: int, shape: tuple, stride: tuple) -> None:
            self.arguments = (torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True),
                              offset, shape, stride, False, OrderedDict())  # fmt: skip

        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, self.arguments

    shapes = {"huge": (0, (1 << 40,), (0,)), "negative": (-1, (1,), (1,)), "beyond": (0, (5,), (1,)),
              "stride": (0, (2, 2), (1, 3))}  # fmt: skip
    stream = io.BytesIO()
    torch.save({"w": Forged(*shapes.get(change, (0, (4,), (1,))))}, stream)
    with (
        zipfile.ZipFile(stream) as before,
        zipfile.ZipFile(tmp_path / "w.pth", "w") as after,
    ):
        for name in before.namelist():
            data = before.read(name)
            if change == "type":
                data = data.replace(b"FloatStorage", b"QInt8Storage")
            elif change == "contradiction" and name.endswith("data/0"):
                data = data[:12]
            elif change == "big-endian" and name.endswith("byteorder"):
                data = b"big"
            after.writestr(name, data)
    with pytest.raises(CheckpointError, match=r"w\.pth"):
        read_state_dict(tmp_path / "w.pth")


def test_a_zip_directory_without_end(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(NAMES, path)
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x06\x06")  # the directory's size, and its place before the end
    content[end + 40 : end + 48] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError):
        read_state_dict(path)


@pytest.mark.parametrize(
    "header", ["larger", "smaller", "objects", "fields", "text", "deep", "character"]
)
def test_tables_whose_header_lies(tmp_path, header):
    def npy(text: str) -> bytes:
        raw = text.encode() + b"\n"
        values = bytes(60) + b"\0\x11\0\0"  # as text, one more than the last character
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + values

    shapes = {"larger": (1 << 40,), "smaller": (15,)}
    kinds: dict[str, object] = {"objects": "|O", "fields": [("a", "<f4")], "character": ">U1"}
    told = {
        "descr": kinds.get(header, "<f4"),
        "fortran_order": False,
        "shape": shapes.get(header, (16,)),
    }
    texts = {"text": "no header", "deep": "(" * 9000}
    for content, good in (
        (npy(texts.get(header, repr(told))), False),
        (npy(repr({**told, "descr": "<f4", "shape": (16,)})), True),
    ):
        with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
            archive.writestr("x.npy", content)
        if good:
            assert read_arrays(tmp_path / "t.npz", ["x"])["x"].shape == (16,)
        else:
            with pytest.raises(CheckpointError, match=r"t\.npz"):
                read_arrays(tmp_path / "t.npz", ["x"])


def test_damaged_files_of_every_kind_are_refused_or_read_the_same():
    """The short form of the script; it ends with 1 after a crash, a bug, or other values than were written."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_files.py"
    words = [sys.executable, str(script), "--cases", "160", "--seed", "7"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": refused\n") == 8


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    torch.save(NAMES, path)

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RuntimeEnvironmentError, match=r"w\.pth") as caught:
        read_state_dict(path)
    assert "damaged" not in caught.value.message
    assert "read" in caught.value.hint


def test_a_path_that_the_machine_refuses_is_an_error_of_ours(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"n{300}"):
        read_state_dict(tmp_path / ("n" * 300 + ".pth"))

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    for asked in ("is_file", "stat"):
        monkeypatch.setattr(Path, asked, refuse)
    with pytest.raises(RuntimeEnvironmentError, match=r"w\.pth"):
        read_state_dict(tmp_path / "w.pth")


def test_a_damaged_catalogue_does_not_hide_which_file_is_missing(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text("no = [")
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "own.toml"))
    with pytest.raises(CheckpointError, match=r"absent\.pth") as caught:
        read_state_dict(tmp_path / "absent.pth")
    assert "check its path" in caught.value.hint

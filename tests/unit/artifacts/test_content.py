"""What files without a digest hold: checkpoints by their tensors, tars by their images; read without running anything."""

from __future__ import annotations

import contextlib
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxydet.artifacts.artifact import Artifact, Content
from proxydet.artifacts.checkpoint_index import read_tensor_index
from proxydet.artifacts.content import content_check, expected_tensors, verify_checkpoint
from proxydet.errors import ArchiveError, CheckpointError

STATE = OrderedDict(
    [
        ("a.weight", torch.ones(3, 4)),
        ("a.half", torch.zeros(2, dtype=torch.float16)),
        ("count", torch.tensor(7)),
        ("b", torch.nn.Parameter(torch.ones(5))),
        ("flags", torch.ones(2, 3, dtype=torch.bool)),
        ("view", torch.arange(12).reshape(3, 4)[1:, ::2]),
    ]
)
SHAPES = {
    "a.weight": (3, 4),
    "a.half": (2,),
    "count": (),
    "b": (5,),
    "flags": (2, 3),
    "view": (2, 2),
}


def save(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "iteration": 9, "scheduler": {"lr": np.float64(0.1)}},
        lambda state: {
            "state_dict": dict(state),
            "epoch": 3,
            "optimizer": {"state": {0: {"m": torch.ones(3)}}},
        },
    ],
    ids=["plain", "detectron2", "optimizer"],
)
def test_names_and_shapes(tmp_path, wrap, legacy) -> None:
    assert read_tensor_index(save(tmp_path / "c.pth", wrap(STATE), legacy=legacy)) == SHAPES


class Evil:
    def __init__(self, function, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "subprocess.run",
        "builtins.getattr",
        "shutil.rmtree",
    ],
)
def test_hostile_checkpoints_are_refused_and_not_run(tmp_path, name, legacy) -> None:
    import importlib

    module, _, function = name.rpartition(".")
    evil = Evil(getattr(importlib.import_module(module), function), f"touch {tmp_path}/ran")
    path = tmp_path / "c.pth"
    if legacy:
        path.write_bytes(
            b"".join(
                pickle.dumps(part)
                for part in (0x1950A86A20F9469CFC6C, 1001, {}, {"model": evil}, [])
            )
        )
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"model": evil}))
    with pytest.raises(CheckpointError, match="asks to run"):
        read_tensor_index(path)
    assert not (tmp_path / "ran").exists()


def test_what_torch_could_be_made_to_do_is_not_done(tmp_path) -> None:
    """Even functions of torch itself are only stood in for."""
    evil = Evil(torch.hub.load_state_dict_from_url, "https://example.org/never")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {"x": evil}}))
    with pytest.raises(CheckpointError, match="no tensors"):
        read_tensor_index(tmp_path / "c.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_and_damaged_checkpoints(tmp_path, legacy) -> None:
    path = save(tmp_path / "c.pth", STATE, legacy=legacy)
    data = path.read_bytes()
    for length in (0, 10, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_tensor_index(path)
    path.write_bytes(data + b"x" * 100)
    if legacy:
        with pytest.raises(CheckpointError, match="appended"):
            read_tensor_index(path)


def test_a_changed_byte_of_the_numbers_is_noticed(tmp_path) -> None:
    path = save(tmp_path / "c.pth", {"w": torch.full((1000,), 3.0)})
    data = bytearray(path.read_bytes())
    at = data.index(np.full(10, 3.0, dtype=np.float32).tobytes())
    data[at + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="check sum"):
        read_tensor_index(path)


@pytest.mark.parametrize("legacy", [False, True])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), min_size=1, max_size=8))
def test_fuzzed_checkpoints_end_in_a_table_or_in_a_clear_error(tmp_path, legacy, flips) -> None:
    path = tmp_path / "c.pth"
    data = bytearray(save(path, {"model": STATE}, legacy=legacy).read_bytes())
    for at, change in flips:
        data[at % len(data)] ^= change
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read_tensor_index(path)


@given(st.binary(max_size=400))
def test_any_pickle_ends_in_a_table_or_in_a_clear_error(tmp_path_factory, data) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + data)
    with contextlib.suppress(CheckpointError):
        read_tensor_index(path)


def published(layout: str, *, mixup_branch: bool) -> dict[str, torch.Tensor]:
    """Return tensors of the published shapes that take no memory."""
    shapes = expected_tensors(layout, mixup_branch=mixup_branch)
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


class TestPublishedModels:
    def artifact(self, **content: object) -> Artifact:
        return Artifact(
            name="c", title="t", addresses=("https://e.org/c",), target="models/c.pth", licence="l",
            content=Content(kind="checkpoint", **content),  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self, path: Path, **content: object) -> str:
        check = content_check(self.artifact(**content))
        assert check is not None
        assert check.sees_all
        return check.run(path)

    def test_a_boxsup_checkpoint(self, tmp_path) -> None:
        path = save(tmp_path / "c.pth", {"model": published("r50", mixup_branch=False)})
        assert self.run(path, layout="r50") == "409 tensors"
        with pytest.raises(CheckpointError, match="lacks 30 of the 445"):
            self.run(path, layout="r50", mixup_branch=True)
        with pytest.raises(CheckpointError, match=r"another model|lacks"):
            self.run(path, layout="swinb")

    def test_a_proxydet_checkpoint(self, tmp_path) -> None:
        path = save(tmp_path / "c.pth", {"model": published("swinb", mixup_branch=True)})
        assert self.run(path, layout="swinb", mixup_branch=True) == "480 tensors"
        assert self.run(path, layout="swinb") == "480 tensors, 36 of them beyond the model's"

    def test_another_vocabulary_only_where_it_is_expected(self, tmp_path) -> None:
        state = published("swinb", mixup_branch=False)
        for name in state:
            if name.endswith("zs_weight"):
                state[name] = torch.zeros(1).expand(512, 22048)
        path = save(tmp_path / "c.pth", {"model": state})
        with pytest.raises(CheckpointError, match="zs_weight"):
            self.run(path, layout="swinb")
        assert self.run(path, layout="swinb", any_shape=("zs_weight",))

    def test_what_can_be_made_anew_may_be_missing(self, tmp_path) -> None:
        state = published("r50", mixup_branch=False)
        kept = {
            n: t for n, t in state.items() if not n.endswith(("num_batches_tracked", "freq_weight"))
        }
        assert self.run(save(tmp_path / "c.pth", kept), layout="r50")
        kept.pop("backbone.fpn_lateral3.weight")
        with pytest.raises(CheckpointError, match="fpn_lateral3"):
            self.run(save(tmp_path / "c.pth", kept), layout="r50")

    def test_the_expectation_may_be_a_function(self, tmp_path) -> None:
        path = save(tmp_path / "c.pth", STATE)
        assert verify_checkpoint(path, lambda: SHAPES) == "6 tensors"


class TestTars:
    def check(self, path: Path, names: list[str]) -> str:
        with tarfile.open(path, "w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 700
                archive.addfile(info, io.BytesIO(bytes(700)))
        artifact = Artifact(
            name="c", title="t", addresses=("https://e.org/c",), target="datasets/c.tar", licence="l",
            content=Content(kind="image-tar"),
        )  # fmt: skip
        check = content_check(artifact)
        assert check is not None
        return check.run(path)

    def test_a_tar_of_images(self, tmp_path) -> None:
        assert self.check(tmp_path / "n01.tar", ["n01_1.JPEG", "n01_2.JPEG"]) == "2 images"

    @pytest.mark.parametrize("names", [[], ["n01_1.JPEG", "run.sh"]])
    def test_anything_else(self, tmp_path, names) -> None:
        with pytest.raises(ArchiveError, match="should hold images"):
            self.check(tmp_path / "n01.tar", names)

    def test_a_cut_tar(self, tmp_path) -> None:
        path = tmp_path / "n01.tar"
        self.check(path, ["a.jpg", "b.jpg"])
        path.write_bytes(path.read_bytes()[:2000])
        artifact = Artifact(
            name="c", title="t", addresses=("https://e.org/c",), target="datasets/c.tar", licence="l",
            content=Content(kind="image-tar"),
        )  # fmt: skip
        check = content_check(artifact)
        assert check is not None
        with pytest.raises(ArchiveError, match="ends in the middle"):
            check.run(path)

"""What files without a digest must hold: tensors of a model, images in a tar; read without running anything."""

from __future__ import annotations

import importlib
import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from proxydet.artifacts import Content
from proxydet.errors import DigestError

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


@pytest.fixture
def check(downloads):
    """Put a file in its place by hand and have it checked; returns what it holds."""

    def run(data: bytes, name: str = "thing", **content: object) -> str:
        thing = downloads.artifact(name, content=Content(**{"kind": "tensors", **content}))
        path = downloads.root / thing.target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        report = downloads.fetch(thing)
        report.raise_for_failures()
        (downloads.root / "models/artifacts.lock.json").unlink()
        return report.outcomes[0].note

    return run


def saved(content: object, *, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def as_checkpoint(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return stream.getvalue()


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
def test_the_tensors_of_the_model_are_counted(check, wrap, legacy):
    assert check(saved(wrap(STATE), legacy=legacy)) == "6 tensors"


class Evil:
    def __init__(self, function, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class TestHostileCheckpoints:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize(
        "name",
        ["os.system", "builtins.eval", "builtins.exec", "subprocess.run", "builtins.getattr",
         "shutil.rmtree"],
    )  # fmt: skip
    def test_are_refused_and_not_run(self, check, tmp_path, name, legacy):
        module, _, function = name.rpartition(".")
        evil = Evil(getattr(importlib.import_module(module), function), f"touch {tmp_path}/ran")
        parts = (0x1950A86A20F9469CFC6C, 1001, {}, {"model": evil}, [])
        data = b"".join(map(pickle.dumps, parts)) if legacy else as_checkpoint(pickle.dumps(evil))
        with pytest.raises(DigestError, match=function):
            check(data)
        assert not (tmp_path / "ran").exists()

    def test_even_functions_of_torch_are_not_run(self, check):
        evil = Evil(torch.hub.load_state_dict_from_url, "https://example.org/never")
        with pytest.raises(DigestError, match="no parameters"):
            check(as_checkpoint(pickle.dumps({"model": {"x": evil}})))


class TestDamagedCheckpoints:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_cut_ones(self, check, legacy):
        data = saved(STATE, legacy=legacy)
        for length in (1, 10, len(data) // 3, len(data) // 2, len(data) - 1):
            with pytest.raises(DigestError):
                check(data[:length])

    def test_something_appended(self, check):
        with pytest.raises(DigestError, match="appended"):
            check(saved(STATE, legacy=True) + b"x" * 100)

    def test_fewer_numbers_than_the_index_says(self, check):
        stream = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(saved({"w": torch.ones(8)}))) as whole,
            zipfile.ZipFile(stream, "w") as cut,
        ):
            for name in whole.namelist():
                data = whole.read(name)
                cut.writestr(name, data[:-4] if "/data/" in name else data)
        with pytest.raises(DigestError, match="tensor data"):
            check(stream.getvalue())


class TestPublishedModels:
    def state(self, layout: str, *, mixup_branch: bool) -> dict[str, torch.Tensor]:
        """Return tensors of the published shapes that take no room."""
        folder = resources.files("proxydet.artifacts").joinpath("layouts")
        found = {}
        for line in folder.joinpath(f"{layout}.txt").read_text().splitlines():
            name, shape, *marks = line.split()
            if mixup_branch or not marks:
                sizes = [int(size) for size in shape.split("x")] if shape != "-" else []
                found[name] = torch.zeros(()).expand(sizes)
        return found

    def test_a_boxsup_checkpoint(self, check):
        data = saved({"model": self.state("r50", mixup_branch=False)})
        assert check(data, kind="checkpoint", layout="r50") == "409 tensors"
        with pytest.raises(DigestError, match="30 of the 445"):
            check(data, kind="checkpoint", layout="r50", mixup_branch=True)
        with pytest.raises(DigestError):
            check(data, kind="checkpoint", layout="swinb")

    def test_a_proxydet_checkpoint(self, check):
        data = saved({"model": self.state("swinb", mixup_branch=True)})
        assert check(data, kind="checkpoint", layout="swinb", mixup_branch=True) == "480 tensors"
        note = check(data, kind="checkpoint", layout="swinb")
        assert note.startswith("480 tensors, 36")

    def test_another_vocabulary_only_where_it_is_expected(self, check):
        state = self.state("swinb", mixup_branch=False)
        for name in state:
            if name.endswith("zs_weight"):
                state[name] = torch.zeros(1).expand(512, 22048)
        data = saved({"model": state})
        with pytest.raises(DigestError, match="zs_weight"):
            check(data, kind="checkpoint", layout="swinb")
        assert check(data, kind="checkpoint", layout="swinb", any_shape=("zs_weight",))

    def test_what_can_be_made_again_may_be_missing(self, check):
        state = self.state("r50", mixup_branch=False)
        made = ("num_batches_tracked", "freq_weight")
        kept = {name: tensor for name, tensor in state.items() if not name.endswith(made)}
        assert check(saved(kept), kind="checkpoint", layout="r50")
        kept.pop("backbone.fpn_lateral3.weight")
        with pytest.raises(DigestError, match="fpn_lateral3"):
            check(saved(kept), kind="checkpoint", layout="r50")


class TestTars:
    def tar(self, *names: str) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 700
                archive.addfile(info, io.BytesIO(bytes(700)))
        return stream.getvalue()

    def test_a_tar_of_images(self, check):
        assert check(self.tar("n01_1.JPEG", "n01_2.JPEG"), kind="image-tar") == "2 images"

    @pytest.mark.parametrize("names", [[], ["n01_1.JPEG", "run.sh"]])
    def test_anything_else(self, check, names):
        with pytest.raises(DigestError, match="images"):
            check(self.tar(*names), kind="image-tar")

    def test_a_cut_tar(self, check):
        for length in (2000, 1300, 1024 + 512):
            with pytest.raises(DigestError):
                check(self.tar("a.jpg", "b.jpg")[:length], kind="image-tar")


def test_what_was_fetched_is_checked_before_it_gets_its_name(downloads, server, body):
    server.add("/thing", body)
    (error,) = downloads.fetch(
        downloads.artifact(content=Content(kind="tensors"))
    ).failures.values()
    assert isinstance(error, DigestError)
    assert not (downloads.root / "models/thing.bin").exists()
    assert not (downloads.root / "models/artifacts.lock.json").exists()


def test_a_file_put_there_by_hand_stays_if_it_is_wrong(downloads, check):
    with pytest.raises(DigestError, match="thing") as caught:
        check(b"not a checkpoint")
    assert caught.value.path == downloads.root / "models/thing.bin"
    assert Path(caught.value.path).exists()
    assert not (downloads.root / "models/artifacts.lock.json").exists()


def test_a_training_log_holds_losses(check):
    assert check(b"iter: 19  total_loss: 1.5  loss_mask: 0.5\n", kind="training-log") == "2 losses"
    with pytest.raises(DigestError, match="no losses"):
        check(b"<html>quota exceeded</html>", kind="training-log")

"""Counts the files of ours that four ways through the code enter, with all that they call.

    python benchmarks/ways.py RUN DATA.toml

RUN is a run folder, such as that of ``proxydet quickstart``, DATA.toml a dataset config. A file counts where a function of
it is called; what runs when modules are imported does not.
"""

from __future__ import annotations

import argparse
import http.server
import inspect
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
_FUNCTION = 0x1  # CO_OPTIMIZED: not the body of a module or class


@contextmanager
def entered(inside: Callable[..., Any] | None = None) -> Iterator[set[str]]:
    """Collect the files of ours that calls enter, of all threads; with ``inside``, only of its thread while it runs."""
    files: set[str] = set()
    depth = [0 if inside else 1]
    code = inspect.unwrap(inside).__code__ if inside else None

    def note(frame: FrameType, event: str, _: object) -> None:
        if code is not None and frame.f_code is code:
            depth[0] += {"call": 1, "return": -1}.get(event, 0)
        path = frame.f_code.co_filename
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith("<frozen importlib"):
            return  # detectron2's repairs, asked about a module that is imported
        if event == "call" and depth[0] and frame.f_code.co_flags & _FUNCTION:
            for package in ("proxydet", "proxydet_cli"):
                if path.startswith(str(REPOSITORY / package) + "/"):
                    files.add(str(Path(path).relative_to(REPOSITORY)))

    if inside is None:
        threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def image_to_drawn_box(run: Path, image: Path) -> set[str]:
    """Predict with an opened detector, and draw the result."""
    from PIL import Image

    from proxydet import Detector

    detector = Detector.from_run(run, device="cpu")
    with entered() as files:
        found = detector.predict(image, score_threshold=0.05)
        assert len(found)
        found.draw(Image.open(image))
    return files


def annotation_to_loss(data: Path, cache: Path) -> set[str]:
    """Read annotation files, make a batch of annotated images, and compute its losses."""
    from proxydet.data.dataset import Dataset, DatasetConfig
    from proxydet.data.loader import TrainingLoader, TrainingSources
    from proxydet.losses.criterion import Criterion
    from proxydet.modeling.network import ProxyDetNetwork
    from proxydet.recipes import resolve_config
    from proxydet.training.train import fit_to_embeddings

    settings = ("data.workers=0", "data.image_labels=null")  # batches of annotated images only
    config = resolve_config(
        "tiny", overrides=[f"data.description={data}", f"data.cache={cache}", *settings]
    )
    with entered() as files:
        opened = Dataset(config=DatasetConfig.from_toml(data), cache=cache)
        sources = TrainingSources(config.data, opened)
        batch = TrainingLoader(sources, rank=0, world_size=1, seed=0).batch(0)
    vocabulary = opened.vocabulary
    network = ProxyDetNetwork(fit_to_embeddings(config, vocabulary.dimension).model, vocabulary)
    criterion = Criterion(config.losses)
    with entered() as more:
        criterion(network(batch))
    return files | more


def batch_to_step(data: Path, cache: Path) -> set[str]:
    """Take an optimiser step."""
    from proxydet.recipes import resolve_config
    from proxydet.training.step import train_step
    from proxydet.training.train import train

    settings = [f"data.description={data}", f"data.cache={cache}", "training.iterations=1"]
    with entered(train_step) as files:
        train(resolve_config("tiny", overrides=settings), output=cache / "run")
    return files


def download_to_weights(run: Path, folder: Path) -> set[str]:
    """Download a checkpoint from a local server, and read it."""
    from proxydet import download
    from proxydet.artifacts.catalogue import Catalogue
    from proxydet.weight_files import read_state_dict

    (folder / "model.pth").write_bytes((run / "model_final.pth").read_bytes())
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        catalogue = folder / "catalogue.toml"
        catalogue.write_text(
            "[[artifacts]]\n"
            'name = "model"\ntitle = "A model"\nlicence = "ours"\ntarget = "models/model.pth"\n'
            f'addresses = ["http://127.0.0.1:{server.server_port}/model.pth"]\n'
            'content = { kind = "tensors" }\n'
        )
        read = Catalogue.load([catalogue])
        with entered() as files:
            read_state_dict(download("model", root=folder / "root", catalogue=read))
        server.shutdown()
    return files


def main() -> None:
    """Count and list the files of the four ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    arguments = parser.parse_args()
    image = next(arguments.data.parent.glob("val/*.jpg"))
    with tempfile.TemporaryDirectory() as place:
        ways = {
            "image -> drawn box": image_to_drawn_box(arguments.run, image),
            "annotation -> loss": annotation_to_loss(arguments.data, Path(place, "cache")),
            "batch -> step": batch_to_step(arguments.data, Path(place, "cache")),
            "download -> weights": download_to_weights(arguments.run, Path(place)),
        }
    for name, files in ways.items():
        print(f"{name}: {len(files)} files")
        for path in sorted(files):
            print(f"  {path}")


if __name__ == "__main__":
    main()

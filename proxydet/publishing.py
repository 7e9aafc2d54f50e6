"""Uploads a trained detector to the Hugging Face hub: the files that `proxydet.hub` downloads, and a model card.

::

    with prepared("runs/pets", "me/pets", license="apache-2.0") as package:
        print(package.card)
        address = upload(package, private=True)
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxydet._version import __version__
from proxydet.config import dump_yaml, from_mapping, to_mapping
from proxydet.detector import Detector
from proxydet.files import JsonLines, write_text
from proxydet.hub import WEIGHTS, check_name, code_paths, errors_of_hub, require_login
from proxydet.models import configuration_of, newest_weights
from proxydet.paths import require_run
from proxydet.recipes import RunConfig, get_recipe
from proxydet.training.logs import read_evaluations
from proxydet.training.runfolder import RunFolder, read_last_iteration
from proxydet.weight_files import write_safetensors

CARD = "README.md"
_MOST_CLASSES = 200


@dataclass(frozen=True, kw_only=True)
class Package:
    """What is uploaded.

    Attributes:
        repository: ``owner/name``.
        folder: Where the files are.
        files: Size in bytes of each, by name.
        card: The model card, Markdown.
    """

    repository: str
    folder: Path
    files: dict[str, int]
    card: str


@contextlib.contextmanager
def prepared(
    run: Path | str, repository: str, *, weights: Path | None = None, license: str | None = None
) -> Iterator[Package]:
    """Write what is uploaded of a run into a temporary folder: weights, configuration, classes, text encoder, model card.

    Paths of this machine, commands and package lists of the run stay here, and how it was trained: the section ``training`` of
    the configuration is the recipe's.

    Args:
        run: The run folder.
        repository: ``owner/name``.
        weights: A checkpoint of the run; None: those that the run folder opens, of its best evaluation where they are kept.
        license: Of the weights, by the hub's identifier (``apache-2.0``, ``cc-by-nc-4.0``, ``other``); None states none.

    Raises:
        InputError: The name is not one of a repository, or the run cannot be opened.
    """
    check_name(repository)
    folder = require_run(Path(run))
    config = from_mapping(RunConfig, configuration_of(folder))
    opened = weights or newest_weights(folder)
    detector = Detector.from_run(folder, checkpoint=opened, device="cpu")
    iteration = read_last_iteration(opened)
    evaluations = read_evaluations(JsonLines(RunFolder(folder).evaluations))
    scores = {} if iteration is None else evaluations.get(iteration, {})
    with tempfile.TemporaryDirectory() as place:
        target = Path(place)
        write_safetensors(
            target / WEIGHTS, detector.network.state_dict(), {"recipe": config.recipe}
        )
        detector.vocabulary.save(target / "vocabulary.npz")
        shared = dataclasses.replace(config, training=get_recipe(config.recipe).training)
        write_text(target / "config.yaml", dump_yaml(_without_paths(shared)))
        if own_encoder := (folder / "text_encoder.json").exists():
            shutil.copyfile(folder / "text_encoder.json", target / "text_encoder.json")
        card = _card(
            repository, config, detector, iteration, scores, license, own_encoder=own_encoder
        )
        write_text(target / CARD, card)
        files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
        yield Package(repository=repository, folder=target, files=files, card=card)


def upload(package: Package, *, private: bool | None = None, keep_card: bool = True) -> str:
    """Upload in one commit; the repository is created where there is none.

    Args:
        package: What `prepared` gave.
        private: Whether a new repository is private; None: public, unless the organisation's setting says otherwise.
        keep_card: Leave a model card that is there already.

    Returns:
        Address of the commit.

    Raises:
        ArtifactError: Not logged in, or the hub does not allow it or cannot be reached; the repository is as it was.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    name = package.repository
    require_login(name)
    with errors_of_hub(name, "uploaded"):
        api = HfApi(library_name="proxydet", library_version=__version__)
        api.create_repo(name, private=private, exist_ok=True)
        kept = keep_card and api.file_exists(name, CARD)
        added = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=package.folder / file)
            for file in package.files
            if not (kept and file == CARD)
        ]
        return str(api.create_commit(name, added, commit_message="Upload a detector").commit_url)


def _without_paths(config: Any) -> Any:
    """Return a configuration without the files of this machine."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    changes = {
        name: None if isinstance(value, Path) else _without_paths(value)
        for name, value in values.items()
        if isinstance(value, Path) or dataclasses.is_dataclass(value)
    }
    return dataclasses.replace(config, **changes)


def _card(
    repository: str,
    config: RunConfig,
    detector: Detector,
    iteration: int | None,
    scores: dict[str, float],
    license: str | None,
    *,
    own_encoder: bool,
) -> str:
    from huggingface_hub import ModelCardData

    # A text encoder of its own knows the words of its classes only.
    example = list(detector.vocabulary.names[:2]) if own_encoder else ["mug", "kettle"]
    typed = ", ".join(f'"{name}"' if "," in name else name for name in example)
    header = ModelCardData(
        license=license,
        library_name="proxydet",
        pipeline_tag="zero-shot-object-detection",
        tags=["object-detection", "open-vocabulary", "proxydet"],
    ).to_yaml()
    classes, settings = detector.vocabulary, config.training
    base = int(classes.base.sum())
    names = classes.names[:_MOST_CLASSES]
    more = len(classes.names) - len(names)
    description = config.data.description
    size = sum(value.numel() for value in detector.network.parameters())
    lines = [
        f"---\n{header}\n---\n",
        f"# {repository.partition('/')[2]}\n",
        "An open-vocabulary object detector, trained with [ProxyDet](https://arxiv.org/abs/2312.07266): it detects the classes that "
        "are named when it is used, not only those of its training.\n",
        "## How to use\n",
        "```\npip install proxydet\nproxydet setup\n"
        f"proxydet predict photo.jpg --weights {repository} -v {shlex.quote(typed)}\n```\n",
        f'```python\nfrom proxydet import Detector\n\ndetector = Detector.from_pretrained("{repository}")\n'
        f'for item in detector.predict("photo.jpg", vocabulary={json.dumps(example)}):\n'
        "    print(item.label, item.score, item.box_xyxy)\n```\n",
        "## Training\n",
        f"- recipe `{config.recipe}`, {settings.iterations} iterations, written by proxydet {__version__}; settings of the detector: `config.yaml`",
        f"- backbone `{config.model.backbone.kind}`, {size / 1e6:.1f} million parameters, "
        + ("boxes and masks" if detector.network.has_mask_head else "boxes only"),
    ]
    lines += [
        f"- needs the Python code `{code}`, which is imported only from a copy of these files: `--run FOLDER`"
        for code in code_paths(to_mapping(config.model))
    ]
    if description is not None:
        lines.append(f"- dataset config `{html.escape(description.name)}`")
    lines.append(
        f"- {len(classes.names)} classes, {base} base and {len(classes.names) - base} novel"
    )
    if scores:
        lines += [
            f"\n## Scores\n\nOn the validation images of the training's data, after {iteration} iterations, in percent:\n",
            "| metric | value |\n|---|---|",
            *(f"| {html.escape(key)} | {100 * value:.1f} |" for key, value in scores.items()),
        ]
    lines += [
        "\n## Classes of the training\n",
        html.escape(", ".join(names)) + (f", and {more} more: `vocabulary.npz`" if more else ""),
        "\n## Licence\n",
        f"`{license}`" if license else "Its author has not stated a licence for these weights.",
    ]
    return "\n".join(lines) + "\n"

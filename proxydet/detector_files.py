"""Opens detectors from run folders, checkpoints and published models."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from proxydet.config import from_mapping, load_mapping
from proxydet.data.config import DataConfig
from proxydet.data.dataset import DatasetConfig
from proxydet.errors import ArtifactError, CheckpointError, ConfigError, InputError
from proxydet.manifest import read_manifest
from proxydet.modeling.config import BackboneConfig, InferenceConfig, ModelConfig
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.weights import load_weights
from proxydet.paths import QUICKSTARTS_RUN, require_run, run_in
from proxydet.vocabulary.sources import published_vocabulary
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.detector import Detector

logger = logging.getLogger(__name__)

_DEFAULT = "proxydet-r50-inl"
_CHECKPOINT = re.compile(r"step_(\d+)\.pth")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a detector needs of a run's configuration."""

    data: DataConfig
    model: ModelConfig
    inference: InferenceConfig


def _published(
    kind: Literal["resnet", "swin"], inference: InferenceConfig | None = None
) -> _Settings:
    """A ProxyDet with a mixup branch where fusion weights are given, else a BoxSup or Detic model."""
    return _Settings(
        data=DataConfig(),
        model=ModelConfig(backbone=BackboneConfig(kind=kind), mixup_branch=inference is not None),
        inference=inference or InferenceConfig(),
    )


# Fusion weights are those of the paper for training with and without image labels.
_PRETRAINED = {
    "proxydet-r50": _published("resnet", InferenceConfig(alpha=0.35, beta=0.55)),
    "proxydet-r50-inl": _published("resnet", InferenceConfig()),
    "proxydet-swinb-inl": _published("swin", InferenceConfig()),
    "detic-r50": _published("resnet"),
    "detic-swinb": _published("swin"),
    "boxsup-r50": _published("resnet"),
    "boxsup-swinb": _published("swin"),
}
_SIZES = {
    "r50": _PRETRAINED["proxydet-r50-inl"],
    "swinb": _PRETRAINED["proxydet-swinb-inl"],
    **_PRETRAINED,
}


def open_run(
    cls: type[Detector], folder: Path, checkpoint: Path | None, device: torch.device
) -> Detector:
    """Open a run folder; see `Detector.from_run`."""
    folder = require_run(folder)
    settings = _chosen_settings(configuration_of(folder))
    weights = checkpoint or _newest_weights(folder)
    vocabulary = Vocabulary.load(folder / "vocabulary.npz")
    encoder = _encoder_of(folder, settings.data)
    return _open(cls, settings, vocabulary, weights, device, encoder)


def open_checkpoint(
    cls: type[Detector],
    path: Path,
    config: ModelConfig | Path | str,
    vocabulary: Vocabulary | None,
    device: torch.device,
) -> Detector:
    """Open a checkpoint; see `Detector.from_checkpoint`."""
    settings = _settings_from(config)
    encoder = None
    if vocabulary is None and isinstance(config, Path) and _is_run(config.parent):
        vocabulary = Vocabulary.load(config.parent / "vocabulary.npz")
        encoder = _encoder_of(config.parent, settings.data)
    return _open(cls, settings, vocabulary or published_vocabulary("lvis"), path, device, encoder)


def open_pretrained(cls: type[Detector], name: str, device: torch.device) -> Detector:
    """Download a published model where it is not there, and open it; see `Detector.from_pretrained`."""
    from proxydet.artifacts import download

    settings = _pretrained(name)
    weights = download(name)
    download("lvis-metadata")
    return _open(cls, settings, published_vocabulary("lvis"), weights, device)


def open_named(
    cls: type[Detector],
    *,
    run: Path | None,
    weights: str | None,
    config: str | None,
    device: str,
) -> Detector:
    """Open the detector that a command line names; nothing is downloaded.

    Args:
        cls: The class to make.
        run: A run folder.
        weights: A checkpoint (of the run where there is one), or a published model's name; None with no run: the
            published R50.
        config: ``r50``, ``swinb`` or a ``config.yaml``: the sizes of a checkpoint without a run. Without it, a
            checkpoint that lies in a run folder is opened as that run's.
        device: As `proxydet.detector.choose_device` takes it.

    Raises:
        InputError: It cannot be opened, or the options contradict each other.
        ArtifactError: The published model is not there.
    """
    from proxydet.artifacts import locate
    from proxydet.detector_inputs import choose_device

    chosen = choose_device(device)
    if run is not None:
        if config is not None:
            raise ConfigError("a run has its own configuration", hint="leave --config out")
        return open_run(cls, run, None if weights is None else Path(weights), chosen)
    name = weights or _DEFAULT
    if name in _PRETRAINED:
        try:
            path = locate(name)
        except ArtifactError as error:
            raise ArtifactError(
                error.message,
                hint=f"run: proxydet download {name} (or name a run of your own with --run)",
                path=error.path,
            ) from error
        return _open(cls, _PRETRAINED[name], published_vocabulary("lvis"), path, chosen)
    _require_weights(name)
    if config is None and (of := _run_of(Path(name))) is not None:
        return open_run(cls, of, Path(name), chosen)
    sizes = config or "r50"
    given = Path(sizes) if Path(sizes).suffix in (".yaml", ".yml") else sizes
    return open_checkpoint(cls, Path(name), given, None, chosen)


def _require_weights(name: str) -> None:
    """Say what is meant with a name that is neither a file nor a model, before anything else is looked for."""
    if Path(name).is_file():
        return
    near = difflib.get_close_matches(name, _PRETRAINED, n=1)
    raise InputError(
        f"{name} is neither a weight file nor a published model",
        hint=(f"did you mean {near[0]}? " if near else "") + f"Models: {', '.join(_PRETRAINED)}",
        path=Path(name),
    )


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.yaml", "vocabulary.npz"))


def _run_of(weights: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if any."""
    folder = weights.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder if _is_run(folder) else None


def shown_name(*, run: Path | None, weights: str | None) -> str:
    """What to call the detector that `open_named` opens: the run folder's name, the file's or the model's."""
    if run is not None:
        found = run_in(run.resolve())
        return found.parent.name if found.name == QUICKSTARTS_RUN else found.name
    return Path(weights).name if weights is not None else _DEFAULT


def _pretrained(name: str) -> _Settings:
    if name not in _PRETRAINED:
        raise InputError(
            f"there is no published model {name!r}", hint=f"there are {', '.join(_PRETRAINED)}"
        )
    return _PRETRAINED[name]


def _settings_from(config: ModelConfig | Path | str) -> _Settings:
    if isinstance(config, Path):
        return _read_settings(config)
    if isinstance(config, ModelConfig):
        return _Settings(data=DataConfig(), model=config, inference=InferenceConfig())
    if config not in _SIZES:
        raise InputError(
            f"there is no model {config!r}",
            hint=f"there are {', '.join(_SIZES)}; or give the config.yaml of a run",
        )
    return _SIZES[config]


def _open(
    cls: type[Detector],
    settings: _Settings,
    vocabulary: Vocabulary,
    weights: Path,
    device: torch.device,
    encoder: Path | None = None,
) -> Detector:
    network = ProxyDetNetwork(settings.model, vocabulary)
    load_weights(network, weights)
    return cls(
        network.for_inference(device),
        inference=settings.inference,
        shortest=settings.data.test_shortest_side,
        longest=settings.data.test_longest_side,
        encoder=encoder,
    )


def _read_settings(path: Path) -> _Settings:
    """Read the parts of a run's configuration that prediction needs; a run folder holds it complete."""
    if not path.is_file():
        raise InputError(
            f"there is no configuration {path}",
            hint="give the config.yaml of a run that proxydet train or quickstart wrote",
            path=path,
        )
    return _chosen_settings(load_mapping(path))


def configuration_of(run: Path) -> Mapping[str, Any]:
    """Return a run's configuration: of ``config.yaml``, or, where that is damaged, of the manifest as `train` does.

    Raises:
        InputError: Neither can be read.
    """
    path = run / "config.yaml"
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "is not there"
            raise InputError(
                f"the configuration {path} {what}",
                hint="put it back, or give the folder of another run that proxydet train or quickstart wrote",
                path=path,
            )
        return load_mapping(path)
    except InputError as error:
        try:
            found = read_manifest(run).configuration
        except InputError:
            raise error from None
        logger.warning("%s; using %s", error.message.rstrip("."), run / "manifest.json")
        return found


def _chosen_settings(content: Mapping[str, Any]) -> _Settings:
    parts = {key: content.get(key, {}) for key in ("data", "model", "inference")}
    settings = from_mapping(_Settings, parts)
    if settings.data.masks is False:
        # Version 0.1 gave such a run a mask head too, and never trained it.
        return replace(settings, model=replace(settings.model, masks=None))
    return settings


def _newest_weights(folder: Path) -> Path:
    for name in ("model_final.safetensors", "model_final.pth"):  # version 0.1 wrote the second only
        if (folder / name).exists():  # what is not a regular file is refused by its reader
            return folder / name
    steps = {
        int(match[1]): path
        for path in folder.glob("checkpoints/step_*.pth")
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    if not steps:
        raise CheckpointError(
            f"the run {folder} has no weights yet",
            hint=f"continue it: proxydet train --config {folder / 'config.yaml'} --output {folder}",
            path=folder,
        )
    return steps[max(steps)]


def _encoder_of(folder: Path, data: DataConfig) -> Path | None:
    """The text encoder that the run's data came with; None where that is CLIP."""
    own = folder / "text_encoder.json"
    if own.exists():
        return own
    if data.description is None or not data.description.is_file():
        return None
    encoder = DatasetConfig.from_toml(data.description).classes.encoder
    return Path(encoder) if encoder is not None and Path(encoder).is_file() else None

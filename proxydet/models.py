"""Which detector a name means: a run folder, a checkpoint, a published model, a repository; found without loading torch.

A misspelt name is refused here, before anything heavy is loaded; `proxydet.detector.open_named` opens what was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from proxydet.config import from_mapping, load_mapping
from proxydet.data.config import DataConfig
from proxydet.data.dataset import DatasetConfig
from proxydet.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    InputError,
    VocabularyError,
)
from proxydet.files import sha256
from proxydet.hub import damage_explained, fetch, split_name
from proxydet.manifest import (
    EVALUATION_KEYS,
    FREE_KEYS,
    MANIFEST_NAME,
    differing,
    listed,
    read_manifest,
    read_values,
)
from proxydet.modeling.config import BackboneConfig, InferenceConfig, ModelConfig
from proxydet.paths import (
    QUICKSTARTS_RUN,
    did_you_mean,
    how_to_restore,
    list_checkpoints,
    require_run,
    run_in,
)
from proxydet.vocabulary.sources import TrainedClasses, published_vocabulary
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.weight_files import check_weight_file
from proxydet.wording import nearest

logger = logging.getLogger(__name__)

# May differ from a run's manifest, and mean nothing to a detector.
_UNUSED_KEYS = tuple(key for key in FREE_KEYS if key not in EVALUATION_KEYS)


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What a detector needs of a run's configuration."""

    data: DataConfig
    model: ModelConfig
    inference: InferenceConfig

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> DetectorConfig:
        """Take it from a run's whole configuration.

        Raises:
            ConfigError: A key or value is wrong.
        """
        parts = {key: content.get(key, {}) for key in ("data", "model", "inference")}
        settings = from_mapping(cls, parts)
        if settings.data.masks is not False:
            return settings
        # Version 0.1 gave such a run a mask head too, and never trained it.
        model = dataclasses.replace(settings.model, masks=None)
        return dataclasses.replace(settings, model=model)


def _published(
    kind: Literal["resnet", "swin"], inference: InferenceConfig | None = None
) -> DetectorConfig:
    """A ProxyDet with a mixup branch where fusion weights are given, else a BoxSup or Detic model."""
    return DetectorConfig(
        data=DataConfig(),
        model=ModelConfig(backbone=BackboneConfig(kind=kind), mixup_branch=inference is not None),
        inference=inference or InferenceConfig(),
    )


# Fusion weights are those of the paper for training with and without image labels.
PUBLISHED_MODELS: dict[str, DetectorConfig] = {
    "proxydet-r50": _published("resnet", InferenceConfig(alpha=0.35, beta=0.55)),
    "proxydet-r50-inl": _published("resnet", InferenceConfig()),
    "proxydet-swinb-inl": _published("swin", InferenceConfig()),
    "detic-r50": _published("resnet"),
    "detic-swinb": _published("swin"),
    "boxsup-r50": _published("resnet"),
    "boxsup-swinb": _published("swin"),
}
"""Models that `proxydet.Detector.from_pretrained` opens, with the settings that they were published with."""

DEFAULT_MODEL = "proxydet-r50-inl"
"""The published model that is opened where none is named."""

SIZES = {
    "r50": PUBLISHED_MODELS["proxydet-r50-inl"],
    "swinb": PUBLISHED_MODELS["proxydet-swinb-inl"],
    **PUBLISHED_MODELS,
}
"""What ``--config`` takes besides a file: whose sizes a checkpoint has."""

LVIS_METADATA = "lvis-metadata"
"""What ``proxydet download`` calls the names and embeddings of LVIS."""


@dataclass(frozen=True, kw_only=True)
class NamedDetector:
    """What a command line names; the files that it names are there.

    Attributes:
        run: The run folder, or the folder with the files of a repository.
        repository: The name on the Hugging Face hub that ``run`` was downloaded by.
        weights: A checkpoint; with a run, None: what `newest_weights` finds.
        published: A key of `PUBLISHED_MODELS`, instead of both.
        config: Sizes of a checkpoint without a run: a ``config.yaml``, or a key of `SIZES`.
    """

    run: Path | None = None
    repository: str | None = None
    weights: Path | None = None
    published: str | None = None
    config: Path | str = "r50"

    @property
    def name(self) -> str:
        """What to call it: the run folder's name, the file's, the model's or the repository's."""
        if self.repository is not None:
            return self.repository
        if self.run is not None and self.weights is None:
            run = self.run.resolve()
            return run.parent.name if run.name == QUICKSTARTS_RUN else run.name
        return self.published or (self.weights.name if self.weights is not None else "")


def find_detector(*, run: Path | None, weights: str | None, config: str | None) -> NamedDetector:
    """Find what a command line names; no weights are read, and only a repository of the Hugging Face hub downloaded.

    Args:
        run: A run folder, or the folder of a quickstart.
        weights: A checkpoint (of the run where there is one), a published model's name, a run folder, or ``owner/name`` or
            ``owner/name@revision`` on the Hugging Face hub, where nothing here has that name (nor, without a revision, is
            ``owner`` a folder here); None with no run: the published R50.
        config: ``r50``, ``swinb`` or a ``config.yaml``: the sizes of a checkpoint without a run. Without it, a
            checkpoint that lies in a run folder is that run's.

    Raises:
        InputError: There is no such folder, file, model or repository, or the file does not hold weights.
        ArtifactError: The repository cannot be downloaded.
        ConfigError: The options contradict each other.
    """
    if run is not None:
        if config is not None:
            raise ConfigError("a run has its own configuration", hint="leave --config out")
        checkpoint = None if weights is None else Path(weights)
        if checkpoint is not None and not checkpoint.exists():
            raise InputError(
                f"there is no checkpoint {checkpoint}",
                hint=f"those of the run are in {require_run(run) / 'checkpoints'}",
                path=checkpoint,
            )
        if checkpoint is not None:
            _refuse_export(checkpoint)
            check_weight_file(checkpoint)
        return NamedDetector(run=require_run(run), weights=checkpoint)
    name = weights or DEFAULT_MODEL
    if name in PUBLISHED_MODELS:
        if config is not None:
            raise ConfigError(
                f"--config {config} is for a weight file, and {name} is a published model",
                hint="give the file with --weights FILE, or leave --config out",
            )
        return NamedDetector(published=name)
    path = Path(name)
    on_hub = split_name(name) is not None
    if (on_hub and not path.exists()) or is_run(run_in(path)):
        if config is not None:
            raise ConfigError(f"{name} has its own configuration", hint="leave --config out")
        if not path.exists():
            if path.parent.is_dir() and "@" not in name:  # ``runs/pest``: meant to be here
                raise InputError(
                    f"there is no {path.name} in the folder {path.parent}",
                    hint=f"{did_you_mean(path)}name a repository of the Hugging Face hub so: {path.as_posix()}@main",
                    path=path,
                )
            return NamedDetector(run=fetch(name), repository=name)
        if on_hub:
            hub = "not a repository of that name on the Hugging Face hub"
            _warn_once(f"{name} is a folder here; it is used, {hub}")
        return NamedDetector(run=run_in(path))
    if path.exists() and not path.is_file():
        hint = "give a weight file, or a run's folder with --run"
        raise InputError(f"{name} is not a file", hint=hint, path=path)
    if not path.is_file():
        known = f"Models: {', '.join(PUBLISHED_MODELS)}; or owner/name on the Hugging Face hub"
        message = f"{name} is neither a weight file nor a published model"
        hint = nearest(name, PUBLISHED_MODELS).strip() or known
        raise InputError(message, hint=hint, path=path)
    _refuse_export(path)
    check_weight_file(path)
    folder = run_of(path)
    if config is None and folder is not None:
        return NamedDetector(run=folder, weights=path)
    return NamedDetector(weights=path, config=check_sizes(config or "r50"))


def _refuse_export(path: Path) -> None:
    """Raise InputError for what ``proxydet export`` writes, which holds no checkpoint."""
    openers = {
        ".onnx": "proxydet.export.runtime.OnnxDetector.from_file",
        ".pt2": "torch.export.load",
    }
    if (opener := openers.get(path.suffix.lower())) is not None:
        raise InputError(
            f"{path} is an exported detector, not a checkpoint",
            hint=f"open it in Python with {opener}; or give the checkpoint or the run "
            "(--run) that it was exported from",
            path=path,
        )


def check_sizes(config: Path | str) -> Path | str:
    """Return what ``--config`` names: a ``config.yaml`` that is there, or a key of `SIZES`.

    Raises:
        InputError: It is neither.
    """
    if isinstance(config, Path) or Path(config).suffix in (".yaml", ".yml"):
        if not Path(config).is_file():
            raise InputError(
                f"there is no configuration file {config}",
                hint="give the config.yaml of a run that proxydet train or quickstart wrote",
                path=Path(config),
            )
        return Path(config)
    if config not in SIZES:
        raise InputError(
            f"unknown model {config!r}",
            hint=f"known: {', '.join(SIZES)}; or give the config.yaml of a run",
        )
    return config


def locate_published(name: str) -> Path:
    """Return where the downloaded weights of a published model are.

    Args:
        name: A key of `PUBLISHED_MODELS`.

    Raises:
        ArtifactError: They, or the names and embeddings of LVIS, are not there.
    """
    from proxydet.artifacts import locate

    try:
        weights = locate(name)
        locate(LVIS_METADATA)
    except ArtifactError as error:
        raise ArtifactError(
            error.message,
            hint=f"run: proxydet download {name} {LVIS_METADATA} (or name a run folder of your own)",
            path=error.path,
            needs=(name, LVIS_METADATA),
        ) from error
    return weights


def is_run(folder: Path) -> bool:
    """Whether a folder holds what a detector needs of a run besides weights."""
    return all((folder / name).is_file() for name in ("config.yaml", "vocabulary.npz"))


def run_of(weights: Path) -> Path | None:
    """Return the run folder that a weight file lies in; None where it lies in none."""
    folder = weights.absolute().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder if is_run(folder) else None


def vocabulary_of(start: NamedDetector) -> Vocabulary | None:
    """Return the classes that a detector was trained on; None of a weight file without a run.

    Raises:
        VocabularyError: As `run_vocabulary`.
    """
    if start.run is not None:
        return run_vocabulary(start.run)
    return published_vocabulary("lvis") if start.published is not None else None


def run_vocabulary(run: Path) -> Vocabulary:
    """Return the classes that a run was trained on.

    Raises:
        VocabularyError: Their file is absent, damaged, or not what the run wrote, by its manifest.
    """
    path = run / "vocabulary.npz"
    vocabulary = Vocabulary.load(path)
    _require_written(path, "vocabulary", vocabulary.digest)
    return vocabulary


def run_encoder(run: Path) -> Path | None:
    """Return the text encoder in a run folder, which may be gone; None where the run has none of its own.

    Raises:
        VocabularyError: It is not what the run wrote, by its manifest.
    """
    path = run / "text_encoder.json"
    if path.exists():
        with contextlib.suppress(OSError):  # which is reported when it is opened
            _require_written(path, "text encoder", sha256(path))
    elif "text encoder" not in digests_of(run):
        return None
    return path


def _require_written(path: Path, name: str, digest: str) -> None:
    if digests_of(path.parent).get(name, digest) != digest:
        raise VocabularyError(
            f"{path} is not what the run wrote, by the digest in its {MANIFEST_NAME}",
            hint=how_to_restore(path, "put the run's own file back"),
            path=path,
        )


def settings_of(named: NamedDetector) -> DetectorConfig:
    """Return the settings of a detector, without opening it.

    Raises:
        InputError: Its configuration cannot be read, or a key or value of it is wrong.
    """
    if named.run is not None:
        return DetectorConfig.of(configuration_of(named.run))
    if named.published is not None:
        return PUBLISHED_MODELS[named.published]
    if not isinstance(named.config, Path):
        return SIZES[named.config]
    folder = named.config.parent
    of_run = named.config.name == "config.yaml" and is_run(folder)
    return DetectorConfig.of(configuration_of(folder) if of_run else load_mapping(named.config))


def trained_classes(named: NamedDetector) -> TrainedClasses:
    """Return the classes of a detector's training and its text encoder, without opening its network.

    Raises:
        InputError: They cannot be read, or are not what the run wrote.
    """
    run = named.run
    if run is None and isinstance(named.config, Path) and is_run(named.config.parent):
        run = named.config.parent
    if run is None:
        return TrainedClasses(published_vocabulary("lvis"))
    with damage_explained(named.repository, run):
        return classes_of_run(run, settings_of(named).data)


def classes_of_run(run: Path, data: DataConfig) -> TrainedClasses:
    """Return the classes of a run and the text encoder that its data came with, else CLIP.

    Args:
        run: The run folder.
        data: Its settings.

    Raises:
        InputError: They cannot be read, or are not what the run wrote.
    """
    vocabulary = run_vocabulary(run)
    if (own := run_encoder(run)) is not None:
        return TrainedClasses(vocabulary, own)
    if data.description is None or not data.description.is_file():
        return TrainedClasses(vocabulary)
    named = DatasetConfig.from_toml(data.description).classes.encoder
    return TrainedClasses(vocabulary, Path(named) if named and Path(named).is_file() else None)


def newest_weights(folder: Path) -> Path:
    """Return what a run folder opens: its best evaluation's weights where they are kept, the final ones, or the newest checkpoint.

    Raises:
        CheckpointError: There are none yet.
    """
    best, *_ = names = ("model_best.safetensors", "model_final.safetensors", "model_final.pth")
    for name in names:  # version 0.1 wrote the last only
        if (folder / name).exists():  # what is not a regular file is refused by its reader
            if name == best:
                logger.info("%s: the weights of its best evaluation, %s", folder, name)
            return folder / name
    steps = list_checkpoints(folder / "checkpoints")
    if not steps:
        raise CheckpointError(
            f"the run {folder} has no weights yet",
            hint=f"continue it: proxydet train --config {shlex.quote(str(folder / 'config.yaml'))} --output {shlex.quote(str(folder))}",
            path=folder,
        )
    return steps[-1][1]


def configuration_of(run: Path) -> Mapping[str, Any]:
    """Return a run's configuration: of ``config.yaml``, or, where that is damaged or was edited, of the manifest.

    As in `train`, settings of evaluation may be edited; others are compared with a manifest that has a SHA-256 (version 0.1
    wrote none). What differs is reported.

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
        content = load_mapping(path)
        known = DetectorConfig.of(content)
    except InputError as error:
        try:
            found = read_manifest(run).configuration
        except InputError:
            raise error from None
        _warn_once(f"{error.message.rstrip('.')}; using {run / MANIFEST_NAME}")
        return found
    try:
        manifest = read_values(run / MANIFEST_NAME) if (run / MANIFEST_NAME).exists() else {}
        written = manifest.get("configuration")
        if "sha256" not in manifest or not isinstance(written, Mapping):
            return content
        changed = differing(DetectorConfig.of(written), known, _UNUSED_KEYS)
    except InputError as error:
        _warn_once(f"{run / MANIFEST_NAME}: {error.message.rstrip('.')}; using {path}")
        return content
    if not changed:
        return content
    edited = any(not key.startswith(EVALUATION_KEYS) for key in changed)
    source = run / MANIFEST_NAME if edited else path
    _warn_once(
        f"{path} is not what the run was trained with, by {run / MANIFEST_NAME}: {listed(changed)}; using {source}"
    )
    return written if edited else content


def digests_of(run: Path) -> Mapping[str, Any]:
    """Return the digests in a run's manifest; empty where it has none that can be read."""
    with contextlib.suppress(InputError):
        found = read_values(run / MANIFEST_NAME).get("digests")
        return found if isinstance(found, Mapping) else {}
    return {}


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)

"""Fine-tuning: a configuration for a trained detector and new data, and a report of what it gained and what it forgot.

::

    from proxydet.finetune import finetune_config
    from proxydet.models import find_detector
    from proxydet.training_run import run_training

    start = find_detector(run=None, weights="proxydet-r50-inl", config=None)
    config, reasons = finetune_config(start, Path("pets.toml"))
    result = run_training(config, output=Path("runs/pets"))       # result.finetune: the report
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxydet.config import from_mapping, merge, overlay, parse_overrides, scalar_text, to_mapping
from proxydet.data.dataset import Dataset, DatasetConfig
from proxydet.errors import ConfigError, VocabularyError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.files import sha256
from proxydet.hub import refuse_code
from proxydet.models import (
    PUBLISHED_MODELS,
    NamedDetector,
    configuration_of,
    locate_published,
    newest_weights,
    run_encoder,
    vocabulary_of,
)
from proxydet.recipes import RunConfig, absolute_paths, get_recipe, resolve_config
from proxydet.training.config import LogConfig, shortened
from proxydet.vocabulary.vocabulary import Vocabulary
from proxydet.wording import first_of

logger = logging.getLogger(__name__)

LEARNING_RATE = 0.25
"""Learning rate of a fine-tuning, as a share of the starting detector's."""
FREEZE = ("backbone.", "proposal_generator.")
"""What keeps its starting values by default: what finds regions, whatever their class."""
DISTILLATION = 100.0
"""Weight of the distillation loss by default."""
INTERPOLATION = 0.5
"""Share of the trained weights in the result by default."""

# Two encoders give different directions for one name; float16 storage of the same stays above this.
_SAME_TEXT = 0.99
_STEPS, _LEAST_EPOCHS, _MOST_EPOCHS = 1000, 12, 100
_EVALUATIONS = 20


@dataclass(frozen=True, kw_only=True)
class Reason:
    """A setting of a fine-tuning, and what it follows from.

    Attributes:
        key: The configuration key.
        value: Its value, as YAML.
        why: What it follows from; ``--set`` where it was given.
    """

    key: str
    value: str
    why: str


def finetune_config(
    start: NamedDetector,
    data: Path,
    *,
    recipe: str | None = None,
    overrides: Iterable[str] = (),
    epochs: float | None = None,
    keep_check: Path | None = None,
) -> tuple[RunConfig, tuple[Reason, ...]]:
    """Return the configuration of a fine-tuning, with the reasons of what differs from the starting detector's.

    Args:
        start: The starting detector, as `proxydet.models.find_detector` finds it.
        data: The dataset config of the new data.
        recipe: Whose settings a weight file without a run has; None: ``r50``, or what ``start.config`` says.
        overrides: Assignments ``a.b=c``, which win over what is chosen here.
        epochs: How often each image is trained on; None: by the number of images.
        keep_check: A dataset config whose validation images show what happens to classes that are not trained.

    Raises:
        ConfigError: The options contradict each other, or a number is out of range.
        DataError: The data cannot be used.
        VocabularyError: The classes have no embeddings, or those of another text encoder than the starting detector's.
        InputError: The starting detector has no configuration or weights that can be read.
    """
    if epochs is not None and not (0 < epochs < math.inf):
        raise ConfigError(f"--epochs must be above 0; it is {epochs:g}")
    described = DatasetConfig.from_toml(data)  # refused before weights are downloaded
    if keep_check is not None:
        DatasetConfig.from_toml(keep_check).split("val")
    base, weights = _starting_run(start, recipe)
    dataset = Dataset(config=described, cache=base.data.cache)
    vocabulary, images = dataset.vocabulary, len(dataset.store("train").image_ids)
    known = vocabulary_of(start)
    if known is not None:
        check_embeddings(vocabulary, known, start, dataset.config)
    trained = set() if known is None else set(np.array(known.names)[known.base].tolist())
    shared = [name for name in vocabulary.names if name in trained]

    settings = base.training
    per_step = _annotated_per_batch(base, dataset)
    why = f"--epochs {epochs:g}" if epochs is not None else ""
    if epochs is None:
        wanted = math.ceil(_STEPS * per_step / images)
        epochs = min(max(wanted, _LEAST_EPOCHS), _MOST_EPOCHS)
        why = f"the {'most' if epochs < wanted else 'least'} that are chosen"
        if epochs == wanted:
            why = f"about {_STEPS:,} iterations"
    iterations = max(round(epochs * images / per_step), 1)
    period = max(round(images / per_step), math.ceil(iterations / _EVALUATIONS), 1)
    validated = dataset.config.val is not None
    no_val = f"{data} has no [val] table"
    each = "an epoch" if period == round(images / per_step) else f"{_EVALUATIONS} in all"
    window = max(iterations // 20, 10)
    chosen: dict[str, tuple[Any, str]] = {
        "data.description": (data, "--data"),
        "training.weights": (weights, "the starting detector's"),
        "training.finetune.start": (start.published or start.repository or str((start.run or weights).absolute()), "--finetune"),
        "training.iterations": (
            iterations,
            f"{epochs:g} epochs of {images:,} images, {per_step:.3g} an iteration ({why})",
        ),
        "training.replicas": (1, "an iteration is one batch of one process"),
        "training.accumulation": (1, "as above"),
        "training.optimizer.learning_rate": (
            float(f"{settings.optimizer.learning_rate * LEARNING_RATE:.3g}"),
            f"{LEARNING_RATE:g} times the starting detector's {settings.optimizer.learning_rate:g}",
        ),
        "training.schedule.warmup_iterations": (
            min(max(iterations // 20, 10), 1000, iterations),
            "a twentieth of the iterations, 10 to 1000",
        ),
        "training.evaluation.period": (period if validated else None, each if validated else no_val),
        "training.evaluation.start": (0, "from the beginning"),
        "training.evaluation.at_start": (validated, "for the report: what is known before"),
        "training.evaluation.metric": (None, "the first: AP, of masks where there are some"),
        "training.evaluation.patience": (5 if validated else None, "evaluations without a new best" if validated else no_val),
        "training.checkpoints.period": (period, "as evaluations"),
        "training.checkpoints.best_weights": (validated, "the run folder opens the best" if validated else no_val),
        "training.ema.decay": (
            min(round(1 - 1 / window, 6), 0.9998),
            f"averages over about {window} iterations, a twentieth of all",
        ),
        "training.freeze": (FREEZE, "finds what is not trained as before"),
        "losses.distillation.weight": (
            DISTILLATION,
            "keeps what the start says of regions without an annotated object",
        ),
        "training.interpolation": (INTERPOLATION, "forgets less; 1 keeps the trained weights alone"),
        "training.log.period": (max(min(settings.log.period, iterations // 20), 1), "at least 20 records"),
        "training.device": ("auto", "of this machine"),
        "data.masks": ("auto", "where the data have some"),
    }  # fmt: skip
    if keep_check is not None:
        chosen["training.finetune.keep_check"] = (keep_check, "--keep-check")
    defaults: dict[str, Any] = {}
    for key, (value, _) in chosen.items():
        nested: Any = str(value) if isinstance(value, Path) else value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        defaults = overlay(defaults, nested)
    changes = parse_overrides(RunConfig, overrides)
    evaluation = EvaluationConfig(batch_size=base.evaluation.batch_size)
    neutral = dataclasses.replace(base, evaluation=evaluation)
    config = absolute_paths(merge(neutral, overlay(defaults, changes)))
    given = {text.partition("=")[0].strip() for text in overrides}
    reasons = []
    if shared:
        why = f"the starting detector knows {len(shared)} of {len(vocabulary)} classes by the same name: trained again"
        reasons.append(Reason(key="classes", value=first_of(shared), why=why))
    for key, (_, reason) in chosen.items():
        value = functools.reduce(getattr, key.split("."), config)
        plain = str(value) if isinstance(value, Path) else value
        text = scalar_text(list(plain) if isinstance(plain, tuple) else plain)
        set_here = any(key == name or key.startswith(f"{name}.") for name in given)
        reasons.append(Reason(key=key, value=text, why="--set" if set_here else reason))
    return config, tuple(reasons)


def with_epochs(config: RunConfig, epochs: float) -> tuple[RunConfig, tuple[Reason, ...]]:
    """Return a configuration with a length by the number of annotated training images; warm-up and periods in proportion.

    Raises:
        ConfigError: ``epochs`` is not above 0, or there is no dataset config.
        DataError: The data cannot be used.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"--epochs must be above 0; it is {epochs:g}")
    if config.data.description is None:
        raise ConfigError("--epochs counts the images of the data.", hint="give them: --data FILE")
    data = Dataset(config=DatasetConfig.from_toml(config.data.description), cache=config.data.cache)
    images, training = len(data.store("train").image_ids), config.training
    per_step = _annotated_per_batch(config, data) * training.replicas
    iterations = max(round(epochs * images / per_step), 1)
    changed = shortened(training, training.iterations / iterations)
    why = f"{epochs:g} epochs of {images:,} images, {per_step:.3g} an iteration; warm-up and periods in proportion"
    reason = Reason(key="training.iterations", value=str(iterations), why=why)
    return dataclasses.replace(config, training=changed), (reason,)


def _annotated_per_batch(config: RunConfig, data: Dataset) -> float:
    """Return the annotated images of a batch, on average over batches with boxes and with image labels."""
    boxes, labels = config.data.boxes, config.data.image_labels
    if labels is None or data.config.image_labels is None:
        return float(boxes.batch_size)
    share, other = boxes.ratio / boxes.batch_size, labels.ratio / labels.batch_size
    return boxes.batch_size * share / (share + other)


def _starting_run(start: NamedDetector, recipe: str | None) -> tuple[RunConfig, Path]:
    """Return the whole configuration that a detector was trained with, and its weights."""
    if recipe is not None and (start.run is not None or start.published is not None):
        raise ConfigError(
            f"--finetune {start.published or start.run} has its own configuration",
            hint="leave --recipe and --backbone out; single settings are changed with --set",
        )
    if start.run is not None:
        base = from_mapping(RunConfig, configuration_of(start.run))
        if start.repository is not None:
            base = _without_choices_of_others(base, start.repository, start.run)
        return base, (start.weights or newest_weights(start.run)).absolute()
    if start.published is not None:
        settings = PUBLISHED_MODELS[start.published]
        base = get_recipe("swinb" if settings.model.backbone.kind == "swin" else "r50")
        base = dataclasses.replace(base, model=settings.model, inference=settings.inference)
        return base, locate_published(start.published)
    if start.weights is None:
        raise ConfigError("--finetune names no detector")
    if isinstance(start.config, Path):
        return resolve_config(recipe, start.config), start.weights.absolute()
    return resolve_config(recipe or start.config), start.weights.absolute()


def _without_choices_of_others(config: RunConfig, repository: str, folder: Path) -> RunConfig:
    """Return the configuration of a repository without its code for training, its loggers and its paths."""
    if config.losses.criterion is not None:
        logger.warning(
            "%s was trained with the criterion %s, which is not imported because a downloaded file names it: the published one is used",
            repository,
            config.losses.criterion,
        )
    own = {
        "data": {"cache": None},
        "losses": {"criterion": None, "options": {}},
        "training": {"log": to_mapping(LogConfig()), "finetune": {"keep_check": None}},
    }
    config = merge(config, own)
    refuse_code(repository, folder, to_mapping(config))
    return config


def check_embeddings(
    own: Vocabulary, known: Vocabulary, start: NamedDetector, data: DatasetConfig
) -> None:
    """Make sure that the embeddings of new classes come from the text encoder of the starting detector's.

    Raises:
        VocabularyError: They have other dimensions, were made without an encoder (``--closed``), name another encoder, or differ
            for a class that both have.
    """
    embeddings = data.classes.embeddings
    encoder = None if start.run is None else run_encoder(start.run)
    if encoder is not None and not encoder.is_file():
        encoder = None
    option = f" --encoder {shlex.quote(str(encoder))}" if encoder is not None else ""
    problem = ""
    given = Path(data.classes.encoder or "")
    rows_CD = own.normalised()
    if own.dimension != known.dimension:
        problem = f"have {own.dimension} dimensions; those of the starting detector have {known.dimension}"
    elif encoder is not None and given.is_file() and sha256(given) != sha256(encoder):
        problem = f"were made by {given}, those of the starting detector by {encoder}"
    elif len(own) > 1 and np.abs(rows_CD @ rows_CD.T - np.eye(len(own))).max() < 1e-5:
        problem = "were made without a text encoder (data init --closed): they mean nothing to the starting detector"
    else:
        shared = [name for name in own.names if name in known.names]
        if shared:
            cosines = (own.subset(shared).normalised() * known.subset(shared).normalised()).sum(1)
            other = [n for n, cosine in zip(shared, cosines, strict=True) if cosine < _SAME_TEXT]
            if other:
                problem = (
                    f"are not those of the starting detector for classes that both have ({first_of(other)}): another text "
                    "encoder or prompt made them"
                )
    if problem:
        raise VocabularyError(
            f"the text embeddings {embeddings} {problem}",
            hint=f"embed the class names as the starting detector's were: proxydet vocab build NAMES -o classes.vocab{option}, "
            "and name that file as vocabulary.embeddings in the dataset config",
            path=embeddings,
        )

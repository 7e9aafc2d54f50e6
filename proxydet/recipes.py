"""Recipes: functions that return the full configuration of a run.

`RECIPES` lists them by name; ``proxydet train --recipe NAME`` starts from one. A file and ``--set`` change single
values of it. The published ones are those of the paper's released models (AAAI 2024, arXiv 2312.07266).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from proxydet.config import load_mapping, merge, overlay, parse_overrides
from proxydet.data.config import DataConfig, SourceConfig
from proxydet.errors import ConfigError
from proxydet.evaluation.config import EvaluationConfig
from proxydet.losses.config import (
    ClassificationLossConfig,
    ImageLabelLossConfig,
    LossConfig,
    MixupLossConfig,
)
from proxydet.modeling.config import (
    BackboneConfig,
    CascadeConfig,
    CenterNetLossConfig,
    ClassifierConfig,
    InferenceConfig,
    MaskConfig,
    ModelConfig,
    ProposalConfig,
    PyramidConfig,
    ResNetConfig,
)
from proxydet.paths import datasets_folder, models_folder
from proxydet.runtime.modes import Mode
from proxydet.training.config import (
    CheckpointConfig,
    EmaConfig,
    EvaluationSchedule,
    LogConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    TrainingConfig,
)
from proxydet.wording import nearest


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The whole configuration of a run."""

    recipe: str = "r50"
    """Name of the recipe that absent keys are taken from when this file is read."""

    seed: int = 7
    """Seed of every random draw."""

    reproducibility: Mode = "off"
    """off changes nothing; published: the published RoIAlign change and deterministic flags; strict: bit for bit."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is read, and how batches are put together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the detector."""

    losses: LossConfig = field(default_factory=LossConfig)
    """Losses and their weights."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""

    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """How detections are chosen, in evaluation and prediction."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How detections are scored."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in [0, 2**63); it is {self.seed}.")
        if self.recipe not in RECIPES:
            raise _unknown_recipe(self.recipe)
        first = self.model.proposals.first_level or 0
        proposing = [level for level in self.model.pyramid.all_levels if level >= first]
        self.losses.centernet.check_levels(len(proposing))


def r50() -> RunConfig:
    """ProxyDet R50 with ImageNet-LVIS, as published: mask AP 32.8, novel 26.2."""
    return RunConfig(
        recipe="r50",
        reproducibility="published",
        data=DataConfig(description=datasets_folder() / "lvis.toml"),
        training=TrainingConfig(
            weights=models_folder() / "BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth",
            evaluation=EvaluationSchedule(period=2500, start=65_000),
        ),
    )


def r50_without_image_labels() -> RunConfig:
    """ProxyDet R50 trained on LVIS alone, as published: mask AP 30.1, novel 19.0."""
    return _without_image_labels(r50(), "r50_without_image_labels")


def swinb() -> RunConfig:
    """ProxyDet Swin-B with ImageNet-LVIS, as published: mask AP 41.5, novel 36.7."""
    base = r50()
    return dataclasses.replace(
        base,
        recipe="swinb",
        data=dataclasses.replace(
            base.data,
            boxes=SourceConfig(batch_size=4, size=896, scale=(0.1, 2.0), ratio=1.0),
            image_labels=SourceConfig(batch_size=16, size=448, scale=(0.5, 1.5), ratio=4.0),
        ),
        model=ModelConfig(backbone=BackboneConfig(kind="swin")),
        training=dataclasses.replace(
            base.training,
            iterations=180_000,
            optimizer=OptimizerConfig(learning_rate=1e-4),
            weights=models_folder() / "BoxSup-C2_Lbase_CLIP_SwinB_896b32_4x.pth",
            evaluation=EvaluationSchedule(period=10_000, start=140_000),
        ),
    )


def swinb_without_image_labels() -> RunConfig:
    """ProxyDet Swin-B trained on LVIS alone; not published."""
    return _without_image_labels(swinb(), "swinb_without_image_labels")


def r50_fast() -> RunConfig:
    """As r50, in less time on GPUs from Ampere on; its AP was not measured."""
    return _fast(r50(), "r50_fast")


def swinb_fast() -> RunConfig:
    """As swinb, in less time on GPUs from Ampere on; its AP was not measured."""
    return _fast(swinb(), "swinb_fast")


def boxsup_r50() -> RunConfig:
    """The R50 detector that ProxyDet R50 starts from: LVIS boxes only, no mixup branch. Mask AP 30.2, novel 16.4."""
    return _boxsup(r50_without_image_labels(), "boxsup_r50", "resnet50_miil_21k.pth")


def boxsup_swinb() -> RunConfig:
    """The Swin-B detector that ProxyDet Swin-B starts from: LVIS boxes only, no mixup branch."""
    weights = "swin_base_patch4_window7_224_22k.pth"
    return _boxsup(swinb_without_image_labels(), "boxsup_swinb", weights)


def quickstart() -> RunConfig:
    """A small detector for the synthetic dataset of ``proxydet quickstart``: every part of the method, in minutes on a CPU."""
    model = _small_model(width=16, channels=48, hidden=128, embedding_dim=64)
    return RunConfig(
        recipe="quickstart",
        data=DataConfig(
            # Training scenes are larger than validation's and hold more objects: small batches learn most a second.
            boxes=SourceConfig(batch_size=4, size=160, scale=(0.9, 1.15), ratio=4.0),
            image_labels=SourceConfig(batch_size=8, size=64, scale=(0.9, 1.15), ratio=1.0),
            repeat_threshold=0.01,
            workers=1,
            test_shortest_side=128,
            test_longest_side=128,
        ),
        # The drawn objects are 30 to 65 pixels: regions are pooled at stride 4, where outlines are still sharp, and proposed at
        # stride 8 alone.
        model=dataclasses.replace(
            model,
            pyramid=dataclasses.replace(model.pyramid, levels=(2, 3), extra_levels=0),
            proposals=dataclasses.replace(
                model.proposals,
                first_level=3,
                candidates_train=300,
                candidates_test=300,
                keep_train=100,
                keep_test=100,
            ),
            cascade=dataclasses.replace(
                model.cascade, pool_levels=(2,), samples_per_image=16, positive_fraction=0.6
            ),
            masks=MaskConfig(convs=1, channels=24),
        ),
        # Telling shapes apart is what takes longest to learn here.
        losses=LossConfig(
            centernet=CenterNetLossConfig(size_ranges=((0.0, float("inf")),)),
            classification=ClassificationLossConfig(weight=3.0),
            mixup=MixupLossConfig(weight=16.0),
            image_labels=ImageLabelLossConfig(weight=0.5),
        ),
        training=_short_training(iterations=2130, learning_rate=2e-3),
        evaluation=EvaluationConfig(batch_size=8),
    )


def small() -> RunConfig:
    """A small detector for a few hundred photographs on one CPU or GPU, trained from fresh weights."""
    return RunConfig(
        recipe="small",
        data=DataConfig(
            boxes=SourceConfig(batch_size=8, size=320, scale=(0.8, 1.2), ratio=1.0),
            image_labels=None,
            # As large as in training: without wide scale jitter, other sizes are other objects to the network.
            test_shortest_side=320,
            test_longest_side=320,
        ),
        model=_small_model(width=24, channels=64, hidden=256, embedding_dim=512),
        training=_short_training(iterations=1500, learning_rate=2e-3),
        inference=InferenceConfig(alpha=0.35, beta=0.55),
    )


def lite0() -> RunConfig:
    """A detector with EfficientNet-Lite0, from its ImageNet weights: for a few hundred photographs in minutes on one CPU or GPU."""
    base = small()
    stem = "backbone.bottom_up.base"
    training = _short_training(iterations=900, learning_rate=1e-3)
    return dataclasses.replace(
        base,
        recipe="lite0",
        data=dataclasses.replace(
            base.data,
            boxes=SourceConfig(batch_size=4, size=384, scale=(0.8, 1.25), ratio=1.0),
            repeat_threshold=1.0,
            workers=0,
            test_shortest_side=384,
            test_longest_side=384,
        ),
        model=dataclasses.replace(
            base.model,
            backbone=BackboneConfig(kind="timm", timm="tf_efficientnet_lite0", frozen_norms=True),
            mixup_branch=False,
        ),
        training=dataclasses.replace(
            training,
            # What ImageNet taught about edges serves as it is; leaving it saves a third of a step.
            freeze=(f"{stem}.conv_stem", f"{stem}.bn1", f"{stem}.blocks.0", f"{stem}.blocks.1"),
            ema=EmaConfig(decay=0.99),
            evaluation=dataclasses.replace(training.evaluation, period=300),
            precision=dataclasses.replace(training.precision, channels_last=True),
        ),
    )


def tiny() -> RunConfig:
    """The smallest detector that has every part: for trying a set-up in seconds. It does not learn much."""
    return RunConfig(
        recipe="tiny",
        data=DataConfig(
            boxes=SourceConfig(batch_size=2, size=64, scale=(0.8, 1.2), ratio=1.0),
            image_labels=SourceConfig(batch_size=4, size=32, scale=(0.8, 1.2), ratio=1.0),
            workers=0,
            test_shortest_side=64,
            test_longest_side=128,
        ),
        model=_small_model(width=8, channels=16, hidden=32, embedding_dim=64),
        training=_short_training(iterations=20, learning_rate=1e-3),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        r50,
        r50_without_image_labels,
        swinb,
        swinb_without_image_labels,
        r50_fast,
        swinb_fast,
        boxsup_r50,
        boxsup_swinb,
        quickstart,
        small,
        lite0,
        tiny,
    )
}
"""Recipe functions by name."""


def get_recipe(name: str) -> RunConfig:
    """Return the configuration of a recipe.

    Raises:
        ConfigError: There is no such recipe; the message names the nearest.
    """
    if name not in RECIPES:
        raise _unknown_recipe(name)
    return RECIPES[name]()


def resolve_config(
    recipe: str | None = None, file: Path | None = None, overrides: Iterable[str] = ()
) -> RunConfig:
    """Put a configuration together: a recipe, then the values of a file, then single overrides.

    Values are checked against each other when all are in place, so the order of overrides does not matter.

    Args:
        recipe: Name of a recipe; None takes that of the overrides or of the file, and ``r50`` where there is none.
        file: YAML file, whole (as in a run folder) or partial.
        overrides: Assignments ``a.b=c``; the later of two for one key wins.

    Raises:
        ConfigError: A name, key or value is wrong.
    """
    mapping: dict[str, Any] = {} if file is None else load_mapping(file)
    changes = parse_overrides(RunConfig, overrides)
    name = changes.get("recipe", recipe or mapping.get("recipe", "r50"))
    if recipe not in (None, name):
        raise ConfigError(
            f"The recipe is {recipe} and, by --set, {name}.", hint="leave one of the two out"
        )
    if not isinstance(name, str):
        raise ConfigError(f"recipe must be text; it is {name!r}.", path=file)
    return merge(get_recipe(name), overlay({**mapping, "recipe": name}, changes))


def absolute_paths(config: RunConfig) -> RunConfig:
    """Return a configuration whose paths do not depend on the working folder."""
    return cast("RunConfig", _map_paths(config))


def _map_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if isinstance(value, tuple):
        return tuple(_map_paths(item) for item in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = [field.name for field in dataclasses.fields(value) if field.init]
    changed = {name: _map_paths(getattr(value, name)) for name in fields}
    return dataclasses.replace(value, **changed)


def _without_image_labels(base: RunConfig, name: str) -> RunConfig:
    return dataclasses.replace(
        base,
        recipe=name,
        data=dataclasses.replace(base.data, image_labels=None),
        inference=dataclasses.replace(base.inference, alpha=0.35, beta=0.55),
    )


def _fast(base: RunConfig, name: str) -> RunConfig:
    """Heads in TF32, channels last, and batches of one kind in a step, so that no process waits for one with a larger kind."""
    precision = dataclasses.replace(base.training.precision, heads="tf32", channels_last=True)
    return dataclasses.replace(
        base,
        recipe=name,
        data=dataclasses.replace(base.data, ranks_share_group=True),
        training=dataclasses.replace(base.training, precision=precision),
    )


def _boxsup(base: RunConfig, name: str, weights: str) -> RunConfig:
    training = dataclasses.replace(base.training, weights=models_folder() / weights)
    model = dataclasses.replace(base.model, mixup_branch=False)
    return dataclasses.replace(base, recipe=name, model=model, training=training)


def _small_model(*, width: int, channels: int, hidden: int, embedding_dim: int) -> ModelConfig:
    """A detector of the same build with fewer channels, blocks, regions and proposals."""
    return ModelConfig(
        backbone=BackboneConfig(
            resnet=ResNetConfig(
                depths=(1, 1, 1, 1), width=width, block="basic", norm="gn", norm_groups=8
            )
        ),
        pyramid=PyramidConfig(channels=channels),
        proposals=ProposalConfig(
            convs=2, norm_groups=8, candidates_train=500, candidates_test=500, keep_train=200
        ),
        cascade=CascadeConfig(hidden=(hidden,), samples_per_image=64, image_label_proposals=32),
        classifier=ClassifierConfig(embedding_dim=embedding_dim),
        masks=MaskConfig(convs=2, channels=channels),
    )


def _short_training(*, iterations: int, learning_rate: float) -> TrainingConfig:
    """Training of a small detector in one process."""
    return TrainingConfig(
        iterations=iterations,
        replicas=1,
        optimizer=OptimizerConfig(learning_rate=learning_rate, unused_gradients="skip"),
        schedule=ScheduleConfig(warmup_iterations=iterations // 20),
        precision=PrecisionConfig(backbone="fp32"),
        checkpoints=CheckpointConfig(period=max(iterations // 10, 1)),
        log=LogConfig(period=10),
    )


def _unknown_recipe(name: str) -> ConfigError:
    return ConfigError(
        f"There is no recipe {name!r}.{nearest(name, RECIPES)}",
        hint=f"Recipes: {', '.join(RECIPES)}.",
    )

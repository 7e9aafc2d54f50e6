"""Settings of a training: length, optimiser, schedule, precision, checkpoints, logs, evaluation, guards.

Defaults are the published R50 recipe on 8 GPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from proxydet.errors import ConfigError
from proxydet.extensions import is_python_path
from proxydet.modeling.config import Precision
from proxydet.wording import nearest


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and what is done to gradients before its step."""

    learning_rate: float = 2e-4
    """Step size at the end of warm-up."""

    weight_decay: float = 1e-4
    """Decoupled decay of every trained parameter, norms and biases included, as published."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""

    clip_value: float | None = 1.0
    """Largest absolute value of a gradient element; larger ones are cut to it. null does not clip."""

    unused_gradients: Literal["zero", "skip"] = "zero"
    """What a step does to parameters that no loss of it reaches on any process (the mask head, where all batches have
    image labels), if an earlier step reached them: zero moves them on by momentum and decay, as in the published
    training (torch 1.11, whose zero_grad keeps gradients of zero); skip leaves them alone, as the same code does with
    torch 2. With 8 processes about 1 step in 256 has image labels only; with one process half of them, so the recipes
    for one process skip."""

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "clip_value")
        _require(self.weight_decay >= 0, "weight_decay must not be negative", self.weight_decay)
        _require(all(0 <= b < 1 for b in self.betas), "betas must lie in [0, 1)", self.betas)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then a cosine to zero or a constant."""

    shape: Literal["cosine", "constant"] = "cosine"
    """Course over the whole training; cosine ends at 0."""

    warmup_iterations: int = 1000
    """Iterations of linear warm-up; 0 for none."""

    warmup_start: float = 1e-3
    """Fraction of the learning rate at which warm-up starts."""

    def __post_init__(self) -> None:
        warmup = self.warmup_iterations
        _require(warmup >= 0, "warmup_iterations must not be negative", warmup)
        _require(0 < self.warmup_start <= 1, "warmup_start must lie in (0, 1]", self.warmup_start)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats and memory layouts of the computation. Weights, losses and box arithmetic are always float32."""

    backbone: Precision = "fp16"
    """Format of the products of backbone and pyramid: fp32; tf32, which rounds their factors to 10 bits of fraction on NVIDIA
    GPUs from Ampere on, and is fp32 elsewhere; bf16; or fp16, which scales the loss against underflow."""

    heads: Precision = "fp32"
    """The same for the heads: proposal tower, box heads and mask head. fp32 as published; the others are faster and less exact."""

    initial_loss_scale: float = 65536.0
    """First loss scale of fp16; it adapts afterwards."""

    channels_last: bool = False
    """Keep weights and feature maps with the channel dimension innermost, as tensor cores and oneDNN compute; changes sums in the
    last bits only."""

    compile: bool = False
    """Compile the backbone and FPN with torch.compile; changes sums in the last bits only."""

    # Keys of version 0.1, which configurations may still hold.
    EARLIER: ClassVar = ("dtype", "tf32")

    @classmethod
    def from_earlier(
        cls, values: Mapping[str, Any], base: PrecisionConfig | None
    ) -> dict[str, Any]:
        """Return what stands for the keys of version 0.1: ``dtype`` was the backbone's, ``tf32`` that of all in float32.

        Args:
            values: Among them such keys.
            base: What they are merged into, if anything.
        """
        kept = {key: value for key, value in values.items() if key not in cls.EARLIER}
        tf32 = values.get("tf32")
        parts: dict[str, Any] = {}
        if "tf32" in values:
            parts["heads"] = ("tf32" if tf32 else "fp32") if isinstance(tf32, bool) else tf32
        if tf32 is True and values.get("dtype", base and base.backbone) == "fp32":
            parts["backbone"] = "tf32"
        elif "dtype" in values:
            parts["backbone"] = values["dtype"]
        return {**parts, **kept}

    def __post_init__(self) -> None:
        _require_positive(self, "initial_loss_scale")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. One is always written at the end and on a stop signal."""

    period: int = 1000
    """Iterations between checkpoints."""

    keep_last: int = 2
    """Number of newest checkpoints to keep."""

    keep_every: int | None = None
    """Also keep the first checkpoint at or after each multiple of this; null keeps none of them."""

    keep_best: bool = True
    """Also keep the checkpoint with the best evaluation metric so far."""

    best_weights: bool = False
    """Also write the weights of the best evaluation so far as model_best.safetensors, which the run folder then opens by
    default, and keep the checkpoint they come from."""

    def __post_init__(self) -> None:
        _require_positive(self, "period", "keep_last", "keep_every")


@dataclass(frozen=True, kw_only=True)
class EvaluationSchedule:
    """When the network is evaluated during training. Each evaluation is preceded by a checkpoint."""

    period: int | None = None
    """Iterations between evaluations; null evaluates at the end only."""

    start: int = 0
    """First iteration at which an evaluation may run."""

    at_start: bool = False
    """Evaluate the starting weights, before the first step."""

    at_end: bool = True
    """Evaluate after the last iteration."""

    metric: str | None = None
    """Name of the metric whose largest value marks the best checkpoint; null takes the evaluation's first."""

    patience: int | None = None
    """Stop training early after this many evaluations in a row without a new best value of the metric; null never does."""

    def __post_init__(self) -> None:
        _require_positive(self, "period", "patience")
        _require(self.start >= 0, "start must not be negative", self.start)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average (EMA) of the weights. Where it is on, the averaged weights are evaluated and written."""

    decay: float | None = None
    """Share of the average that an iteration leaves as it is, such as 0.999; null does not average."""

    warmup_iterations: int = 10
    """After i iterations the decay is at most (1 + i) / (warmup_iterations + i): the average soon leaves the starting weights.
    1 for no warm-up."""

    def __post_init__(self) -> None:
        decay = self.decay
        _require(decay is None or 0 < decay < 1, "decay must lie in (0, 1) or be null", decay)
        _require_positive(self, "warmup_iterations")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written about the course of training."""

    period: int = 20
    """Iterations between two records of metrics.jsonl and the live display."""

    tensorboard: bool = True
    """Also write TensorBoard event files."""

    loggers: tuple[str, ...] = ()
    """Where the records also go: wandb, mlflow, or the Python paths of loggers of your own. The main process writes them; one
    that fails is reported and left out, and training continues."""

    def __post_init__(self) -> None:
        _require_positive(self, "period")
        for name in self.loggers:
            if name not in LOGGERS and not is_python_path(name):
                raise ConfigError(
                    f"loggers holds {name[:80]!r}.{nearest(name, LOGGERS)}",
                    hint=f"loggers are {', '.join(LOGGERS)}, and Python paths such as mypackage.logs:Mine",
                )


LOGGERS = ("tensorboard", "wandb", "mlflow")
"""Names that ``training.log.loggers`` may hold besides Python paths."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is done when something goes wrong in the middle of a run."""

    non_finite: Literal["stop", "skip"] = "stop"
    """On a loss that is not finite: stop with an error, or skip the step and count it."""

    max_skipped: int = 20
    """Number of skipped steps in one run after which it stops all the same."""

    def __post_init__(self) -> None:
        _require(self.max_skipped >= 0, "max_skipped must not be negative", self.max_skipped)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What a fine-tuning is compared with at its end (``--finetune``); nothing here changes what is learnt."""

    start: str | None = None
    """The starting detector: a published model's name, a run folder or a weight file; null for a training that is not a
    fine-tuning, and ends without a report."""

    keep_check: Path | None = None
    """Dataset config whose validation images show what happens to classes that are not trained; null takes those of the starting
    detector's own data."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training: everything between the data loader and the final weights."""

    iterations: int = 90_000
    """Length of the training: optimiser steps of as many images as when it began."""

    weights: Path | None = None
    """Checkpoint whose weights training starts from; null starts from fresh ones. This is not resuming."""

    ignore_in_weights: tuple[str, ...] = ()
    """Names that may be absent from, surplus in, or of another shape than in the starting weights: prefixes, or patterns
    with *. The mixup branch always may: BoxSup weights do not hold it."""

    freeze: tuple[str, ...] = ()
    """Parameters that keep their starting values: prefixes of their names, or patterns with *. backbone. is the backbone with
    its pyramid, proposal_generator. the proposal network, roi_heads. the box, mixup and mask heads. BatchNorms of frozen parts
    keep their statistics."""

    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """The report of a fine-tuning."""

    interpolation: float = 1.0
    """Share of the trained weights in the weights that are evaluated and written; the rest are the starting weights, so that
    less is forgotten of what they knew (WiSE-FT, arXiv 2109.01903). Only parameters that the starting weights hold are mixed; 1
    mixes nothing."""

    ema: EmaConfig = field(default_factory=EmaConfig)
    """Average of the weights over the iterations."""

    replicas: int = 8
    """Number of batches that make up one optimiser step (processes times accumulation) for which learning rate
    and iterations are given. With another number they are scaled by the rule in scaling."""

    scaling: Literal["linear", "none"] = "linear"
    """With k times the replicas: linear multiplies the learning rate by k and divides iterations, warm-up and all
    periods by k, so that as many images are seen; none leaves every number as it is."""

    accumulation: int = 1
    """Batches that a process accumulates in one optimiser step."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto takes the GPU where there is one."""

    threads: int | None = None
    """CPU threads of a process; null leaves torch's choice."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""

    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""

    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    evaluation: EvaluationSchedule = field(default_factory=EvaluationSchedule)
    """Evaluation during training."""

    log: LogConfig = field(default_factory=LogConfig)
    """Logs."""

    guards: GuardConfig = field(default_factory=GuardConfig)
    """What happens when something goes wrong."""

    def __post_init__(self) -> None:
        _require_positive(self, "iterations", "replicas", "accumulation", "threads")
        mixed = self.interpolation
        _require(0 < mixed <= 1, "interpolation must lie in (0, 1]", mixed)
        what = "interpolation below 1 needs starting weights (training.weights)"
        _require(self.weights is not None or mixed == 1, what, mixed)


def scale_training(config: TrainingConfig, replicas: int) -> TrainingConfig:
    """Return the settings for another number of batches a step.

    With k times as many, and ``scaling`` linear, the learning rate is multiplied by k, iterations, warm-up and all
    periods but the log's are divided by k, and the decay of the average is taken to the power k, so that a run sees as many
    images, warms up, saves, evaluates and averages after as many (Goyal et al. 2017, arXiv 1706.02677). With ``scaling`` none nothing is changed.

    Args:
        config: Settings for ``config.replicas`` batches a step.
        replicas: Batches a step, at least 1: processes times accumulation.

    Returns:
        Settings with ``replicas`` set to it; scaling them again for the same number changes nothing.
    """
    factor = replicas / config.replicas
    if factor == 1 or config.scaling == "none":
        return dataclasses.replace(config, replicas=replicas)
    rate = config.optimizer.learning_rate * factor
    return dataclasses.replace(
        shortened(config, factor),
        replicas=replicas,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        ema=dataclasses.replace(
            config.ema,
            decay=None if config.ema.decay is None else config.ema.decay**factor,
            warmup_iterations=max(round(config.ema.warmup_iterations / factor), 1),
        ),
    )


def shortened(config: TrainingConfig, factor: float) -> TrainingConfig:
    """Return the settings with iterations, warm-up and all periods but the log's divided by a factor above 0."""

    def fewer(count: int) -> int:
        return max(round(count / factor), 1)

    def fewer_or_none(count: int | None) -> int | None:
        return None if count is None else fewer(count)

    schedule, checkpoints, evaluation = config.schedule, config.checkpoints, config.evaluation
    warmup = round(schedule.warmup_iterations / factor)
    return dataclasses.replace(
        config,
        iterations=fewer(config.iterations),
        schedule=dataclasses.replace(schedule, warmup_iterations=warmup),
        checkpoints=dataclasses.replace(
            checkpoints,
            period=fewer(checkpoints.period),
            keep_every=fewer_or_none(checkpoints.keep_every),
        ),
        evaluation=dataclasses.replace(
            evaluation,
            period=fewer_or_none(evaluation.period),
            start=round(evaluation.start / factor),
        ),
    )


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            null = " or null" if "None" in type(config).__annotations__[name] else ""
            raise ConfigError(f"{name} must be above 0{null}; it is {value!r}.")


def _require(holds: bool, message: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{message}; it is {value!r}.")

"""The stated rule by which a recipe for one number of processes runs on another."""

from __future__ import annotations

import dataclasses

from proxydet.training.config import TrainingConfig


def scale_training(config: TrainingConfig, replicas: int) -> TrainingConfig:
    """Return the settings for another number of batches a step.

    With k times as many, and ``scaling`` linear, the learning rate is multiplied by k, and iterations, warm-up and all
    periods but the log's are divided by k, so that a run sees as many images, warms up, saves and evaluates after as
    many (Goyal et al. 2017, arXiv 1706.02677). With ``scaling`` none nothing is changed.

    Args:
        config: Settings for ``config.replicas`` batches a step.
        replicas: Batches a step, at least 1: processes times accumulation.

    Returns:
        Settings with ``replicas`` set to it; scaling them again for the same number changes nothing.
    """
    factor = replicas / config.replicas
    if factor == 1 or config.scaling == "none":
        return dataclasses.replace(config, replicas=replicas)

    def fewer(count: int) -> int:
        return max(round(count / factor), 1)

    def fewer_or_none(count: int | None) -> int | None:
        return None if count is None else fewer(count)

    optimizer, schedule = config.optimizer, config.schedule
    checkpoints, evaluation = config.checkpoints, config.evaluation
    return dataclasses.replace(
        config,
        replicas=replicas,
        iterations=fewer(config.iterations),
        optimizer=dataclasses.replace(optimizer, learning_rate=optimizer.learning_rate * factor),
        schedule=dataclasses.replace(
            schedule, warmup_iterations=round(schedule.warmup_iterations / factor)
        ),
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

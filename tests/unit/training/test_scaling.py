"""The stated rule for other numbers of processes."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxydet.training.config import (
    CheckpointConfig,
    EvaluationSchedule,
    LogConfig,
    ScheduleConfig,
    TrainingConfig,
    scale_training,
)

PUBLISHED = TrainingConfig(
    evaluation=EvaluationSchedule(period=2500, start=65_000),
    checkpoints=CheckpointConfig(period=1000, keep_every=5000),
    log=LogConfig(period=20),
)


def test_half_the_processes_take_twice_the_steps_at_half_the_rate():
    half = scale_training(PUBLISHED, 4)
    assert half.optimizer.learning_rate == pytest.approx(1e-4)
    assert half.iterations == 180_000
    assert half.schedule.warmup_iterations == 2000
    assert (half.evaluation.period, half.evaluation.start) == (5000, 130_000)
    assert (half.checkpoints.period, half.checkpoints.keep_every) == (2000, 10_000)
    assert half.log.period == 20
    assert half.replicas == 4


@given(replicas=st.integers(1, 64), first=st.integers(1, 64))
def test_scaling_is_told_once(replicas, first):
    scaled = scale_training(PUBLISHED, replicas)
    assert scale_training(scaled, replicas) == scaled
    assert scaled.iterations * replicas == pytest.approx(720_000, rel=1e-3)
    assert scaled.optimizer.learning_rate / replicas == pytest.approx(2e-4 / 8)


def test_none_leaves_every_number():
    fixed = dataclasses.replace(PUBLISHED, scaling="none")
    assert scale_training(fixed, 2) == dataclasses.replace(fixed, replicas=2)


def test_small_numbers_stay_valid():
    tiny = TrainingConfig(
        iterations=3,
        replicas=1,
        schedule=ScheduleConfig(warmup_iterations=1),
        checkpoints=CheckpointConfig(period=1),
    )
    scaled = scale_training(tiny, 64)
    assert scaled.iterations == 1
    assert scaled.checkpoints.period == 1
    assert scaled.schedule.warmup_iterations == 0

"""Where a run keeps what is needed to look at it, to go on with it and to repeat it.

::

    RUN/
    ├── config.yaml          the resolved configuration; `proxydet train --config` repeats the run
    ├── vocabulary.npz       class names, text embeddings and base classes of the training
    ├── text_encoder.json    what embeds other class names, where the data came with an encoder of its own
    ├── environment.json     machine and packages
    ├── manifest.json        digests of data, vocabulary and starting weights, versions, seeds
    ├── metrics.jsonl        one record every few steps
    ├── evaluations.jsonl    one record an evaluation
    ├── tensorboard/
    ├── checkpoints/         step_XXXXXXX.pth
    ├── evaluations/         predictions and report of each evaluation
    ├── plots/               losses and metrics over the iterations
    ├── failures/            batches whose loss was not finite
    ├── logs/                what each process wrote
    └── model_final.pth      the weights after the last step
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Names of the files in a run folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def vocabulary(self) -> Path:
        """The training vocabulary."""
        return self.root / "vocabulary.npz"

    @property
    def text_encoder(self) -> Path:
        """The text encoder that the data came with, where it is a file."""
        return self.root / "text_encoder.json"

    @property
    def environment(self) -> Path:
        """The environment report."""
        return self.root / "environment.json"

    @property
    def manifest(self) -> Path:
        """Digests, versions and seeds."""
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        """The course of the losses."""
        return self.root / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """The course of the evaluation metrics."""
        return self.root / "evaluations.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Training checkpoints."""
        return self.root / "checkpoints"

    @property
    def plots(self) -> Path:
        """Losses and metrics over the iterations."""
        return self.root / "plots"

    @property
    def failures(self) -> Path:
        """Records of batches whose loss was not finite."""
        return self.root / "failures"

    @property
    def logs(self) -> Path:
        """Logs of the processes."""
        return self.root / "logs"

    @property
    def final_weights(self) -> Path:
        """The weights after the last step."""
        return self.root / "model_final.pth"

    def evaluation(self, iteration: int) -> Path:
        """Return the folder for the predictions and the report of one evaluation during training."""
        return self.root / "evaluations" / f"step_{iteration:07d}"

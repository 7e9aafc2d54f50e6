"""What happens when a loss is not finite."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from proxydet.errors import NumericsError
from proxydet.training.config import GuardConfig
from proxydet.training.distributed import DistInfo, gather_over_ranks

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops the run, or skips the step, when a loss is NaN or infinite; writes down which batch it was.

    Args:
        config: Whether to stop or skip, and how often.
        ranks: This process.
        folder: Where the record of the batch goes.
    """

    def __init__(self, config: GuardConfig, ranks: DistInfo, folder: Path) -> None:
        self._config = config
        self._ranks = ranks
        self._folder = folder
        self.skipped = 0
        """Steps skipped so far, over the whole run; the caller sets it when a run goes on."""

    def refuses(
        self,
        losses: dict[str, float],
        local: torch.Tensor,
        batches: Sequence[Any],
        iteration: int,
    ) -> bool:
        """Say whether the step must be skipped.

        Args:
            losses: Means over the processes; not finite if they are on one of them. In the order of ``local``.
            local: The losses of this process.
            batches: The batches of this process.
            iteration: Steps taken before this one.

        Returns:
            True to skip the step; the same on every process.

        Raises:
            NumericsError: The run must stop; says which loss, which process and which images.
        """
        if all(math.isfinite(value) for value in losses.values()):
            return False
        message, record, rank = self._describe(list(losses), local, batches, iteration)
        if self._config.non_finite == "skip" and self.skipped < self._config.max_skipped:
            self.skipped += 1
            logger.warning("%s Skipping this step (%d so far).", message, self.skipped)
            return True
        raise NumericsError(
            f"{message} The weights are as they were before this step; no checkpoint was touched.",
            hint=f"{record} lists the images. {self._advice()}",
            path=record,
            rank=rank if self._ranks.world_size > 1 else None,
        )

    def _advice(self) -> str:
        if self._config.non_finite == "skip":
            return (
                f"{self.skipped} steps were skipped, as many as training.guards.max_skipped allows: the weights have most "
                "likely diverged. Go back to an earlier checkpoint (--resume FILE), or start anew, with a lower "
                "training.optimizer.learning_rate."
            )
        return (
            "Look at their annotations, lower training.optimizer.learning_rate, or go on with "
            "--set training.guards.non_finite=skip."
        )

    def _describe(
        self, names: list[str], local: torch.Tensor, batches: Sequence[Any], iteration: int
    ) -> tuple[str, Path, int]:
        """Write down all processes' batches; say in words what is not finite on which process, where, and the first such."""
        image_ids = [list(batch.image_ids) for batch in batches]
        by_rank = [values.tolist() for values in gather_over_ranks(local, self._ranks)]
        ids_by_rank: list[Any] = [image_ids] * self._ranks.world_size
        if self._ranks.world_size > 1:
            dist.all_gather_object(ids_by_rank, image_ids)
        found = []
        for rank, (values, ids) in enumerate(zip(by_rank, ids_by_rank, strict=True)):
            bad = {n: v for n, v in zip(names, values, strict=True) if not math.isfinite(v)}
            if bad:
                found.append(
                    {"rank": rank, "losses": {n: str(v) for n, v in bad.items()}, "images": ids}
                )
        path = self._folder / f"step_{iteration:07d}.json"
        if self._ranks.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
            record = {"iteration": iteration, "not_finite": found, "batches_by_rank": ids_by_rank}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        several = self._ranks.world_size > 1
        parts = [
            _in_words(item["losses"])
            + (f" in process {item['rank']}" if several else "")
            + f" on images {_flat(item['images'])}"
            for item in found
        ]
        return f"At iteration {iteration}, {'; '.join(parts)}.", path, found[0]["rank"]


def _in_words(losses: dict[str, str]) -> str:
    """Say which losses have which value: ``loss_a and loss_b are nan``."""
    names: dict[str, list[str]] = {}
    for name, value in losses.items():
        names.setdefault(value, []).append(name)
    return ", ".join(
        f"{' and '.join(group)} {'are' if len(group) > 1 else 'is'} {value}"
        for value, group in names.items()
    )


def _flat(groups: list[list[Any]]) -> str:
    return ", ".join(str(item) for group in groups for item in group)

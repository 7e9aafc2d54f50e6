"""All losses of a batch, under the same names whatever the batch holds.

Dimensions: B images, R regions of an image, C classes, D embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxydet.losses.centernet import centernet_losses, silent_centernet_losses
from proxydet.losses.classification import box_loss, choose_categories, federated_loss
from proxydet.losses.config import LossConfig
from proxydet.losses.image_labels import image_label_loss, image_label_targets
from proxydet.losses.masks import mask_loss
from proxydet.losses.mixup import class_wise_mixup_loss
from proxydet.modeling.outputs import (
    BoxTrainingOutput,
    ImageLabelTrainingOutput,
    StepOutput,
    TrainingOutput,
)


class Criterion:
    """Computes the losses.

    Args:
        config: Weights and settings.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def __call__(
        self, output: TrainingOutput, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return every loss, weighted; their sum is what training minimises.

        Args:
            output: What the network returned for a batch.
            generator: Source of the random choices (federated classes, mixing); None is torch's global one.

        Returns:
            The published names; those that the batch has no say in are 0. In a distributed training, every process must
            call this once a step.

        Raises:
            ConfigError: The size ranges do not fit the network's levels.
        """
        if isinstance(output, BoxTrainingOutput):
            return self._box_losses(output, generator)
        return self._image_label_losses(output)

    def _box_losses(
        self, output: BoxTrainingOutput, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        zero = output.steps[0].deltas_BR4.new_zeros(())
        for index, step in enumerate(output.steps):
            losses.update(self._step_losses(index, step, output, generator))
            losses[f"image_loss_stage{index}"] = zero
        mixup_name = f"cmm_loss_stage{len(output.steps) - 1}"
        if output.mixup is None:
            losses[mixup_name] = zero
        else:
            losses[mixup_name] = class_wise_mixup_loss(
                output.mixup, output.table.text_DC1, self.config.mixup, generator=generator
            )
        masks = zero if output.masks is None else mask_loss(output.masks, output.truth)
        losses["loss_mask"] = self.config.mask_weight * masks
        losses.update(centernet_losses(output.centernet, output.truth, self.config.centernet))
        return losses

    def _step_losses(
        self,
        index: int,
        step: StepOutput,
        output: BoxTrainingOutput,
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        config, table = self.config.classification, output.table
        labels_N = step.assignment.labels_BR.flatten()
        columns_K, weights_K = choose_categories(
            labels_N,
            table.frequency_C,
            sampled=config.sampled_categories,
            objects=sum(output.truth.counts),
            generator=generator,
        )
        # Only the looked-at classes are ever multiplied out.
        embeddings_ND = step.embeddings_BRD.flatten(0, 1)
        logits_NK = (table.temperature * embeddings_ND) @ table.text_DC1[:, columns_K]
        if step.bias is not None:
            logits_NK = logits_NK + step.bias
        boxes = box_loss(
            step.deltas_BR4.flatten(0, 1),
            step.regions.boxes_BR4.flatten(0, 1),
            step.targets_BR4.flatten(0, 1),
            labels_N,
            classes=table.classes,
            delta_weights=step.delta_weights,
        )
        classes = federated_loss(logits_NK, labels_N, columns_K, weights_K)
        return {
            f"loss_cls_stage{index}": config.weight * classes,
            f"loss_box_reg_stage{index}": config.box_weight * boxes,
        }

    def _image_label_losses(self, output: ImageLabelTrainingOutput) -> dict[str, Tensor]:
        config, table = self.config.image_labels, output.table
        losses: dict[str, Tensor] = {}
        zero = table.text_DC1.new_zeros(())
        text_DC = table.text_DC1 if config.background_column else table.text_DC1[:, :-1]
        targets_BC = image_label_targets(output.labels, text_DC.shape[1])
        for index, step in enumerate(output.steps):
            losses[f"loss_cls_stage{index}"] = zero
            losses[f"loss_box_reg_stage{index}"] = zero
            losses[f"image_loss_stage{index}"] = config.weight * image_label_loss(
                step, targets_BC, text_DC, table.temperature
            )
        losses[f"cmm_loss_stage{len(output.steps) - 1}"] = zero
        losses["loss_mask"] = zero
        losses.update(silent_centernet_losses(output.centernet))
        return losses

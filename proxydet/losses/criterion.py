"""All losses of a batch, under the same names whatever the batch holds.

Dimensions: B images, R regions of an image, C classes, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from proxydet.errors import ConfigError
from proxydet.extensions import build_extension, extension_errors, require_signature
from proxydet.losses.config import DistillationLossConfig, LossConfig, MixupLossConfig
from proxydet.modeling.boxes import Weights, constant, deltas_between, image_of_each
from proxydet.modeling.centernet import centernet_losses, zero_centernet_losses
from proxydet.modeling.roi_heads import (
    BatchObjects,
    BoxTrainingOutput,
    ImageLabelTrainingOutput,
    ImageStepOutput,
    MaskOutput,
    MixupOutput,
    StepOutput,
    TrainingOutput,
    crop_masks,
)


def class_prototypes(output: MixupOutput, config: MixupLossConfig) -> tuple[Tensor, Tensor]:
    """Return the visual prototype of each class in the batch.

    Args:
        output: Regions that stand for an object.
        config: How regions are weighed.

    Returns:
        Normalised prototypes (K, D) and their classes (K,), ascending.
    """
    of_class_KP = output.classes_K[:, None] == output.labels_P
    scores_P = output.objectness_P / config.temperature
    if config.prototype == "center":
        scores_P = torch.zeros_like(scores_P)
    # One softmax a row over the regions of that class; as a product of matrices it adds in a fixed order.
    weights_KP = (
        scores_P.expand_as(of_class_KP).masked_fill(~of_class_KP, -torch.inf).softmax(dim=1)
    )
    return functional.normalize(weights_KP @ output.embeddings_PD, dim=1), output.classes_K


def sample_mixing_ratio(beta: float, generator: torch.Generator | None) -> float:
    """Sample from Beta(beta, beta); 0 stands for its limit, 0 or 1 with equal chance."""
    # torch has no Beta sampling with a generator of one's own; its generator seeds numpy's.
    if generator is None or generator.device.type == "cpu":
        seed = int(torch.randint(2**62, (1,), generator=generator).item())
    else:  # what it draws would have to be waited for; its state is known here
        seed = int.from_bytes(generator.get_state().numpy().tobytes(), "little")
    source = np.random.default_rng(seed)
    return float(source.integers(2)) if beta == 0 else float(source.beta(beta, beta))


def mixup_loss(
    prototypes_KD: Tensor,
    texts_KD: Tensor,
    permutation_K: Tensor,
    ratio: float,
    distance: str,
) -> Tensor:
    """Return the distance of mixed prototypes and equally mixed text embeddings.

    Args:
        prototypes_KD: Normalised visual prototypes.
        texts_KD: Normalised text embeddings of the same classes.
        permutation_K: Which class each one is mixed with.
        ratio: Share of the class itself, in [0, 1].
        distance: ``"l1"``, the mean absolute difference, or ``"l2"``, the mean squared one.
    """
    mixed_KD, mixed_text_KD = (
        functional.normalize(ratio * rows_KD + (1 - ratio) * rows_KD[permutation_K], dim=1)
        for rows_KD in (prototypes_KD, texts_KD)
    )
    if distance == "l1":
        return functional.l1_loss(mixed_KD, mixed_text_KD)
    return functional.mse_loss(mixed_KD, mixed_text_KD)


def class_wise_mixup_loss(
    output: MixupOutput,
    text_DC1: Tensor,
    config: MixupLossConfig,
    *,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the weighted loss of a batch; a zero connected to the branch where no region stands for an object.

    Args:
        output: Regions that stand for an object.
        text_DC1: Normalised text embeddings, a column each.
        config: Weight and variant.
        generator: Source of the mixing ratio and the pairing; None is torch's global one.
    """
    ratio = sample_mixing_ratio(config.beta, generator)
    if len(output.labels_P) == 0:
        return output.embeddings_PD.sum() * 0
    prototypes_KD, classes_K = class_prototypes(output, config)
    device = "cpu" if generator is None else generator.device
    permutation_K = torch.randperm(len(classes_K), generator=generator, device=device)
    loss = mixup_loss(
        prototypes_KD,
        text_DC1.T[classes_K],
        permutation_K.to(classes_K.device, non_blocking=True),
        ratio,
        config.distance,
    )
    return config.weight * loss


def mask_targets(output: MaskOutput, truth: BatchObjects) -> Tensor:
    """Return each region's object cut out by its box and resized to the mask's size: float32 (P, S, S), 0 or 1.

    Polygons are rasterized on the CPU; usually a thread has begun with it when the regions were chosen. The host waits for that
    thread, and until CUDA has staged the copy from pageable memory.
    """
    if output.targets_PSS is not None:
        return output.targets_PSS.result().to(output.logits_PSS.device, non_blocking=True)
    rows_P6 = torch.cat(
        [output.boxes_P4, output.image_P[:, None], output.object_P[:, None]], dim=1
    ).cpu()
    return crop_masks(rows_P6, truth.masks, output.logits_PSS.shape[-1], output.logits_PSS.device)


def mask_loss(output: MaskOutput, truth: BatchObjects) -> Tensor:
    """Return the mean binary cross-entropy over all cells; a zero connected to the head where there is no region."""
    if len(output.logits_PSS) == 0:
        return output.logits_PSS.sum() * 0
    return functional.binary_cross_entropy_with_logits(
        output.logits_PSS, mask_targets(output, truth)
    )


def image_label_targets(labels: tuple[Tensor, ...], columns: int) -> Tensor:
    """Return 1 at the classes of each image and 0 elsewhere: (B, columns).

    Args:
        labels: Classes of each image, int64 (L,).
        columns: C, or C + 1 with a background column.
    """
    targets = torch.zeros(len(labels), columns, device=labels[0].device)
    image_L = image_of_each([len(classes_L) for classes_L in labels], targets.device)
    targets[image_L, torch.cat(labels)] = 1.0
    return targets


def image_label_loss(
    step: ImageStepOutput, targets_BC: Tensor, text_DC: Tensor, temperature: float
) -> Tensor:
    """Return sigmoid cross-entropy summed over the classes, averaged over the images.

    Args:
        step: Embedding of the region that stands for each image.
        targets_BC: From `image_label_targets`.
        text_DC: Normalised text embeddings, a column each; with a zero column for the background where it counts.
        temperature: Factor from cosine to logit.
    """
    logits_BC = (temperature * step.embeddings_BD) @ text_DC
    if step.bias is not None:
        logits_BC = logits_BC + step.bias
    losses_BC = functional.binary_cross_entropy_with_logits(logits_BC, targets_BC, reduction="none")
    return (losses_BC * step.valid_B[:, None]).sum() / len(targets_BC)


def choose_categories(
    labels_N: Tensor,
    frequency_C: Tensor,
    *,
    sampled: int,
    objects: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Choose the classes that a step's loss counts: those that appear, and others sampled by frequency.

    The background counts as one of the sampled classes where it appears, but is never counted. Sampling without
    replacement is a race of exponential clocks (Efraimidis and Spirakis 2006), so that it needs no answer from the
    device: the columns always number ``max(sampled, objects + 1)``, and those that are one too many weigh 0.

    Args:
        labels_N: Labels of the step's regions.
        frequency_C: Weights of the sampling, not negative.
        sampled: Classes to count, the background included; 0 counts all.
        objects: Objects of the batch: an upper bound of the classes that appear, background aside.
        generator: Source of randomness; None is torch's global one.

    Returns:
        Columns int64 (K,) in [0, C), and their weight (K,), 0 or 1.
    """
    classes = len(frequency_C)
    columns = torch.arange(classes, device=labels_N.device)
    if sampled == 0:
        return columns, torch.ones_like(frequency_C)
    appears = torch.zeros(classes + 2, dtype=torch.bool, device=labels_N.device)
    appears[labels_N] = True  # -1 is the last entry, the background the one before it
    device = labels_N.device if generator is None else generator.device
    clocks_C = torch.empty(classes, device=device).exponential_(generator=generator)
    speed_C = frequency_C / clocks_C.to(labels_N.device, non_blocking=True)
    priority_C = torch.where(appears[:classes], torch.inf, speed_C)
    target = min(max(sampled, objects + 1), classes)
    top_K, columns_K = priority_C.topk(target)
    room = sampled - appears[classes].long()
    place_K = torch.arange(target, device=labels_N.device)
    weights_K = appears[columns_K] | ((place_K < room) & (top_K > 0))
    return columns_K, weights_K.to(frequency_C.dtype)


def federated_loss(
    logits_NK: Tensor, labels_N: Tensor, columns_K: Tensor, weights_K: Tensor
) -> Tensor:
    """Return sigmoid cross-entropy summed over the looked-at classes, divided by the number of regions.

    Args:
        logits_NK: Logits of the looked-at classes only.
        labels_N: Labels.
        columns_K: The class of each column.
        weights_K: Weight of each column.
    """
    valid_N = labels_N >= 0
    targets_NK = (labels_N[:, None] == columns_K).to(logits_NK.dtype)
    losses_NK = functional.binary_cross_entropy_with_logits(logits_NK, targets_NK, reduction="none")
    weighted_NK = losses_NK * weights_K * valid_N[:, None]
    return weighted_NK.sum() / valid_N.sum().clamp(min=1)


def box_loss(
    deltas_N4: Tensor,
    boxes_N4: Tensor,
    targets_N4: Tensor,
    labels_N: Tensor,
    *,
    classes: int,
    delta_weights: Weights,
) -> Tensor:
    """Return the L1 loss of the box changes of regions that stand for an object, divided by the number of regions.

    Args:
        deltas_N4: Predicted changes.
        boxes_N4: The regions.
        targets_N4: The box of each region's object.
        labels_N: Labels.
        classes: C.
        delta_weights: Scale of the changes.
    """
    valid_N = labels_N >= 0
    positive_N1 = (valid_N & (labels_N < classes))[:, None]
    # Other rows may have empty boxes, whose changes are not finite: they are replaced before, not masked after.
    unit_4 = constant((0.0, 0.0, 1.0, 1.0), boxes_N4.device)
    wanted_N4 = deltas_between(
        torch.where(positive_N1, boxes_N4, unit_4),
        torch.where(positive_N1, targets_N4, unit_4),
        delta_weights,
    )
    differences_N4 = (deltas_N4 - wanted_N4).abs() * positive_N1
    return differences_N4.sum() / valid_N.sum().clamp(min=1)


def distillation_loss(step: StepOutput, classes: int, config: DistillationLossConfig) -> Tensor:
    """Return how far embeddings and box changes of regions without an object are from the reference's, weighted.

    A form of learning without forgetting (Li and Hoiem 2016, arXiv 1606.09282) on region embeddings: what is kept does not
    depend on a list of classes.

    Args:
        step: One step, with its reference.
        classes: C, the label of regions without an object.
        config: Weights.

    Returns:
        A sum over those regions, divided by the number of all valid ones.

    Raises:
        ConfigError: The step has no reference: training does not start from weights.
    """
    if step.reference is None:
        raise ConfigError(
            "losses.distillation.weight is above 0, and there are no starting weights to keep.",
            hint="set training.weights, or losses.distillation.weight=0",
        )
    labels_BR = step.assignment.labels_BR
    cosines_BR = (step.embeddings_BRD * step.reference.embeddings_BRD).sum(dim=2)
    changes_BR = (step.deltas_BR4 - step.reference.deltas_BR4).abs().sum(dim=2)
    apart_BR = (1 - cosines_BR) + config.box_weight * changes_BR
    chosen_BR = (labels_BR == classes).to(apart_BR.dtype)
    return config.weight * (apart_BR * chosen_BR).sum() / (labels_BR >= 0).sum().clamp(min=1)


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
            if self.config.distillation.weight > 0:
                losses[f"distillation_loss_stage{index}"] = distillation_loss(
                    step, output.table.classes, self.config.distillation
                )
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
            if self.config.distillation.weight > 0:
                losses[f"distillation_loss_stage{index}"] = zero
            losses[f"image_loss_stage{index}"] = config.weight * image_label_loss(
                step, targets_BC, text_DC, table.temperature
            )
        losses[f"cmm_loss_stage{len(output.steps) - 1}"] = zero
        losses["loss_mask"] = zero
        losses.update(zero_centernet_losses(output.zero))
        return losses


Losses = dict[str, Tensor]
"""Loss name to scalar tensor; the same names for every kind of batch on every rank."""


def build_criterion(config: LossConfig) -> Callable[..., Losses]:
    """Return what computes the losses: `Criterion`, or what ``losses.criterion`` names.

    Raises:
        ConfigError: That does not import, cannot be made with a `LossConfig` and the options, or cannot be called as
            `Criterion` is. Called, it raises one where the losses are not scalar tensors by name, or have other names than
            before or on another process.
    """
    path, key = config.criterion, "losses.criterion"
    if path is None:
        return Criterion(config)
    own = build_extension(path, key, config.options, config=config)
    require_signature(own, key, path, "generator", positional=1)
    if isinstance(own, nn.Module) and any(p.requires_grad for p in own.parameters()):
        raise ConfigError(
            f"{key} is {path}, which has parameters; only those of the network are trained.",
            hint="put what is to be trained into a network part: model.backbone.kind or model.cascade.box_head",
        )
    names: list[str] = []

    def criterion(output: TrainingOutput, *, generator: torch.Generator | None = None) -> Losses:
        with extension_errors(f"{key} is {path}: calling it"):
            losses: Losses = own(output, generator=generator)
        scalars = isinstance(losses, dict) and all(
            isinstance(name, str) and isinstance(loss, Tensor) and loss.ndim == 0
            for name, loss in losses.items()
        )
        if not scalars or not losses:
            got = (
                {name: tuple(getattr(loss, "shape", ())) for name, loss in losses.items()}
                if isinstance(losses, dict)
                else type(losses).__name__
            )
            raise ConfigError(
                f"{key} is {path}, which must return a dict of scalar tensors by name; it returned {str(got)[:200]}.",
                hint="take the mean or the sum of each loss",
            )
        everywhere: list[list[str]] = [sorted(losses)]
        if not names and dist.is_initialized():
            everywhere *= dist.get_world_size()
            dist.all_gather_object(everywhere, sorted(losses))
        before = names or everywhere[0]
        other = next((found for found in [*everywhere, sorted(losses)] if found != before), None)
        if other is not None:
            raise ConfigError(
                f"{key} is {path}, which returned losses of other names for one batch than for another: "
                f"{', '.join(sorted({*before} ^ {*other}))} are not in both.",
                hint="return every loss for box batches and for image-label batches; a zero where a batch has none",
            )
        names[:] = before
        return losses

    return criterion

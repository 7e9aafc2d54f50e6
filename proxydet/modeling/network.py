"""The detector: backbone, proposals, second stage.

Dimensions: B images, C classes, D embedding, P proposals, M masks, S side of a mask.
"""

from __future__ import annotations

import copy
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence

from proxydet.errors import ConfigError, DataError, VocabularyError
from proxydet.modeling.backbone import build_backbone, pixel_statistics
from proxydet.modeling.boxes import Regions, keep_best
from proxydet.modeling.centernet import CenterNet, zero_with_gradient
from proxydet.modeling.config import InferenceConfig, ModelConfig, Precision, ProposalConfig
from proxydet.modeling.postprocess import (
    ClassText,
    Prediction,
    assemble_predictions,
    detect_classes,
)
from proxydet.modeling.precision import HALF_TYPES, compute_in, heads_in
from proxydet.modeling.roi_heads import (
    BatchObjects,
    BoxTrainingOutput,
    FeatureBatch,
    ImageLabelTrainingOutput,
    RegionEmbeddings,
    RoiHeads,
    TrainingClasses,
    TrainingOutput,
    ZeroShotClassifier,
    box_steps,
    image_label_steps,
    mask_step,
    masked_regions,
    sample_regions,
    with_reference,
)
from proxydet.runtime.torch_probe import half_speed
from proxydet.vocabulary.vocabulary import Vocabulary

if TYPE_CHECKING:
    from proxydet.data.loader import Batch, BoxBatch, ImageLabelBatch


def text_with_background(vocabulary: Vocabulary) -> Tensor:
    """Return normalised text embeddings, a column each, and a zero column for the background last: (D, C + 1)."""
    text_DC = torch.tensor(vocabulary.normalised()).T
    return torch.cat([text_DC, text_DC.new_zeros(len(text_DC), 1)], dim=1).contiguous()


def sampling_weights(
    config: ModelConfig,
    vocabulary: Vocabulary,
    image_counts: np.ndarray[tuple[int], np.dtype[np.generic]] | None,
) -> Tensor:
    """Return with which weight the federated loss samples each class: (C,), the image counts to the configured power.

    Args:
        config: Holds the power.
        vocabulary: The classes.
        image_counts: (C,) training images of each class; None weighs all alike.

    Raises:
        ConfigError: The counts do not fit the vocabulary, or one is negative.
    """
    if image_counts is None:
        return torch.ones(len(vocabulary))
    counts_C = torch.as_tensor(np.asarray(image_counts), dtype=torch.float32)
    if counts_C.shape != (len(vocabulary),) or not bool((counts_C >= 0).all()):
        raise ConfigError(
            f"image counts of shape {tuple(counts_C.shape)} do not fit {len(vocabulary)} classes",
            hint="give one count, 0 or more, for each class of the training vocabulary",
        )
    return counts_C**config.classifier.frequency_power


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Normalised images, padded to one size with zeros at the right and the bottom.

    Attributes:
        pixels_B3HW: The images.
        sizes: Height and width of each, without padding.
        sizes_B2: The same as a tensor, on the device of the images.
    """

    pixels_B3HW: Tensor
    sizes: tuple[tuple[int, int], ...]
    sizes_B2: Tensor

    def channels_last(self) -> ImageBatch:
        """Return the same images with their channels innermost in memory."""
        return replace(
            self, pixels_B3HW=self.pixels_B3HW.contiguous(memory_format=torch.channels_last)
        )


def padded_size(height: int, width: int, divisor: int) -> tuple[int, int]:
    """Return the size rounded up to multiples of ``divisor``."""
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def check_images(images: Sequence[Tensor]) -> None:
    """Check that every image is (3, H, W) with pixels.

    Raises:
        DataError: One is not; the message says which.
    """
    for position, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise DataError(
                f"image {position} has the shape {tuple(image.shape)}, not (3, height, width)",
                hint="give RGB images, channels first",
            )


def stack_images(
    images: Sequence[Tensor], mean_311: Tensor, std_311: Tensor, divisor: int
) -> ImageBatch:
    """Normalise images and put them into one tensor.

    Args:
        images: (3, H, W) RGB, uint8 or float in [0, 255].
        mean_311: Subtracted from the values.
        std_311: Then they are divided by this.
        divisor: The padded size is a multiple of this.
    """
    sizes = tuple((int(image.shape[1]), int(image.shape[2])) for image in images)
    height, width = padded_size(max(h for h, _ in sizes), max(w for _, w in sizes), divisor)
    device = mean_311.device
    pixels_B3HW = torch.zeros(len(images), 3, height, width, device=device)
    # In one piece where all have one size.
    pieces = [torch.stack(list(images))] if len(set(sizes)) == 1 else [i[None] for i in images]
    position = 0
    for piece in pieces:
        moved = piece.to(device, non_blocking=True)
        own = pixels_B3HW[position : position + len(piece), :, : piece.shape[2], : piece.shape[3]]
        torch.div(moved - mean_311, std_311, out=own)
        position += len(piece)
    sizes_B2 = torch.tensor(sizes, dtype=torch.float32).to(device, non_blocking=True)
    return ImageBatch(pixels_B3HW=pixels_B3HW, sizes=sizes, sizes_B2=sizes_B2)


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """An image as the network is given it.

    Attributes:
        image: (3, h, w) RGB, uint8 or float in [0, 255]: resized, and mirrored where ``mirrored`` says so.
        mirrored: Whether left and right are exchanged.
    """

    image: Tensor
    mirrored: bool = False


Format = Literal["fp32", "bf16", "fp16"]
"""Of the products of the network in inference."""


class ProxyDetNetwork(nn.Module):
    """ProxyDet (Jeong et al. 2024, arXiv 2312.07266).

    In training, call it with a batch; in inference, use `detect`. A vocabulary is an argument of `detect` and leaves no
    trace in the network, so threads may share one.

    Args:
        config: Sizes.
        vocabulary: The training classes; their text embeddings become part of the state dict.
        image_counts: (C,) training images of each class, which weigh the federated loss's sampling; None weighs all alike.

    Raises:
        VocabularyError: The embeddings have another dimension than the configuration says, or the classes are not plain text.
        ConfigError: The image counts do not fit the vocabulary.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    base_C: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        image_counts: np.ndarray[tuple[int], np.dtype[np.generic]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        vocabulary.require_plain()
        self._check_dimension(vocabulary)
        self.backbone = build_backbone(config.backbone, config.pyramid)
        self.proposal_generator = CenterNet(
            config.proposals, config.pyramid.channels, config.pyramid.strides
        )
        self.roi_heads = RoiHeads(
            config,
            text_with_background(vocabulary),
            sampling_weights(config, vocabulary, image_counts),
        )
        # Not part of the published state dict, hence not persistent.
        for name, values in zip(("pixel_mean", "pixel_std"), pixel_statistics(config), strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.register_buffer("base_C", torch.from_numpy(vocabulary.base.copy()), persistent=False)
        # In a tuple, it is not a part of the network: not of its state, nor of what is trained.
        self._reference: tuple[ProxyDetNetwork, ...] = ()
        self.backbone_precision: Precision = "fp32"
        """Of the products of backbone and pyramid in training; inference has that of its settings, for all parts."""
        self.heads_precision: Precision = "fp32"
        """Of the products of proposal tower, box heads and mask head in training."""
        # The vocabulary that was detected last stays on the device, as most calls have the same.
        self._last_classes: tuple[tuple[Vocabulary, torch.device, ClassText], ...] = ()
        self.is_prepared = False
        """Whether it is a copy that `prepared` made."""

    @property
    def has_mask_head(self) -> bool:
        """Whether it can predict masks; a detector of boxes cannot."""
        return self.config.masks is not None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.pixel_mean.device

    # -- training --------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> TrainingOutput:
        """Same as `forward_train`; this is what a wrapper for distributed training calls."""
        return self.forward_train(batch, generator=generator)

    def keep_reference(self, values: Mapping[str, Tensor]) -> None:
        """Let `forward_train` also return what other weights predict of the regions of box batches.

        Args:
            values: By name, what of the state dict is otherwise in those weights.
        """
        other = copy.deepcopy(self).eval().requires_grad_(False)
        other.load_state_dict(dict(values), strict=False)
        self._reference = (other,)

    def forward_train(
        self, batch: Batch, *, generator: torch.Generator | None = None
    ) -> TrainingOutput:
        """Run the network on a batch and return what the losses need.

        Args:
            batch: Images with objects, or images with classes.
            generator: Source of the random choice of regions; None is torch's global one.
        """
        check_images(batch.images)
        images = self._stack(batch.images)
        features = self._features(images, self.backbone_precision)
        with heads_in(self.heads_precision):
            if batch.kind == "boxes":
                return self._train_boxes(batch, images, features, generator)
            return self._train_image_labels(batch, images, features)

    def _train_boxes(
        self,
        batch: BoxBatch,
        images: ImageBatch,
        features: dict[str, Tensor],
        generator: torch.Generator | None,
    ) -> BoxTrainingOutput:
        truth = BatchObjects.from_instances(batch.instances, self.device)
        centernet = self.proposal_generator(list(features.values()))
        regions = self.proposal_generator.propose(centernet)
        pooled_maps = self._feature_batch(features, images)
        classes = len(self.vocabulary)
        regions, assignment = sample_regions(
            self.config.cascade, regions, truth, classes, generator
        )
        masked = None
        if self.has_mask_head and any(image_masks is not None for image_masks in truth.masks):
            masked = masked_regions(self.roi_heads, regions, assignment, truth, classes)
        steps, mixup = box_steps(
            self.roi_heads, pooled_maps, regions, assignment, truth, classes=classes
        )
        for other in self._reference:
            maps = pooled_maps
            if any(p.requires_grad for p in self.backbone.parameters()):
                with torch.no_grad():
                    seen = other._features(images, self.backbone_precision)
                    maps = other._feature_batch(seen, images)
            steps = with_reference(steps, other.roi_heads, maps)
        return BoxTrainingOutput(
            centernet=centernet,
            truth=truth,
            steps=steps,
            mixup=mixup,
            masks=None if masked is None else mask_step(self.roi_heads, pooled_maps, masked),
            table=self.class_table(),
        )

    def _train_image_labels(
        self, batch: ImageLabelBatch, images: ImageBatch, features: dict[str, Tensor]
    ) -> ImageLabelTrainingOutput:
        # No loss of this batch trains the proposal network. The published code gives it a gradient of 0 all the same, by
        # which the optimiser moves it on; here that does not go back through the head and the maps that only it reads.
        with torch.no_grad():
            centernet = self.proposal_generator(list(features.values()))
        pooled = {f"p{level}" for level in self.config.cascade.pool_levels}
        proposing = list(features)[-len(self.proposal_generator.strides) :]
        silent = [
            *self.proposal_generator.parameters(),
            *(features[name] for name in proposing if name not in pooled),
        ]
        counts = [len(labels_L) for labels_L in batch.labels]
        moved = torch.cat(list(batch.labels)).to(self.device, non_blocking=True)  # in one piece
        cascade = self.config.cascade
        keep = min(cascade.image_label_proposals, self.config.proposals.keep_train)
        regions = self.proposal_generator.propose(centernet, keep=keep)
        return ImageLabelTrainingOutput(
            centernet=centernet,
            zero=zero_with_gradient(silent),
            labels=moved.split(counts),
            steps=image_label_steps(self.roi_heads, self._feature_batch(features, images), regions),
            table=self.class_table(),
        )

    def class_table(self) -> TrainingClasses:
        """Return the training classes as the losses need them."""
        return TrainingClasses(
            text_DC1=self.roi_heads.detection.classifier(0).zs_weight,
            frequency_C=self.roi_heads.frequency_C,
            temperature=self.config.classifier.temperature,
        )

    # -- inference -------------------------------------------------------------------------------------------------

    def for_inference(self, device: torch.device) -> ProxyDetNetwork:
        """Move the network to a device and lay out its weights for `detect`; values stay as they are.

        Not for a network that is trained on: training in another layout rounds otherwise.
        """
        self.to(device).eval()
        if device.type == "cpu":
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    # As the maps that `detect` gives them; each convolution would reorder its weights again.
                    module.to(memory_format=torch.channels_last)
        return self

    def prepared(self, precision: str = "fp32") -> ProxyDetNetwork:
        """Return a copy that only runs `detect`, faster: norms folded into the convolutions before them, weights converted once.

        This network stays as it is, and so do its state dict and what is trained or exported of it. The copy shares the
        weights that are the same, follows no later change of the others, and refuses to be trained or saved.

        Args:
            precision: The number format that it is run in: that of the settings that `detect` is given.

        Raises:
            ConfigError: The device has no units for it.
        """
        used = usable_precision(precision, self.device)
        shared = [*self.parameters(), *self.buffers(), self.vocabulary]
        memo: dict[int, Any] = {id(value): value for value in shared}
        memo |= {id(self._reference): (), id(self._last_classes): ()}
        own: ProxyDetNetwork = copy.deepcopy(self, memo)
        own.is_prepared = True
        fold_norms(own.eval().backbone, own.backbone.size_divisibility)
        own.register_state_dict_pre_hook(_refuse_to_save)  # type: ignore[no-untyped-call]
        tower = own.proposal_generator.centernet_head.bbox_tower
        for part in (own.backbone, tower, own.roi_heads):
            for module in part.modules() if used in HALF_TYPES else ():
                # As autocast would in each call; norms stay in float32, as it leaves them.
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    for name, values in module.named_parameters(recurse=False):
                        converted = values.detach().to(HALF_TYPES[used])
                        setattr(module, name, nn.Parameter(converted, requires_grad=False))
        return own

    def train(self, mode: bool = True) -> ProxyDetNetwork:
        """Set training or evaluation mode.

        Raises:
            RuntimeError: Training is asked of a network that is `prepared`.
        """
        if mode and self.is_prepared:
            raise RuntimeError(
                "this network is prepared for inference: train the one it was made of"
            )
        return super().train(mode)

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary | None = None,
        *,
        original_sizes: Sequence[tuple[int, int]] | None = None,
        settings: InferenceConfig | None = None,
    ) -> list[Prediction]:
        """Detect objects.

        Images of the same padded size go through backbone and proposal tower together, and all of them through what
        follows. Padding an image further would change the statistics of GroupNorm, so what is found in an image does not
        depend on the others in the batch.

        Args:
            images: (3, H, W) RGB, uint8 or float in [0, 255], already resized for the network.
            vocabulary: The classes to detect; None takes the training classes.
            original_sizes: Height and width of each image before resizing, for boxes and masks in its pixels; None
                takes the images' own.
            settings: Thresholds, limits and number format; None takes the published ones.

        Returns:
            One `Prediction` an image, in the same order, on the network's device; none for no images.

        Raises:
            DataError: An image has the wrong shape.
            VocabularyError: The vocabulary's embeddings do not fit the network.
            NumericsError: The network gave values that are not finite.
            RuntimeError: The network is in training mode.
        """
        settings, precision = self._checked(images, settings)
        classes = self._class_text(vocabulary)
        sizes = original_sizes or [(image.shape[1], image.shape[2]) for image in images]
        if len(sizes) != len(images):
            raise ValueError(f"{len(images)} images but {len(sizes)} original sizes")
        if not images:
            return []
        with heads_in(precision):
            order, batch, levels = self._by_size(images, precision)
            regions = self.roi_heads.embed(batch, self._proposals(levels))
            found = detect_classes([regions], classes, self.classifiers(), settings)
            masks = settings.masks and self.has_mask_head
            predictions = assemble_predictions(
                found,
                batch,
                [sizes[index] for index in order],
                self.roi_heads.mask_probabilities if masks else None,
            )
        return [predictions[order.index(index)] for index in range(len(images))]

    @torch.inference_mode()
    def embed(
        self,
        images: Sequence[Tensor],
        boxes: Sequence[Tensor] | None = None,
        *,
        settings: InferenceConfig | None = None,
    ) -> RegionEmbeddings:
        """Embed regions: what `detect` scores the classes by, before any class is named.

        `proxydet.modeling.postprocess.detect_classes` makes detections of it, for any vocabulary.

        Args:
            images: As for `detect`, at least one.
            boxes: Boxes (N, 4) of each image, xyxy in its pixels, which all steps pool as they are; the proposal score of
                each is 1. None: the regions that `detect` finds.
            settings: Say the number format; None: fp32.

        Returns:
            Regions of the images in their order, on the network's device, padded to those of the image with the most.

        Raises:
            DataError: An image has the wrong shape.
            RuntimeError: The network is in training mode.
        """
        settings, precision = self._checked(images, settings)
        if boxes is not None and len(boxes) != len(images):
            raise ValueError(f"{len(images)} images but boxes of {len(boxes)}")
        with heads_in(precision):
            order, batch, levels = self._by_size(images, precision)
            if boxes is None:
                regions = self._proposals(levels)
            else:
                own = [boxes[index].to(self.device, torch.float32) for index in order]
                valid_BR = pad_sequence(
                    [torch.ones_like(b[:, 0], dtype=torch.bool) for b in own], True
                )
                regions = Regions(
                    boxes_BR4=pad_sequence(own, True),
                    objectness_BR=valid_BR.float(),
                    valid_BR=valid_BR,
                )
            embedded = self.roi_heads.embed(batch, regions, refine=boxes is None)
        return embedded.choose(torch.tensor(order).argsort().to(self.device))

    def _by_size(
        self, images: Sequence[Tensor], precision: Format
    ) -> tuple[list[int], FeatureBatch, list[list[Tensor]]]:
        """Run the backbone on images, those of one padded size together.

        Returns:
            The place of each image among the given ones; features in this order; the maps of all levels of each size.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            size = padded_size(image.shape[1], image.shape[2], self.backbone.size_divisibility)
            groups.setdefault(size, []).append(index)
        order = [index for group in groups.values() for index in group]
        parts = [
            self._view([images[index] for index in group], precision) for group in groups.values()
        ]
        maps = [own for own, _ in parts]
        place_B = torch.tensor([place for own in groups.values() for place in range(len(own))])
        batch = FeatureBatch(
            features=maps[0].features,
            sizes_B2=torch.cat([own.sizes_B2 for own in maps]),
            further=tuple(own.features for own in maps[1:]),
            place_B=None if len(maps) == 1 else place_B.to(self.device, non_blocking=True),
        )
        return order, batch, [own for _, own in parts]

    def _proposals(self, levels: list[list[Tensor]]) -> Regions:
        # One size is an ordinary call of the module, which hooks on it see.
        generator = self.proposal_generator
        outputs = [generator(*levels)] if len(levels) == 1 else generator.of_sizes(levels)
        return generator.propose(*outputs, check=True)

    @torch.inference_mode()
    def detect_views(
        self,
        views: Sequence[ImageView],
        vocabulary: Vocabulary | None = None,
        *,
        original_size: tuple[int, int],
        settings: InferenceConfig | None = None,
    ) -> Prediction:
        """Detect objects in one image from several views of it: test-time augmentation (TTA).

        All views share one set of regions: the proposals of all views, with one NMS for all. The second stage embeds
        each region in every view; its class scores, its box and its mask are the mean over the views. So a detection
        needs no matching between views, and thresholds mean what they mean without augmentation. With a single view
        (or the same one twice) the result is the plain one.

        Args:
            views: The image, resized and mirrored; at least one view.
            vocabulary: As for `detect`.
            original_size: Height and width of the image before resizing, for boxes and masks in its pixels.
            settings: As for `detect`.

        Raises:
            ProxydetError: As `detect`.
        """
        settings, precision = self._checked([view.image for view in views], settings)
        with heads_in(precision):
            features = []
            for view in views:
                batch, levels = self._view([view.image], precision)
                output = self.proposal_generator(levels)
                proposals = self.proposal_generator.propose(output, check=True)
                features.append(
                    ViewFeatures(batch=batch, proposals=proposals, mirrored=view.mirrored)
                )
            return detect_in_views(
                features,
                self.roi_heads,
                self.classifiers(),
                self._class_text(vocabulary),
                proposals=self.config.proposals,
                settings=replace(settings, masks=settings.masks and self.has_mask_head),
                original_size=original_size,
            )

    def _view(self, images: list[Tensor], precision: Format) -> tuple[FeatureBatch, list[Tensor]]:
        """Return the features of images of one padded size: what the heads pool from, and the maps of all levels."""
        stacked = self._stack(images)
        if self.device.type == "cpu":
            # Convolutions keep this layout and need not convert their maps back after each.
            stacked = stacked.channels_last()
        features = self._features(stacked, precision)
        return self._feature_batch(features, stacked), list(features.values())

    def _checked(
        self, images: Sequence[Tensor], settings: InferenceConfig | None
    ) -> tuple[InferenceConfig, Format]:
        """Check what is given; return the settings that count, and the number format to run in."""
        if self.training:
            raise RuntimeError("the network is in training mode: call eval() before detect()")
        check_images(images)
        settings = settings or InferenceConfig()
        return settings, usable_precision(settings.precision, self.device)

    def classifiers(self) -> list[ZeroShotClassifier]:
        """Return the classifiers whose scores inference fuses, in the order that `detect_classes` takes them."""
        detection, mixup = self.roi_heads.detection, self.roi_heads.mixup
        classifiers = [detection.classifier(step) for step in range(len(detection))]
        return classifiers if mixup is None else [*classifiers, mixup.classifier(len(mixup) - 1)]

    def _class_text(self, vocabulary: Vocabulary | None) -> ClassText:
        if vocabulary is None:
            return ClassText(text_DC=self.class_table().text_DC1[:, :-1], base_C=self.base_C)
        for known, device, text in self._last_classes:
            if known is vocabulary and device == self.device:
                return text
        self._check_dimension(vocabulary)
        text = ClassText.of(vocabulary, self.device)
        self._last_classes = ((vocabulary, self.device, text),)
        return text

    # -- shared ----------------------------------------------------------------------------------------------------

    def _stack(self, images: Sequence[Tensor]) -> ImageBatch:
        return stack_images(
            images, self.pixel_mean, self.pixel_std, self.backbone.size_divisibility
        )

    def _features(self, images: ImageBatch, precision: Precision) -> dict[str, Tensor]:
        features: dict[str, Tensor] = compute_in(precision, self.backbone, images.pixels_B3HW)
        return features

    def _feature_batch(self, features: dict[str, Tensor], images: ImageBatch) -> FeatureBatch:
        return FeatureBatch(
            features=[features[f"p{level}"] for level in self.config.cascade.pool_levels],
            sizes_B2=images.sizes_B2,
        )

    def _check_dimension(self, vocabulary: Vocabulary) -> None:
        expected = self.config.classifier.embedding_dim
        if vocabulary.dimension != expected:
            raise VocabularyError(
                f"the vocabulary's embeddings have {vocabulary.dimension} dimensions, the model's have {expected}",
                hint="embed the class names with the text encoder that the model was trained with",
            )


# --- Preparation for inference ---------------------------------------------------------------------------------------


ALLOW_SLOW = "PROXYDET_ALLOW_SLOW_PRECISION"
"""Environment variable: where it is set, a device may compute in a number format that it has no units for, many times slower."""
# A matrix product must gain this much for the whole to gain.
_WORTH_IT = 1.5


def usable_precision(wanted: str, device: torch.device) -> Format:
    """Return the number format to run in; what the device has units for is measured, not looked up.

    Args:
        wanted: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: the fastest that the device has units for.
        device: Where to run.

    Raises:
        ConfigError: The device has no units for it, and PROXYDET_ALLOW_SLOW_PRECISION is not set.
    """
    if wanted == "auto":
        if half_speed("bf16", device.type) > _WORTH_IT:
            return "bf16"
        fp16 = device.type != "cpu" and half_speed("fp16", device.type) > _WORTH_IT
        return "fp16" if fp16 else "fp32"
    if wanted == "fp32" or os.environ.get(ALLOW_SLOW):
        return cast("Format", wanted)
    if device.type == "cpu" and wanted == "fp16":
        raise ConfigError(
            "the precision fp16 needs a GPU: CPUs compute it slower than fp32",
            hint="take --precision fp32, or --precision auto, which chooses (for a training --set inference.precision=fp32); "
            "proxydet env reports what this CPU has units for",
        )
    if (speed := half_speed(wanted, device.type)) <= 1:
        raise ConfigError(
            f"this {'CPU' if device.type == 'cpu' else 'GPU'} has no units for {wanted}: a matrix product takes "
            f"{1 / max(speed, 1e-4):.0f} times as long as in fp32"
            if speed > 0
            else f"whether devices of type {device.type} have units for {wanted} is not measured",
            hint="take --precision fp32, or --precision auto, which chooses (for a training --set inference.precision=fp32); "
            f"{ALLOW_SLOW}=1 in the environment tries it all the same",
        )
    return cast("Format", wanted)


def _refuse_to_save(*_: Any) -> None:
    raise RuntimeError("this network is prepared for inference: save the one it was made of")


# Of the largest value of a map. Rounding makes a millionth of it; a convolution that others read, too, far more.
_FOLDED_WITHIN = 1e-3


@torch.no_grad()
def fold_norms(backbone: nn.Module, divisor: int) -> int:
    """Fold each BatchNorm in evaluation mode into the convolution before it, in float64: results differ by rounding.

    Which convolution a norm follows is seen by running the backbone on a small image, and running it again shows that the
    result is the same. Where it is not (another layer reads a convolution's output, too), nothing is folded.

    Args:
        backbone: Maps images (B, 3, H, W) to maps by name. Modules in it are replaced; no parameter is changed.
        divisor: The sides of its images are multiples of this.

    Returns:
        The number of norms that were folded.
    """
    if not any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        return 0
    # A tensor is known by its identity, which no other gets while it is kept.
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[_BatchNorm, nn.Conv2d] = {}
    runs: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Conv2d, _: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)
        runs[module] += 1

    def before_norm(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        runs[module] += 1
        if id(inputs[0]) in made:
            pairs[module] = made[id(inputs[0])][0]

    hooks, places = [], defaultdict(list)
    for parent in backbone.modules():
        for name, module in parent.named_children():
            places[module].append((parent, name))
    for module in places:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, _BatchNorm) and not module.training and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    source = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 2 * divisor, 3 * divisor, generator=source)
    image = image.to(next(backbone.parameters()).device)
    wanted = backbone(image)
    for hook in hooks:
        hook.remove()
    replaced: dict[nn.Module, nn.Module] = {}
    for norm, convolution in pairs.items():
        if all(runs[part] == len(places[part]) == 1 for part in (norm, convolution)):
            exact = copy.deepcopy(convolution).double()
            folded = fuse_conv_bn_eval(exact, copy.deepcopy(norm).double())
            replaced[convolution] = folded.to(convolution.weight.dtype)
            # timm's norms have their activation in them.
            behind = [part for part in norm.children() if not isinstance(part, nn.Identity)]
            replaced[norm] = nn.Sequential(*behind) if behind else nn.Identity()
    for old, new in replaced.items():
        setattr(*places[old][0], new)
    for name, maps in backbone(image).items():
        if not (maps - wanted[name]).abs().max() <= _FOLDED_WITHIN * wanted[name].abs().max():
            for old in replaced:
                setattr(*places[old][0], old)
            return 0
    return len(replaced) // 2


# --- Several views of one image --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ViewFeatures:
    """Features and proposals of one view.

    Attributes:
        batch: Features and size, of a batch of one.
        proposals: Its proposals.
        mirrored: As in `ImageView`.
    """

    batch: FeatureBatch
    proposals: Regions
    mirrored: bool

    def from_reference(self, boxes_N4: Tensor, reference: FeatureBatch) -> Tensor:
        """Move boxes from the frame of reference into this view."""
        scaled_N4 = boxes_N4 * self._scale_4(reference)
        return self._mirror(scaled_N4)

    def to_reference(self, boxes_N4: Tensor, reference: FeatureBatch) -> Tensor:
        """Move boxes of this view into the frame of reference."""
        return self._mirror(boxes_N4) / self._scale_4(reference)

    def _scale_4(self, reference: FeatureBatch) -> Tensor:
        return (self.batch.sizes_B2[0] / reference.sizes_B2[0]).flip(0).repeat(2)

    def _mirror(self, boxes_N4: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes_N4
        x0, y0, x1, y1 = boxes_N4.unbind(dim=-1)
        width = self.batch.sizes_B2[0, 1]
        return torch.stack([width - x1, y0, width - x0, y1], dim=-1)


def detect_in_views(
    views: Sequence[ViewFeatures],
    heads: RoiHeads,
    classifiers: list[ZeroShotClassifier],
    classes: ClassText,
    *,
    proposals: ProposalConfig,
    settings: InferenceConfig,
    original_size: tuple[int, int],
) -> Prediction:
    """Detect objects in an image from several views; the frame of reference is the first view's input.

    Args:
        views: Features and proposals of the views, at least one.
        heads: Box and mask heads.
        classifiers: As `detect_classes` takes them.
        classes: The classes to detect.
        proposals: NMS threshold and number of the proposals.
        settings: Thresholds and limits; ``masks`` only where the heads predict them.
        original_size: Height and width of the image, for boxes and masks in its pixels.
    """
    reference = views[0].batch
    regions = _merged(views, proposals)
    embedded, boxes = [], []
    for view in views:
        seen_BR4 = view.from_reference(regions.boxes_BR4, reference)
        own = heads.embed(view.batch, regions.with_boxes(seen_BR4, regions.valid_BR))
        embedded.append(own)
        boxes.append(view.to_reference(own.boxes_BR4, reference))
    embedded[0] = replace(embedded[0], boxes_BR4=_mean(boxes))
    found = detect_classes(embedded, classes, classifiers, settings)

    def masks(_: FeatureBatch, boxes_M4: Tensor, image_M: Tensor, _counts: Sequence[int]) -> Tensor:
        parts = []
        for view in views:
            own_M4 = view.from_reference(boxes_M4, reference)
            masks_MSS = heads.mask_probabilities(view.batch, own_M4, image_M)
            parts.append(masks_MSS.flip(2) if view.mirrored else masks_MSS)
        return _mean(parts)

    wanted = masks if settings.masks else None
    (prediction,) = assemble_predictions(found, reference, [original_size], wanted)
    return prediction


def _merged(views: Sequence[ViewFeatures], config: ProposalConfig) -> Regions:
    """Join the proposals of all views in the frame of reference."""
    reference = views[0].batch
    boxes_P4 = torch.cat(
        [
            view.to_reference(view.proposals.boxes_BR4[0][view.proposals.valid_BR[0]], reference)
            for view in views
        ]
    )
    scores_P = torch.cat(
        [view.proposals.objectness_BR[0][view.proposals.valid_BR[0]] for view in views]
    )
    order_P = scores_P.argsort(descending=True, stable=True)
    boxes_P4, scores_P = boxes_P4[order_P], scores_P[order_P]
    kept = keep_best(boxes_P4, scores_P, config.nms_iou, config.keep_test)
    return Regions(
        boxes_BR4=boxes_P4[kept][None],
        objectness_BR=scores_P[kept][None],
        valid_BR=torch.ones_like(scores_P[kept], dtype=torch.bool)[None],
    )


def _mean(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)

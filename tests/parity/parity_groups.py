"""Compares the detector with the recorded numbers, group by group.

A fixture may hold only a part of a recorded array: then ``trim`` cuts the same part out of ours before comparing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import proxydet.runtime.d2  # noqa: F401

import numpy as np
import torch
from parity_model import CLASSES, LOSSES, Fixture, batches_of, images_of

from proxydet.detections import Detections
from proxydet.detector import Detector
from proxydet.losses.criterion import Criterion
from proxydet.modeling.network import ProxyDetNetwork
from proxydet.modeling.postprocess import Prediction
from proxydet.vocabulary.vocabulary import Vocabulary

Trim = Callable[[str, np.ndarray], np.ndarray]

TENSOR_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
TRAJECTORY_TOLERANCE = 2e-3
SMALLEST_MATCHED_SHARE = 0.99
NEAR_EQUAL = 1e-5
"""Scores that differ by less may come in either order."""


@dataclass(frozen=True)
class Row:
    """The outcome of one group.

    Attributes:
        group: What was compared.
        difference: The largest difference, in the unit of the tolerance.
        tolerance: What it may be.
        unit: What the difference is measured in.
    """

    group: str
    difference: float
    tolerance: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance (a NaN is not)."""
        return self.difference <= self.tolerance


def whole(_key: str, array: np.ndarray) -> np.ndarray:
    """Cut nothing."""
    return array


def compare_inference(
    network: ProxyDetNetwork, fixture: Fixture, index: int, trim: Trim = whole
) -> Iterator[Row]:
    """Compare everything recorded of one image in inference.

    Boxes of proposals and what follows of each are put into the recorded order first, within near-equal scores, which may
    exchange their places; scores are compared place by place.
    """
    prediction, arrays = record_inference(network, images_of(fixture)[index])
    boxes = next(ours for _, name, ours in arrays if name == "proposal_boxes")
    order = np.arange(len(boxes))
    if len(boxes) == len(fixture.get(f"eval{index}.proposal_boxes", ())):
        order = nearest_rows(
            boxes, fixture[f"eval{index}.proposal_boxes"], fixture[f"eval{index}.proposal_scores"]
        )
    worst: dict[str, float] = {}
    for group, name, ours in arrays:
        key = f"eval{index}.{name}"
        if key in fixture:
            aligned = ours[order] if name.startswith(("proposal_boxes", "pred")) else ours
            difference = _relative_to_spread(trim(key, aligned), fixture[key])
            worst[group] = max(worst.get(group, 0.0), difference)
    for group, difference in worst.items():
        yield Row(f"eval{index} {group}", difference, TENSOR_TOLERANCE, "of the spread")
    found = Detections(prediction, [f"class {row}" for row in range(CLASSES)])
    yield from _compare_detections(f"eval{index}", found, fixture)


def nearest_rows(
    ours_P4: np.ndarray, recorded_P4: np.ndarray, recorded_P: np.ndarray
) -> np.ndarray:
    """Return for each recorded box the row of ours that is nearest, each row once: (P,), the closest pairs first.

    Only rows whose recorded scores differ by less than `NEAR_EQUAL` are taken for each other, as long as there are any.

    Args:
        ours_P4: Our boxes, by descending score.
        recorded_P4: The recorded ones, as many.
        recorded_P: Their scores.
    """
    distance_PP = np.abs(recorded_P4[:, None] - ours_P4[None]).max(axis=2)
    distance_PP[np.abs(recorded_P[:, None] - recorded_P[None]) >= NEAR_EQUAL] = np.inf
    order, free = np.full(len(ours_P4), -1), np.ones(len(ours_P4), dtype=bool)
    for pair in distance_PP.argsort(axis=None, kind="stable").tolist():
        row, candidate = divmod(pair, len(ours_P4))
        if order[row] < 0 and free[candidate]:
            order[row], free[candidate] = candidate, False
    return order


def record_inference(
    network: ProxyDetNetwork, image: torch.Tensor
) -> tuple[Prediction, list[tuple[str, str, np.ndarray]]]:
    """Detect objects in an image; return them, and group, name and values of all that the full fixtures hold of the way."""
    recording = _Recording(network.eval())
    return recording.detect(image), list(recording.arrays())


def compare_vocabulary(network: ProxyDetNetwork, fixture: Fixture) -> Iterator[Row]:
    """Compare detection with a vocabulary of one's own, through what a Python user calls."""
    embeddings = fixture["vocab.embeddings"]
    base = fixture["vocab.base_mask"][: len(embeddings)]
    names = [f"thing {index}" for index in range(len(embeddings))]
    vocabulary = Vocabulary.from_arrays(names, embeddings, base)
    pixels = fixture["image0"]
    detector = Detector(network, shortest=min(pixels.shape[:2]), longest=max(pixels.shape[:2]))
    for name, only_one in (("all", False), ("one", True)):
        asked = detector.with_settings(one_class_per_proposal=only_one, masks=False)
        threshold = asked.inference.score_threshold
        found = asked.predict(pixels, vocabulary, score_threshold=threshold, one_label=False)
        yield from _compare_detections(f"vocab.{name}", found, fixture)


def compare_training(network: ProxyDetNetwork, fixture: Fixture) -> Iterator[Row]:
    """Compare losses, gradient norms, and which parameters get no gradient."""
    network.train()
    criterion = Criterion(LOSSES)
    generator = torch.Generator().manual_seed(0)
    for name, batch in zip(("box", "image"), batches_of(fixture), strict=True):
        network.zero_grad(set_to_none=True)
        losses = criterion(network(batch, generator=generator), generator=generator)
        torch.stack(list(losses.values())).sum().backward()
        yield _compare_losses(f"train.{name}", losses, fixture, LOSS_TOLERANCE)
        yield from _compare_gradients(name, network, fixture)
    network.zero_grad(set_to_none=True)


def compare_trajectory(
    network: ProxyDetNetwork, images: Fixture, trajectory: Fixture, trim: Trim = whole
) -> Iterator[Row]:
    """Compare four optimiser steps: box, image, box, image batch."""
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-6, weight_decay=1e-4)
    criterion = Criterion(LOSSES)
    generator = torch.Generator().manual_seed(0)
    for step, batch in enumerate(batches_of(images) * 2):
        optimizer.param_groups[0]["lr"] = 1e-6 * (1 + np.cos(np.pi * step / 90_000))
        losses = criterion(network(batch, generator=generator), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        torch.nn.utils.clip_grad_value_(with_gradient, 1.0)
        optimizer.step()
        yield _compare_losses(f"step{step}", losses, trajectory, TRAJECTORY_TOLERANCE)
    state = network.state_dict()
    worst = 0.0
    for key in trajectory:
        if key.startswith("after.") and key.endswith(".first"):
            ours = state[key[len("after.") : -len(".first")]].flatten()[:16].cpu().numpy()
            worst = max(worst, _relative_to_spread(trim(key, ours), trajectory[key]))
    yield Row("weights after step 3", worst, TRAJECTORY_TOLERANCE, "of the spread")


class _Recording:
    """Runs `detect` and keeps what happens inside, through hooks on the parts."""

    def __init__(self, network: ProxyDetNetwork) -> None:
        self._network = network
        self._features: dict[str, torch.Tensor] = {}
        self._hidden: dict[tuple[str, int], torch.Tensor] = {}

    def detect(self, image: torch.Tensor) -> Prediction:
        """Run the detector on one image."""
        heads = self._network.roi_heads
        handles = [
            self._network.backbone.register_forward_hook(self._keep_features),
            self._network.proposal_generator.register_forward_hook(self._keep_proposals),
        ]
        for branch, modules in (("pred", heads.box_head), ("predcmm", heads.box_head_cmm)):
            for step, module in enumerate(modules):
                handles.append(module.register_forward_hook(self._keeper(branch, step)))
        try:
            return self._network.detect([image])[0]
        finally:
            for handle in handles:
                handle.remove()

    def _keep_features(
        self, _module: object, _inputs: object, output: dict[str, torch.Tensor]
    ) -> None:
        self._features = output

    def _keep_proposals(self, module: torch.nn.Module, _inputs: object, output: object) -> None:
        self._centernet = output
        self._proposals = module.propose(output)  # type: ignore[operator]

    def _keeper(self, branch: str, step: int) -> Callable[..., None]:
        def keep(_module: object, _inputs: object, output: torch.Tensor) -> None:
            self._hidden[branch, step] = output

        return keep

    def arrays(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yield what `record_inference` returns."""
        for name, maps in self._features.items():
            yield "features", name, maps[0, ::16].cpu().numpy()
        levels = zip(self._centernet.heatmaps, self._centernet.distances, strict=True)
        for level, (heatmap, distances) in enumerate(levels):
            yield "CenterNet head", f"agn_hm{level}", heatmap[0].cpu().numpy()
            yield "CenterNet head", f"reg{level}", distances[0].cpu().numpy()
        yield "proposals", "proposal_boxes", self._proposals.boxes_BR4[0].cpu().numpy()
        yield "proposals", "proposal_scores", self._proposals.objectness_BR[0].cpu().numpy()
        for (name, step), features in self._hidden.items():
            yield from self._step(name, step, features)

    @torch.inference_mode()
    def _step(
        self, name: str, step: int, features: torch.Tensor
    ) -> Iterator[tuple[str, str, np.ndarray]]:
        heads = self._network.roi_heads
        branch = heads.mixup if name == "predcmm" else heads.detection
        group = "mixup branch" if name == "predcmm" else "detection branch"
        classifier = branch.classifier(step)
        embeddings = classifier(features)
        logits = classifier.logits(embeddings, classifier.zs_weight)
        yield f"{group}, embeddings", f"{name}{step}.embedding", embeddings[:, ::8].cpu().numpy()
        yield f"{group}, logits", f"{name}{step}.logits", logits[:, ::25].cpu().numpy()
        yield (
            f"{group}, deltas",
            f"{name}{step}.deltas",
            branch.deltas(step, features).cpu().numpy(),
        )


def _relative_to_spread(ours: np.ndarray, recorded: np.ndarray) -> float:
    if ours.shape != recorded.shape:
        return float("inf")
    return float(np.abs(ours - recorded).max() / max(recorded.std(), 1e-12))


def _compare_detections(group: str, found: Detections, fixture: Fixture) -> Iterator[Row]:
    boxes, scores, classes = found.boxes_xyxy, found.scores, found.class_ids
    area_at = {}
    if f"{group}.mask_area" in fixture and len(found):
        area_at = dict(enumerate(found.masks.sum(axis=(1, 2)).tolist()))
    free = set(range(len(found)))
    matched, largest_gap = 0, 0
    recorded = len(fixture[f"{group}.boxes"])
    for row in range(recorded):
        box, score = fixture[f"{group}.boxes"][row], fixture[f"{group}.scores"][row]
        for candidate in sorted(free, key=lambda index: abs(scores[index] - score)):
            if abs(scores[candidate] - score) > 1e-4:
                break
            same_class = classes[candidate] == fixture[f"{group}.classes"][row]
            if same_class and _overlap(boxes[candidate], box) > 0.99:
                free.remove(candidate)
                matched += 1
                if area_at:
                    gap = abs(area_at[candidate] - int(fixture[f"{group}.mask_area"][row]))
                    largest_gap = max(largest_gap, gap)
                break
    unmatched = 1 - matched / max(recorded, len(found))
    yield Row(f"{group} detections", unmatched, 1 - SMALLEST_MATCHED_SHARE, "share unmatched")
    if area_at:
        yield Row(f"{group} mask areas", largest_gap, 1, "pixels")


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = np.prod(np.clip(sides, 0, None))
    union = np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - shared
    return float(shared / union)


def _compare_losses(
    prefix: str, losses: dict[str, torch.Tensor], fixture: Fixture, tolerance: float
) -> Row:
    worst = 0.0
    for key in fixture:
        name = key.removeprefix(f"{prefix}.")
        if key.startswith(f"{prefix}.") and name != "lr":
            recorded, ours = float(fixture[key]), float(losses[name].detach())
            difference = abs(ours - recorded) / abs(recorded) if recorded else abs(ours)
            worst = max(worst, difference)
    return Row(f"{prefix} losses", worst, tolerance, "relative")


def _compare_gradients(name: str, network: ProxyDetNetwork, fixture: Fixture) -> Iterator[Row]:
    parameters = dict(network.named_parameters())
    worst = 0.0
    for key in fixture:
        if key.startswith(f"grad.{name}."):
            gradient = parameters[key.removeprefix(f"grad.{name}.")].grad
            ours = -1.0 if gradient is None else float(gradient.norm())
            recorded = float(fixture[key])
            worst = max(worst, abs(ours - recorded) / (abs(recorded) or 1.0))
    yield Row(f"train.{name} gradient norms", worst, GRADIENT_TOLERANCE, "relative")
    # Norms' parameters are frozen in ours and were no parameters to the recording; base.fc is not built.
    without = {
        key
        for key, parameter in parameters.items()
        if parameter.grad is None and not (".bn" in key or ".downsample.1." in key)
    }
    recorded_names = {key for key in fixture[f"nograd.{name}"].tolist() if ".base.fc." not in key}
    yield Row(f"train.{name} without gradient", len(without ^ recorded_names), 0, "names")

"""What rescoring by overlapping proposals gains and costs (``inference.rescore``), and what other ways of rescoring do.

::

    python benchmarks/rescoring.py RUN OUTPUT [--images 600] [--skip 720] [--seed 7] [--bootstrap 200] [--variants] [--threads 1]

RUN is the run folder of a quickstart. Its classes are drawn in other validation images (``--skip`` the first ones, of which the
quickstart itself has 120), and scored with and without: AP of boxes and masks over novel and base classes, with intervals of the
difference by pairs of resamples, and the CPU time of both. ``--variants`` scores boxes by other ways, on the same regions: powers of
the overlap, AggDet's mean of the largest overlaps, means of embeddings, scores and boxes of overlapping regions, prototypes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from proxydet.data.images import read_image
from proxydet.data.synthetic import SyntheticConfig, make_dataset
from proxydet.detector import Detector
from proxydet.evaluation.config import EvaluationConfig
from proxydet.evaluation.detector_evaluation import result_rows
from proxydet.evaluation.evaluate import compare_results, run_evaluation
from proxydet.evaluation.ground_truth import GroundTruth
from proxydet.files import write_text
from proxydet.modeling.boxes import pairwise_iou
from proxydet.modeling.postprocess import ClassText, Prediction, class_scores, detect_classes
from proxydet.modeling.roi_heads import RegionEmbeddings

Variant = Callable[[RegionEmbeddings], RegionEmbeddings]


def with_scores(change: Callable[[Tensor, Tensor], Tensor]) -> Variant:
    """Rescore proposals by a function of their scores (B, R) and their overlaps (B, R, R)."""

    def changed(regions: RegionEmbeddings) -> RegionEmbeddings:
        overlap_BRR = pairwise_iou(regions.boxes_BR4, regions.boxes_BR4)
        scores_BR = change(regions.proposal_scores_BR, overlap_BRR)
        return replace(regions, proposal_scores_BR=scores_BR)

    return changed


def agreeing(power: float) -> Variant:
    """What ``inference.rescore`` does, with another power of the overlap."""
    return with_scores(lambda score, overlap: 1 - (-(overlap**power * score[:, None]).sum(2)).exp())


def largest(overlap_BRR: Tensor, count: int = 5) -> Tensor:
    """AggDet's quality: the mean of a region's largest overlaps with others."""
    own = torch.eye(overlap_BRR.shape[1], dtype=torch.bool)
    return overlap_BRR.masked_fill(own, 0).topk(count, dim=2).values.mean(dim=2)


def averaged(what: str) -> Variant:
    """Mean of the embeddings, or of the boxes, of overlapping regions, weighted by the fourth power of the overlap."""

    def changed(regions: RegionEmbeddings) -> RegionEmbeddings:
        overlap_BRR = pairwise_iou(regions.boxes_BR4, regions.boxes_BR4) ** 4
        weight_BRR = overlap_BRR / overlap_BRR.sum(dim=2, keepdim=True).clamp(min=1e-9)
        if what == "boxes":
            return replace(regions, boxes_BR4=weight_BRR @ regions.boxes_BR4)
        assert regions.mixup_BRD is not None
        return replace(
            regions,
            detection=tuple(normalize(weight_BRR @ e, dim=2) for e in regions.detection),
            mixup_BRD=normalize(weight_BRR @ regions.mixup_BRD, dim=2),
        )

    return changed


VARIANTS: dict[str, Variant] = {
    "off": lambda regions: regions,
    **{f"agreement, power {power}": agreeing(power) for power in (1, 2, 3, 4, 6, 8, 16)},
    "AggDet: mean of score and quality": with_scores(lambda s, o: (s + largest(o)) / 2),
    "AggDet: score^0.65 x quality^0.35": with_scores(lambda s, o: s**0.65 * largest(o) ** 0.35),
    "quality alone": with_scores(lambda _, o: largest(o)),
    "mean score of overlapping proposals": with_scores(
        lambda s, o: (o**4 * s[:, None]).sum(2) / (o**4).sum(2).clamp(min=1e-9)
    ),
    "embeddings averaged": averaged("embeddings"),
    "boxes averaged": averaged("boxes"),
}


def prototypes(
    detector: Detector, found: list[RegionEmbeddings], text: ClassText, *, share: float
) -> ClassText:
    """Mix into each class its ten best regions of all images; novel classes: the base classes' mean, moved as the text is."""
    classifiers, settings = detector.network.classifiers(), detector.inference
    scores_NC = torch.cat([class_scores(each, text, classifiers, settings) for each in found])
    embeddings_ND = torch.cat([each.detection[-1].flatten(0, 1) for each in found])
    best = scores_NC.topk(10, dim=0)
    prototype_CD = (best.values[..., None] * embeddings_ND[best.indices]).sum(0)
    prototype_DC = (prototype_CD / best.values.sum(0)[:, None]).T
    means = [
        values[:, text.base_C].mean(dim=1, keepdim=True) for values in (prototype_DC, text.text_DC)
    ]
    moved_DC = means[0] + text.text_DC - means[1]
    mixed_DC = torch.where(text.base_C, prototype_DC, moved_DC)
    return replace(text, text_DC=text.text_DC + share * mixed_DC)


def show_cost(what: str, seconds: dict[str, float], images: int) -> None:
    """Print the CPU time of an image."""
    off, on = (1000 * seconds[name] / images for name in ("off", "on"))
    print(
        f"CPU time an image, {what}: off {off:.1f} ms, on {on:.1f} ms ({on / off - 1:+.1%})",
        flush=True,
    )


def main() -> None:
    """Draw, detect, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--skip", type=int, default=720, help="0: the quickstart's own; it has 120")
    parser.add_argument("--seed", type=int, default=7, help="of the data set, as the quickstart's")
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, last = options.output / "data", options.skip + options.images
    drawn = {"images_train": 1, "image_label_images_per_class": 0}
    make_dataset(data, SyntheticConfig(seed=options.seed, images_val=last, **drawn))
    document = json.loads((data / "lvis_val.json").read_text(encoding="utf-8"))
    document["images"] = document["images"][options.skip : last]
    used = {entry["id"] for entry in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in used]
    part = options.output / f"images-{options.skip}-{last}.json"
    write_text(part, json.dumps(document))
    truth = GroundTruth.load(part)
    novel_C = np.array([entry["frequency"] == "r" for entry in document["categories"]])
    groups = {"novel": novel_C, "base": ~novel_C}

    detector = Detector.from_run(options.run, device="cpu")
    ids = {entry["name"]: entry["id"] for entry in document["categories"]}
    category_ids = [ids[name] for name in detector.vocabulary.names]
    images = [read_image(data / "val" / entry["file_name"]) for entry in document["images"]]
    settings = {name: detector.settings(rescore=name == "on") for name in ("off", "on")}
    rows: dict[str, list[object]] = {"off": [], "on": []}
    seconds = dict.fromkeys(rows, 0.0)
    detector.predict_images(images[:1])
    for image, entry in zip(images, document["images"], strict=True):
        for name, own in settings.items():  # in turn, so that what else runs here slows both alike
            started = time.process_time()
            (found,) = detector.predict_images([image], settings=own)
            seconds[name] += time.process_time() - started
            rows[name] += result_rows(found, entry["id"], category_ids)
    files = {name: options.output / f"{name}-{options.skip}-{last}.json" for name in rows}
    for name, file in files.items():
        write_text(file, json.dumps(rows[name]))
    config = EvaluationConfig(bootstrap=options.bootstrap)
    compared = compare_results(files["off"], files["on"], truth, config=config, groups=groups)
    print(f"{options.images} images from number {options.skip} on\n")
    print("| | off | on | difference | 95 % of resamples |\n|---|---|---|---|---|")
    for kind, differences in compared.items():
        for each in differences:
            if each.metric in (
                "AP",
                "AP50",
                "AP75",
                "novel/AP",
                "novel/AP50",
                "base/AP",
                "base/AP50",
            ):
                interval = each.interval
                ends = (
                    f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}" if interval else ""
                )
                values = f"{100 * each.first:.1f} | {100 * each.second:.1f}"
                print(
                    f"| {kind} {each.metric} | {values} | {100 * each.difference:+.1f} | {ends} |"
                )
    show_cost("as evaluated", seconds, len(images))
    for what, changes in {
        "boxes only, as evaluated": {"masks": False},
        "as predict does": {"score_threshold": 0.3, "agnostic_nms": True},
    }.items():
        seconds = dict.fromkeys(rows, 0.0)
        for image in images[:100]:
            for name, own in settings.items():
                started = time.process_time()
                detector.predict_images([image], settings=replace(own, **changes))
                seconds[name] += time.process_time() - started
        show_cost(what, seconds, len(images[:100]))
    if not options.variants:
        return

    network = detector.network
    words = detector.vocabulary
    text = ClassText(
        text_DC=torch.tensor(words.normalised()).T, base_C=torch.from_numpy(words.base.copy())
    )
    scaled = [detector.scaled(image).views[0].image for image in images]
    regions = [network.embed([image]) for image in scaled]
    ways = {name: (list(map(change, regions)), text) for name, change in VARIANTS.items()}
    for share in (0.05, 0.1, 0.25):
        ways[f"prototypes, share {share}"] = (
            regions,
            prototypes(detector, regions, text, share=share),
        )
    plain = EvaluationConfig(bootstrap=0, iou_types=("bbox",))
    print(
        "\n| way (boxes) | novel AP | AP50 | AP75 | base AP | AP50 | AP75 |\n|---|---|---|---|---|---|---|"
    )
    for name, (changed, classes) in ways.items():
        results = []
        for each, image, entry in zip(changed, scaled, document["images"], strict=True):
            found = detect_classes([each], classes, network.classifiers(), detector.inference)
            size = (entry["height"], entry["width"])
            scale_4 = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]] * 2)
            prediction = Prediction(
                boxes_N4=found.boxes_L4 * scale_4,
                scores_N=found.scores_L,
                classes_N=found.classes_L,
                mask_probs_MSS=None,
                mask_index_N=torch.full_like(found.classes_L, -1),
                image_size=size,
            )
            results += result_rows(prediction, entry["id"], category_ids)
        report = run_evaluation(results, truth, config=plain, groups=groups).report
        scored = {group.name: group for group in report.main.groups}
        cells = [
            f"{100 * (value or 0):.1f}"
            for group in (scored["novel"], scored["base"])
            for value in (group.ap, group.ap50, group.ap75)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

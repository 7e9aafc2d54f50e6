"""The repairs against the installed detectron2: what broke works, and nothing outside it changed."""

import importlib
import warnings
from types import SimpleNamespace

import proxydet.runtime.d2 as d2

import numpy as np
import PIL.Image
import pytest
import torch

from proxydet.errors import MissingDependencyError
from proxydet.runtime.detectron2 import MissingOperators, activate

PARTS = [
    "structures",
    "layers",
    "modeling.backbone.fpn",
    "modeling.roi_heads",
    "modeling.poolers",
    "modeling.matcher",
    "data",
    "data.transforms",
    "checkpoint",
    "solver",
    "evaluation",
    "evaluation.sem_seg_evaluation",
    "model_zoo",
    "utils.events",
    "utils.visualizer",
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_imports_without_a_warning(part):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.import_module(f"detectron2.{part}")


def test_numpy_and_pillow_keep_nothing():
    importlib.import_module("detectron2.data.transforms")
    importlib.import_module("detectron2.data.build")
    assert not hasattr(np, "int")
    assert not hasattr(PIL.Image, "LINEAR")


def test_activating_again_changes_nothing():
    import sys

    finders = list(sys.meta_path)
    assert activate() == d2.INSTALLED
    assert sys.meta_path == finders


def test_extent_transform_interpolates_bilinearly_by_default():
    from detectron2.data.transforms import ExtentTransform

    assert ExtentTransform((0, 0, 4, 4), (2, 2)).interp == PIL.Image.Resampling.BILINEAR


def test_masks_are_made_on_any_numpy():
    from detectron2.structures import PolygonMasks

    masks = PolygonMasks([[np.array([0.0, 0.0, 4.0, 0.0, 4.0, 4.0])], []])
    assert masks.nonempty().tolist() == [True, False]


def test_class_histogram_is_counted():
    build = importlib.import_module("detectron2.data.build")
    annotations = [{"category_id": 1}, {"category_id": 1}, {"category_id": 0}]
    build.print_instances_class_histogram([{"annotations": annotations}], ["cat", "dog"])


def test_model_zoo_finds_files_without_pkg_resources():
    zoo = importlib.import_module("detectron2.model_zoo.model_zoo")
    with pytest.raises(RuntimeError, match="not available in Model Zoo"):
        zoo.get_config_file("no-such-file.yaml")


@pytest.mark.parametrize("clip_type", ["value", "norm"])
def test_clipping_skips_parameters_without_gradient(clip_type):
    solver = importlib.import_module("detectron2.solver.build")
    config = SimpleNamespace(CLIP_TYPE=clip_type, CLIP_VALUE=1.0, NORM_TYPE=2.0)
    clip = solver._create_gradient_clipper(config)
    frozen = torch.nn.Parameter(torch.zeros(2))
    moved = torch.nn.Parameter(torch.zeros(2))
    moved.grad = torch.tensor([0.0, 9.0])
    clip(frozen)
    clip(iter([frozen, moved]))
    assert frozen.grad is None
    assert moved.grad.tolist() == pytest.approx([0.0, 1.0], abs=1e-5)


@pytest.mark.skipif(d2.INSTALLED.operators == "compiled", reason="detectron2 is compiled here")
def test_a_compiled_operator_is_an_error_only_when_called():
    from detectron2 import _C

    with pytest.raises(MissingDependencyError, match="nms_rotated") as caught:
        _C.nms_rotated(1)
    assert "compiler" in (caught.value.hint or "")


@pytest.mark.skipif(d2.INSTALLED.operators == "compiled", reason="detectron2 is compiled here")
def test_fast_coco_evaluation_falls_back_on_pycocotools():
    from pycocotools.cocoeval import COCOeval

    evaluation = importlib.import_module("detectron2.evaluation.coco_evaluation")
    assert evaluation.COCOeval_opt is COCOeval


def test_stand_in_has_no_attributes_of_a_package():
    stand_in = MissingOperators("the compiled file does not load (why)")
    with pytest.raises(AttributeError):
        _ = stand_in.__path__
    with pytest.raises(MissingDependencyError, match="does not load"):
        stand_in.anything()

"""Configurations reject what cannot work, and need no torch."""

import subprocess
import sys

import pytest

from proxydet.errors import ConfigError
from proxydet.losses.config import (
    CenterNetLossConfig,
    ClassificationLossConfig,
    MixupLossConfig,
)
from proxydet.modeling.config import (
    BackboneConfig,
    CascadeConfig,
    ClassifierConfig,
    InferenceConfig,
    MaskConfig,
    ModelConfig,
    ProposalConfig,
    PyramidConfig,
    ResNetConfig,
    SwinConfig,
)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ResNetConfig(depths=()), "depths"),
        (lambda: ResNetConfig(width=0), "width"),
        (lambda: SwinConfig(heads=(3, 6, 12, 24)), "heads"),
        (lambda: SwinConfig(depths=(2, 2)), "depths"),
        (lambda: SwinConfig(drop_path=1.0), "drop_path"),
        (lambda: PyramidConfig(levels=(3, 5)), "levels"),
        (lambda: PyramidConfig(levels=(1, 2)), "levels"),
        (lambda: PyramidConfig(extra_levels=3), "extra_levels"),
        (lambda: ProposalConfig(nms_iou=1.5), "nms_iou"),
        (lambda: ProposalConfig(initial_probability=0.0), "initial_probability"),
        (lambda: ProposalConfig(keep_test=0), "keep_test"),
        (lambda: CascadeConfig(iou_thresholds=(0.5,)), "one entry a step"),
        (lambda: CascadeConfig(iou_thresholds=(0.5, 0.6, 1.7)), "iou_thresholds"),
        (lambda: CascadeConfig(positive_fraction=-0.1), "positive_fraction"),
        (lambda: CascadeConfig(hidden=()), "hidden"),
        (lambda: ClassifierConfig(temperature=0.0), "temperature"),
        (lambda: MaskConfig(convs=-1), "convs"),
        (lambda: ModelConfig(pyramid=PyramidConfig(levels=(4, 5, 6))), "last level"),
        (lambda: ModelConfig(cascade=CascadeConfig(pool_levels=(2, 3))), "pool_levels"),
        (lambda: ModelConfig(pyramid=PyramidConfig(channels=20)), "norm_groups"),
        (lambda: ModelConfig(proposals=ProposalConfig(first_level=2)), "first_level"),
        (lambda: ModelConfig(pixel_std=(1.0, 0.0, 1.0)), "pixel_std"),
        (lambda: InferenceConfig(alpha=2.0), "alpha"),
        (lambda: InferenceConfig(max_detections=0), "max_detections"),
        (lambda: CenterNetLossConfig(size_ranges=((5.0, 5.0),)), "size_ranges"),
        (lambda: ClassificationLossConfig(sampled_categories=-1), "sampled_categories"),
        (lambda: MixupLossConfig(beta=-1.0), "beta"),
        (lambda: MixupLossConfig(temperature=0.0), "temperature"),
    ],
)
def test_values_that_cannot_work_are_named(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_levels_and_strides():
    pyramid = PyramidConfig(levels=(2, 3), extra_levels=2)
    assert pyramid.all_levels == (2, 3, 4, 5)
    assert pyramid.strides == (4, 8, 16, 32)
    assert BackboneConfig(kind="swin", swin=SwinConfig(depths=(1,), heads=(1,))).stages == 1


def test_configurations_need_no_torch():
    code = (
        "import sys, proxydet.modeling.config, proxydet.losses.config; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The recipes: published numbers, strict files, one page of reference that cannot drift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proxydet.config import (
    differences,
    dump_yaml,
    field_docs,
    field_types,
    from_mapping,
    parse_yaml,
    to_mapping,
)
from proxydet.errors import ConfigError
from proxydet.recipes import RECIPES, RunConfig, absolute_paths, get_recipe, resolve_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_knows_its_name_and_survives_its_text(name):
    config = get_recipe(name)
    assert config.recipe == name
    assert RECIPES[name].__doc__
    assert from_mapping(RunConfig, parse_yaml(dump_yaml(config))) == config


def test_published_r50():
    config = get_recipe("r50")
    training, data = config.training, config.data
    assert (training.iterations, training.replicas) == (90_000, 8)
    assert (training.optimizer.learning_rate, training.optimizer.weight_decay) == (2e-4, 1e-4)
    assert training.optimizer.clip_value == 1.0
    assert (training.schedule.warmup_iterations, training.schedule.warmup_start) == (1000, 1e-3)
    assert (training.precision.backbone, config.seed, data.workers) == ("fp16", 7, 2)
    assert (training.evaluation.start, training.evaluation.period) == (65_000, 2500)
    assert (data.boxes.batch_size * 8, data.boxes.size, data.boxes.scale) == (64, 640, (0.1, 2.0))
    assert data.image_labels is not None
    assert data.image_labels.batch_size * 8 == 256
    assert (data.image_labels.size, data.image_labels.scale) == (320, (0.5, 1.5))
    assert data.image_labels.ratio / data.boxes.ratio == 4
    assert (data.repeat_threshold, data.flip_probability) == (0.001, 0.5)
    assert (config.inference.alpha, config.inference.beta) == (0.15, 0.35)
    assert training.weights is not None
    assert training.weights.name == "BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth"


def test_published_swinb():
    config = get_recipe("swinb")
    training, data = config.training, config.data
    assert (training.iterations, training.optimizer.learning_rate) == (180_000, 1e-4)
    assert (training.evaluation.start, training.evaluation.period) == (140_000, 10_000)
    assert (data.boxes.batch_size * 8, data.boxes.size) == (32, 896)
    assert data.image_labels is not None
    assert (data.image_labels.batch_size * 8, data.image_labels.size) == (128, 448)
    assert config.model.backbone.kind == "swin"
    assert training.weights is not None
    assert training.weights.name == "BoxSup-C2_Lbase_CLIP_SwinB_896b32_4x.pth"


@pytest.mark.parametrize("backbone", ["r50", "swinb"])
def test_variants(backbone):
    without = get_recipe(f"{backbone}_without_image_labels")
    assert without.data.image_labels is None
    assert (without.inference.alpha, without.inference.beta) == (0.35, 0.55)
    assert without.model == get_recipe(backbone).model
    fast = differences(get_recipe(backbone), get_recipe(f"{backbone}_fast"))
    assert fast.keys() == {
        "recipe", "data.ranks_share_group", "training.precision.heads", "training.precision.channels_last",
    }  # fmt: skip
    boxsup = get_recipe(f"boxsup_{backbone}")
    assert not boxsup.model.mixup_branch
    assert boxsup.data.image_labels is None


def test_file_and_overrides_win_in_this_order(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: small\nseed: 3\ntraining:\n  iterations: 50\n")
    config = resolve_config(None, file, ["training.iterations=60"])
    assert (config.recipe, config.seed, config.training.iterations) == ("small", 3, 60)
    assert config.model == get_recipe("small").model
    named = resolve_config("tiny", file)
    assert (named.recipe, named.training.iterations) == ("tiny", 50)
    assert named.model == get_recipe("tiny").model
    assert resolve_config().recipe == "r50"
    assert resolve_config(None, file, ["recipe=tiny"]) == named
    assert resolve_config("tiny", None, ["recipe=tiny"]) == get_recipe("tiny")


def test_a_file_and_overrides_are_checked_together(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: tiny\ndata: {test_shortest_side: 192}\n")
    sides = ["data.test_shortest_side=192", "data.test_longest_side=192"]
    config = resolve_config(None, file, sides[1:])
    assert (
        config == resolve_config("tiny", None, sides) == resolve_config("tiny", None, sides[::-1])
    )
    with pytest.raises(ConfigError, match="test_shortest_side"):
        resolve_config(None, file)


def test_a_saved_configuration_is_read_back_whole(tmp_path):
    config = resolve_config("swinb", None, ["data.image_labels=null", "seed=5"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert resolve_config(None, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("r5O", None, ()), "Did you mean 'r50"),
        ((None, None, ("recipe=smal",)), "Did you mean 'small"),
        ((None, None, ("seed=-1",)), "seed must be in"),
        ((None, None, ("learning_rate=1",)), "training.optimizer.learning_rate"),
        ((None, None, ("reproducibility=publish",)), "'published'"),
        (("tiny", None, ("recipe=small",)), "leave one|recipe is tiny"),
    ],
)
def test_mistakes(words, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve_config(*words)


def test_paths_become_absolute():
    config = absolute_paths(resolve_config("r50"))
    assert config.training.weights is not None
    assert config.training.weights.is_absolute()
    assert config.data.description is not None
    assert config.data.description.is_absolute()
    assert config.data.cache is None


def classes(cls: type) -> set[type]:
    from proxydet.config import config_class

    found = {cls}
    for annotation in field_types(cls).values():
        inner = config_class(annotation)
        if inner is not None:
            found |= classes(inner)
    return found


def test_every_key_is_documented_and_immutable():
    for cls in classes(RunConfig):
        assert set(field_docs(cls)) == set(field_types(cls)), cls
        assert cls.__dataclass_params__.frozen, cls


def test_configurations_load_without_torch():
    code = "import sys, proxydet.recipes; assert not {'torch', 'detectron2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_to_mapping_is_plain():
    text = str(to_mapping(get_recipe("r50")))
    assert "Config(" not in text


def test_size_ranges_fit_the_levels_that_propose():
    with pytest.raises(ConfigError, match=r"losses\.centernet\.size_ranges") as refused:
        resolve_config("small", overrides=["model.proposals.first_level=4"])
    assert "first_level" in str(refused.value.hint)
    fitting = "losses.centernet.size_ranges=[[0, 80], [64, 160], [128, .inf], [256, .inf]]"
    resolve_config("small", overrides=["model.proposals.first_level=4", fitting])

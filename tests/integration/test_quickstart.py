"""The whole job at its smallest: draw, train, evaluate, predict, report; and the comparison."""

import dataclasses
import html
import json
import re
import shlex

import pytest

from proxydet.data.synthetic import SyntheticConfig
from proxydet.errors import ConfigError, LockedError
from proxydet.quickstart import (
    Annotated,
    LabelAccuracy,
    QuickstartFolder,
    compare_mixup,
    quickstart_config,
    run_quickstart,
)
from proxydet.recipes import get_recipe

pytestmark = pytest.mark.usefixtures("unplotted")

DRAWN = SyntheticConfig(
    images_train=8,
    images_val=6,
    image_label_images_per_class=2,
    size=64,
    colours=2,
    shapes=2,
    textures=2,
    novel_classes=2,
    novel_covered=1,
)


def _recipe(iterations=2):
    recipe = get_recipe("tiny")
    checkpoints = dataclasses.replace(recipe.training.checkpoints, period=iterations)
    training = dataclasses.replace(
        recipe.training, iterations=iterations, device="cpu", checkpoints=checkpoints
    )
    return dataclasses.replace(recipe, training=training)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return run_quickstart(folder, drawn=DRAWN, recipe=_recipe())


def test_makes_everything_that_it_names(done):
    folder = done.folder
    assert folder.run.final_weights.is_file()
    assert folder.run.metrics.is_file()
    assert json.loads((folder.evaluation / "results.json").read_text())["results"]["segm"]
    assert {path.suffix for path in folder.predictions.iterdir()} == {".json", ".jpg"}


def test_scores_base_and_novel_classes_apart(done):
    assert done.base.categories == 6
    assert done.novel.categories == 2
    names = {group.name for group in done.evaluation.main.groups}
    assert {"novel, with image labels", "novel, without image labels"} <= names
    assert not any("ImageNet" in name for name in names), "the drawn classes are no ImageNet's"


def test_searches_for_other_words_than_the_data_sets_list(done):
    example = done.examples[0]
    assert 0 < len(example.asked) < done.base.categories + done.novel.categories
    assert set(example.found.labels) <= set(example.asked)
    written = json.loads((done.folder.predictions / f"{example.image.stem}.json").read_text())
    assert tuple(written["vocabulary"]) == example.asked
    assert len(written["detections"]) == len(example.found)


def test_the_report_holds_all_that_it_shows(done):
    page = done.folder.report.read_text(encoding="utf-8")
    assert "correct labels, novel classes" in page
    assert "<svg" in page
    assert "data:image/jpeg;base64," in page
    loaded = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(https?:|//)', page)
    assert not loaded, "nothing may be fetched from elsewhere"
    assert "proxydet eval --run" in page


def test_the_report_counts_right_labels_of_all_objects(done):
    annotations = json.loads((done.folder.data / "lvis_val.json").read_text())["annotations"]
    base, novel = done.labels(novel=False), done.labels(novel=True)
    assert base.objects + novel.objects == len(annotations)
    for counts in (base, novel):
        assert 0 <= counts.right <= counts.found <= counts.objects


def test_the_command_prints_right_labels_of_base_and_novel_objects(done, cli, monkeypatch):
    monkeypatch.setattr("proxydet.quickstart.run_quickstart", lambda *_, **__: done)
    printed = cli("quickstart").out
    told = cli("quickstart", "--json").data["right_labels"]
    for group in ("base", "novel"):
        counts = done.labels(novel=group == "novel")
        assert f"{counts.percent} of {group}" in printed
        assert told[group] == dataclasses.asdict(counts)
    assert cli("quickstart", "--seeds", "5").code == 2


def test_a_right_label_is_one_that_names_the_class():
    box = (0.0, 0.0, 1.0, 1.0)
    objects = [
        Annotated(name="red plain star", box_xyxy=box, novel=True, label=label)
        for label in ("red plain star", "red plain circle", None)
    ]
    assert LabelAccuracy.of(objects) == LabelAccuracy(objects=3, found=2, right=1)
    assert LabelAccuracy.of(objects).percent == "50.0%"
    assert LabelAccuracy.of(objects[2:]).percent == "-"


def test_every_command_of_the_report_works(done, cli, monkeypatch, tmp_path):
    page = html.unescape(done.folder.report.read_text(encoding="utf-8"))
    commands = re.findall(r"<code[^>]*>(proxydet [^<]+)</code>", page)
    assert [line.split()[1] for line in commands] == ["predict", "serve", "eval", "train"]
    monkeypatch.chdir(tmp_path)
    served = []
    monkeypatch.setattr("proxydet.serve.server.serve", lambda app, *_, **__: served.append(app))
    for line in commands:
        free_port = ("--port", "0") if " serve " in line else ()
        ended = cli(*shlex.split(line)[1:], *free_port)
        assert ended.code == 0, (line, ended)
    assert served


def test_every_step_is_timed(done):
    assert list(done.seconds) == ["draw the data set", "train", "evaluate", "predict"]
    assert min(done.seconds.values()) > 0


def test_a_second_call_trains_no_more_and_keeps_the_training_time(done):
    weights = done.folder.run.final_weights.read_bytes()
    lines = done.folder.run.metrics.read_text().splitlines()
    again = run_quickstart(done.folder.root, drawn=DRAWN, recipe=_recipe())
    assert again.folder.run.metrics.read_text().splitlines() == lines
    assert again.folder.run.final_weights.read_bytes() == weights
    assert again.seconds["train"] >= done.seconds["train"]
    assert again.evaluation.to_dict() == done.evaluation.to_dict()


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    with QuickstartFolder(tmp_path / "quickstart").held():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(LockedError):
            run_quickstart(tmp_path / "quickstart", drawn=DRAWN, recipe=_recipe())
        with pytest.raises(LockedError):
            compare_mixup(tmp_path / "quickstart", seeds=[1, 2, 3], drawn=DRAWN, recipe=_recipe())
        assert sorted(tmp_path.rglob("*")) == before


def test_damaged_times_of_earlier_steps_do_not_stop_it(done):
    done.folder.seconds.write_bytes(b'{"train": 1.0, "ev\0')
    again = run_quickstart(done.folder.root, drawn=DRAWN, recipe=_recipe())
    assert json.loads(done.folder.seconds.read_text()).keys() <= again.seconds.keys()


def test_another_configuration_in_the_same_folder_is_refused(done):
    with pytest.raises(ConfigError):
        run_quickstart(done.folder.root, drawn=DRAWN, recipe=_recipe(iterations=3))


def test_the_recipe_has_every_part_of_the_method(tmp_path):
    config = quickstart_config(tmp_path / "description.toml", seed=3)
    assert config.model.mixup_branch
    assert config.model.cascade.steps == 3
    assert config.data.image_labels is not None
    assert config.losses.classification.sampled_categories > 0
    assert config.losses.mixup.weight > 0
    assert config.inference.alpha > 0
    assert not quickstart_config(tmp_path, seed=3, mixup=False).model.mixup_branch


def test_compares_with_and_without_mixup_on_the_same_seeds(tmp_path):
    comparison = compare_mixup(tmp_path, seeds=[1, 2, 3], drawn=DRAWN, recipe=_recipe(1))
    assert comparison.seeds == (1, 2, 3)
    for measure in comparison.measures:
        assert len(measure.with_mixup) == len(measure.without_mixup) == 3
        pairs = zip(measure.with_mixup, measure.without_mixup, strict=True)
        assert measure.difference == pytest.approx(sum(a - b for a, b in pairs) / 3, nan_ok=True)
    page = comparison.report.read_text(encoding="utf-8")
    assert "with mixup" in page
    runs = {path.name for path in tmp_path.iterdir() if path.name.startswith("seed_")}
    assert runs == {
        f"seed_{seed}_{kind}_mixup" for seed in (1, 2, 3) for kind in ("with", "without")
    }
    without = QuickstartFolder(tmp_path / "seed_1_without_mixup").run.config.read_text()
    assert "mixup_branch: false" in without


@pytest.mark.parametrize("seeds", [[1], [1, 2], [1, 1, 2]])
def test_too_few_seeds_are_no_comparison(tmp_path, seeds):
    with pytest.raises(ConfigError, match="at least 3"):
        compare_mixup(tmp_path, seeds=seeds)

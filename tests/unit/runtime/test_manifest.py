"""A run's records hold what it was made from; two runs' records say what differed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from proxydet.errors import InputError
from proxydet.manifest import (
    RunManifest,
    build_manifest,
    installed_packages,
    read_run_records,
    source_digest,
    write_run_records,
)
from proxydet.runtime.report import Field, environment
from proxydet.runtime.run_comparison import RANKS, compare_runs

REPORT = environment(quick=True)
MANIFEST = build_manifest(
    "training",
    configuration={"seed": 7, "training": {"iterations": 100, "log": {"period": 20}}},
    digests={"vocabulary": "aa", "start_checkpoint": "bb"},
    mode="off",
    seeds={"seed": 7},
    world_size=2,
)


@pytest.fixture
def run(tmp_path):
    def make(name: str, manifest: RunManifest = MANIFEST, report=REPORT, losses=()):
        folder = tmp_path / name
        folder.mkdir()
        write_run_records(folder, manifest, report)
        records = [
            {"iteration": 20 * (i + 1), "losses": {"total": value}, "time": 0.1 * i}
            for i, value in enumerate(losses)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return folder

    return make


def with_field(key: str, value: str):
    fields = [replace(f, value=value) if f.key == key else f for f in REPORT.fields]
    return replace(REPORT, fields=tuple(fields))


def test_records_come_back_as_they_were_written(run):
    folder = run("a")
    manifest, report = read_run_records(folder)
    assert report == REPORT
    assert replace(manifest, environment="") == MANIFEST
    assert read_run_records(folder / "manifest.json")[0] == manifest
    assert sorted(p.name for p in folder.iterdir()) == [
        "environment.json",
        "manifest.json",
        "metrics.jsonl",
    ]


def test_a_changed_manifest_is_refused_and_one_of_0_1_is_read(run):
    folder = run("a")
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "world_size": 7}))
    with pytest.raises(InputError, match="SHA-256") as caught:
        read_run_records(folder)
    assert str(path) in caught.value.message
    content["sha255"] = content.pop("sha256")  # damage to the key itself
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="SHA-256"):
        read_run_records(folder)
    del content["sha255"]
    del content["environment"]
    path.write_text(json.dumps({**content, "format": 1}))
    assert read_run_records(folder)[0] == MANIFEST


def test_a_changed_environment_is_refused(run):
    folder = run("a")
    path = folder / "environment.json"
    content = json.loads(path.read_text())
    content["fields"][0]["value"] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="SHA-256") as caught:
        read_run_records(folder)
    assert caught.value.path == path


def test_a_manifest_knows_packages_and_source(run):
    assert MANIFEST.packages["torch"] == installed_packages()["torch"]
    assert "pb1-detectron2" in MANIFEST.packages or "detectron2" in MANIFEST.packages
    assert set(MANIFEST.git) >= {"proxydet.commit", "proxydet.uncommitted"}


def test_packages_are_found_whatever_their_description_is_kept_in(tmp_path, monkeypatch):
    (tmp_path / "one_file.egg-info").write_text(
        "Metadata-Version: 1.1\nName: one_file\nVersion: 7.1\n"
    )
    folder = tmp_path / "of_folder.egg-info"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 1.1\nName: of-folder\nVersion: 7.2\n\nText")
    monkeypatch.syspath_prepend(tmp_path)
    found = installed_packages()
    assert (found["one-file"], found["of-folder"]) == ("7.1", "7.2")


UNSEALED = {key: value for key, value in MANIFEST.to_dict().items() if key != "sha256"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"format": 0}',
        '{"format": 1}',
        json.dumps({**UNSEALED, "more": 1}),
        json.dumps({**UNSEALED, "digests": 3}),
        json.dumps({k: v for k, v in UNSEALED.items() if k != "mode"}),
    ],
)
def test_folders_that_are_no_runs_are_told(tmp_path, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        read_run_records(tmp_path)


def test_equal_runs_have_no_difference(run):
    found = compare_runs(run("a", losses=[1.0, 0.5]), run("b", losses=[1.0, 0.5]))
    assert found.differences == ()
    assert found.first_divergence is None
    assert "2 common records are equal" in found.conclusion


def test_the_likeliest_cause_comes_first(run):
    other = replace(
        MANIFEST,
        digests={"vocabulary": "cc", "start_checkpoint": "bb"},
        packages={**MANIFEST.packages, "rich": "0.0", "pillow": "1.0"},
        configuration={"seed": 7, "training": {"iterations": 100, "log": {"period": 50}}},
    )
    second = run("b", other, with_field("torch", "9.9 @/x"), losses=[1.0, 0.25])
    found = compare_runs(run("a", losses=[1.0, 0.5]), second)
    assert found.differences[0].key == "digests.vocabulary"
    order = [RANKS.index(d.suspicion) for d in found.differences]
    assert order == sorted(order)
    by_key = {d.key: d.suspicion for d in found.differences}
    assert by_key == {
        "digests.vocabulary": "decides results",
        "environment.torch": "changes last bits",
        "configuration.training.log.period": "harmless",
        "packages.pillow": "unlikely",
        "packages.rich": "harmless",
    }
    assert found.first_divergence == 40
    assert "digests.vocabulary" in found.conclusion


def test_only_libraries_differ(run):
    second = run("b", report=with_field("cpu", "another"), losses=[2.0])
    found = compare_runs(run("a", losses=[1.0]), second)
    assert found.first_divergence == 20
    assert "last bits" in found.conclusion
    assert "environment.cpu" in found.conclusion


@pytest.mark.parametrize(("mode", "words"), [("off", "verify determinism"), ("strict", "a bug")])
def test_unexplained_differences_depend_on_the_mode(run, mode, words):
    manifest = replace(MANIFEST, mode=mode)
    found = compare_runs(run("a", manifest, losses=[1.0]), run("b", manifest, losses=[1.5]))
    assert words in found.conclusion


def test_absent_keys_and_other_values_are_differences(run):
    other = replace(MANIFEST, seeds={"seed": 8}, digests={}, world_size=4, mode="strict")
    by_key = {d.key: d for d in compare_runs(run("a"), run("b", other)).differences}
    assert by_key["digests.vocabulary"].second == "(absent)"
    assert by_key["seeds.seed"].suspicion == "decides results"
    assert by_key["world_size"].suspicion == "decides results"
    assert by_key["mode"].suspicion == "changes last bits"


@pytest.mark.parametrize("cut", ['{"iteration": 40, "los', '{"iteration": 40, "losses": {"a": 1}'])
def test_a_line_cut_short_and_nan_losses_are_no_divergence(run, cut):
    first, second = run("a", losses=[float("nan")]), run("b", losses=[float("nan")])
    with (second / "metrics.jsonl").open("a") as file:
        file.write(cut)
    found = compare_runs(first, second)
    assert (found.first_divergence, found.compared_records) == (None, 1)


def test_a_run_is_given_as_its_folder_or_a_file_in_it(run):
    first, second = run("a", losses=[1.0]), run("b", losses=[2.0])
    found = compare_runs(first / "manifest.json", second / "environment.json")
    assert found.first_divergence == 20
    with pytest.raises(InputError, match=r"no run folder .*/typo"):
        compare_runs(first, second / "typo")


def test_a_run_that_was_killed_before_its_first_record_is_said_to_have_none(run):
    second = run("b")
    (second / "metrics.jsonl").unlink()
    first = run("a", losses=[1.0])
    assert compare_runs(first, second).conclusion == (
        "The runs recorded no losses of the same iterations. "
        "Nothing recorded that acts on results differs."
    )


def test_a_folder_without_the_environment_is_told(run):
    first, second = run("a"), run("b")
    (second / "environment.json").unlink()
    with pytest.raises(InputError, match=r"environment\.json") as caught:
        compare_runs(first, second)
    assert "killed" in (caught.value.hint or "")
    field = '{"key": "a", "section": "s", "label": "A", "value": null, "verdict": "odd"}'
    damaged = f'{{"format": 1, "created": "", "quick": true, "fields": [{field}]}}'
    (second / "environment.json").write_text(damaged)
    with pytest.raises(InputError, match=r"environment\.json: "):
        compare_runs(first, second)


def test_evaluations_have_no_losses_to_miss(run):
    manifest = replace(MANIFEST, kind="evaluation")
    found = compare_runs(run("a", manifest), run("b", manifest))
    assert found.conclusion == "Nothing recorded that acts on results differs."


def suspicions(run, other: RunManifest, report=REPORT) -> dict[str, str]:
    found = compare_runs(run("a"), run("b", other, report)).differences
    return {difference.key: difference.suspicion for difference in found}


def test_settings_that_take_no_part_in_training_are_no_suspects(run):
    configuration = {
        **MANIFEST.configuration,
        "data": {"workers": 2, "cache": "x"},
        "inference": {"flip": True},
        "training": {"iterations": 100, "log": {"period": 20}, "threads": 2, "device": "cpu"},
    }
    assert suspicions(run, replace(MANIFEST, configuration=configuration)) == {
        "configuration.training.device": "changes last bits",
        "configuration.training.threads": "changes last bits",
        "configuration.inference.flip": "unlikely",
        "configuration.data.workers": "harmless",
        "configuration.data.cache": "harmless",
    }


def test_of_an_evaluation_the_inference_decides(run, tmp_path):
    for name, flip in (("a", True), ("b", False)):
        manifest = replace(MANIFEST, kind="evaluation", configuration={"inference": {"flip": flip}})
        run(name, manifest)
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b").differences
    assert (found.key, found.suspicion) == ("configuration.inference.flip", "decides results")


def test_seed_and_mode_are_told_once(run):
    configuration = {**MANIFEST.configuration, "seed": 8, "reproducibility": "strict"}
    other = replace(MANIFEST, seeds={"seed": 8}, mode="strict", configuration=configuration)
    assert suspicions(run, other) == {
        "seeds.seed": "decides results",
        "mode": "changes last bits",
    }


@pytest.mark.parametrize(
    ("source", "suspicion"),
    [(MANIFEST.git["proxydet.source"], "harmless"), ("other", "decides results")],
)
def test_another_commit_of_the_same_files_is_harmless(run, source, suspicion):
    git = {**MANIFEST.git, "proxydet.commit": "f00", "proxydet.source": source}
    found = suspicions(run, replace(MANIFEST, git=git, proxydet="9.9"))
    assert set(found.values()) == {suspicion}
    assert {"git.proxydet.commit", "proxydet"} <= found.keys()


def test_files_that_nobody_digested_are_not_the_same(run, tmp_path):
    for name, commit in (("a", "1"), ("b", "2")):
        run(name, replace(MANIFEST, git={"proxydet.commit": commit}))
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b").differences
    assert found.suspicion == "decides results"


def test_the_digest_of_the_source_is_of_names_and_contents(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "x.py").write_text("x = 1\n")
    first = source_digest(tmp_path / "one")
    assert source_digest(tmp_path / "two") == first
    (tmp_path / "two" / "part" / "x.py").write_text("x = 2\n")
    assert source_digest(tmp_path / "two") != first
    (tmp_path / "two" / "part" / "x.py").write_text("x = 1\n")
    (tmp_path / "two" / "part" / "x.py").rename(tmp_path / "two" / "part" / "y.py")
    assert source_digest(tmp_path / "two") != first


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("torch", REPORT.value("torch").split(" @")[0] + " @/elsewhere/torch"),
        ("memory", REPORT.value("memory").split(",")[0] + ", 0.1 GiB available"),
        ("disk", "data: 1 GiB free of 2 GiB"),
        ("proxydet", "0.1.0 @/elsewhere"),
    ],
)
def test_places_and_free_space_are_no_differences(run, key, value):
    assert suspicions(run, MANIFEST, with_field(key, value)) == {}


def test_what_a_mode_sets_is_not_a_suspect_of_its_own(run, tmp_path):
    def variables(text: str):
        return with_field("variables", text)

    run("off", report=variables("OMP_NUM_THREADS=1"))
    run("off too", report=variables("CUBLAS_WORKSPACE_CONFIG=:16:8, OMP_NUM_THREADS=1"))
    set_by_mode = variables("CUBLAS_WORKSPACE_CONFIG=:4096:8, OMP_NUM_THREADS=1")
    run("strict", replace(MANIFEST, mode="strict"), set_by_mode)

    def keys(other: str) -> list[str]:
        return [d.key for d in compare_runs(tmp_path / "off", tmp_path / other).differences]

    assert keys("strict") == ["mode"]
    assert keys("off too") == ["environment.variables"]


def test_what_a_quick_report_did_not_ask_is_no_difference(run):
    asked = Field(key="torch.built_with", section="x", label="x", value="flags")
    full = replace(REPORT, fields=(*REPORT.fields, asked), quick=False)
    assert suspicions(run, MANIFEST, full) == {}


def test_a_run_that_ended_early_is_said_to_have(run):
    found = compare_runs(run("a", losses=[1.0, 0.5, 0.4]), run("b", losses=[1.0, 0.5]))
    assert found.conclusion == (
        "The losses of all 2 common records are equal. "
        "The records of one run end at iteration 40, those of the other at 60."
    )

"""The built-in catalogue is right, and a hostile one cannot do harm."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxydet.artifacts import Artifact, Catalogue, Content, Family, Login, Provided, Unpack
from proxydet.config import field_types
from proxydet.errors import ConfigError

HEAD = 'title = "t"\nlicence = "l"\n'
GOOD = (
    '[[artifacts]]\nname = "mine"\naddresses = ["https://example.org/f"]\ntarget = "models/f"\n'
    + HEAD
)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load()


def load(tmp_path: Path, text: str) -> Catalogue:
    path = tmp_path / "more.toml"
    path.write_text(text, encoding="utf-8")
    return Catalogue.load([path])


def test_the_promised_names_are_there(catalogue):
    promised = (
        "r50 swinb eval transfer metadata boxsup-r50 boxsup-swinb proxydet-r50 proxydet-r50-inl proxydet-swinb-inl "
        "detic-r50 detic-swinb lvis coco imagenet-21k-lvis objects365-val openimages-val clip-vit-b32"
    )
    for name in promised.split():
        assert catalogue.resolve([name])


def test_what_training_needs(catalogue):
    names = {artifact.name for artifact in catalogue.resolve(["r50"])}
    assert {
        "boxsup-r50",
        "lvis-train",
        "lvis-val",
        "coco-train2017",
        "coco-val2017",
        "lvis-embeddings",
    } <= names
    assert sum(name.startswith("imagenet-21k-lvis/") for name in names) == 997
    assert len(catalogue.resolve(["r50", "swinb", "lvis", "lvis-train"])) == len(names) + 1


def test_the_published_layout(catalogue):
    def target(name: str) -> str:
        return catalogue.resolve([name])[0].target

    assert target("boxsup-r50") == "models/BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth"
    assert target("lvis-embeddings") == "datasets/metadata/lvis_v1_clip_a+cname.npy"
    assert target("imagenet-21k-lvis/n02682922") == "datasets/imagenet/ImageNet-21K/n02682922.tar"
    assert catalogue.resolve(["BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth"])[0].name == "boxsup-r50"


def test_every_entry_is_pinned_or_checked_by_what_it_holds(catalogue):
    for artifact in catalogue.every():
        assert artifact.pinned or artifact.content is not None or artifact.unpack is not None, (
            artifact.name
        )
        assert artifact.licence
        if not artifact.pinned:
            assert all(address.startswith("https://") for address in artifact.addresses)
        # The digest pins a file; its size serves the plan alone, and is asked of the server where it is not published.
        has_size = artifact.pinned and artifact.name != "lvis-minival"
        assert (artifact.size is not None) == has_size, artifact.name


def test_entries_of_ones_own(tmp_path, monkeypatch):
    assert load(tmp_path, GOOD).resolve(["mine"])[0].target == "models/f"
    monkeypatch.setenv("PROXYDET_CATALOGUE", str(tmp_path / "more.toml"))
    assert Catalogue.load().resolve(["mine"])


def test_a_family_of_ones_own(tmp_path):
    text = (
        '[[families]]\nname = "f"\nvariable = "n"\nfirst = 2\nlast = 4\naddresses = ["https://example.org/{n}.tar.gz"]\n'
        'target = "datasets/f/{n}.tar.gz"\nunpack = { folder = "datasets/f", provides = [{ path = "p{n}" }] }\n'
        + HEAD
    )
    members = load(tmp_path, text).resolve(["f"])
    assert [member.name for member in members] == ["f/2", "f/3", "f/4"]
    assert members[0].addresses == ("https://example.org/2.tar.gz",)
    assert members[0].unpack is not None
    assert members[0].unpack.provides[0].path == "p2"


def test_the_example_of_the_reference_page(tmp_path, repository):
    page = (repository / "docs/reference/catalogue.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    text = re.sub(r"<64[^>]*>", "0" * 64, example[1])
    names = [artifact.name for artifact in load(tmp_path, text).resolve(["kitchen"])]
    assert names == ["kitchen-r50", "kitchen-photos", "kitchen-tars/ladle", "kitchen-tars/whisk"]


def test_the_reference_page_names_every_key(repository):
    page = (repository / "docs/reference/catalogue.md").read_text(encoding="utf-8")
    for kind in (Artifact, Family, Login, Unpack, Provided, Content):
        for key in field_types(kind):
            assert f"`{key}`" in page, key


TARGETS = [
    "/etc/passwd", "../up", "models/../../up", "models//f", "", ".", "models/.ssh", "C:/x", "a\\b", "models/\u0000",
    "models/" + "x" * 300, "models/\u202ex", "models/", "~/x/..", "models/f/..", "x/" * 600 + "f",
]  # fmt: skip


def artifact(target: str) -> Artifact:
    address = "https://example.org/f"
    return Artifact(name="a", title="t", addresses=(address,), target=target, licence="l")


@pytest.mark.parametrize("target", TARGETS)
def test_targets_that_leave_the_root(target):
    with pytest.raises(ConfigError):
        artifact(target)


@given(st.text(max_size=60))
def test_whatever_target_is_accepted_stays_inside(target):
    try:
        artifact(target)
    except ConfigError:
        return
    inside = Path("/srv/data") / target
    assert Path(*inside.parts).resolve().is_relative_to("/srv/data")
    assert ".." not in inside.parts


ADDRESSES = [
    "http://example.org/f", "ftp://example.org/f", "file:///etc/passwd", "https://", "https:///f", "example.org/f",
    "https://user:secret@example.org/f", "https://example.org:99999999/f", "https://exa mple.org/", "javascript:alert(1)",
    "https://[::1/f", "https://example.org/\nHost: x",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_refused(tmp_path, address):
    text = GOOD.replace("https://example.org/f", address.replace("\n", "\\n"))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "secret" not in caught.value.message


def test_plain_http_is_accepted_with_a_digest(tmp_path):
    text = GOOD.replace("https:", "http:") + f'sha256 = "{"0" * 64}"\n'
    assert load(tmp_path, text).resolve(["mine"])[0].pinned


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + 'sha265 = "x"\n', "sha256"),
        (GOOD + 'sha256 = "xyz"\n', "64 lower-case"),
        (GOOD + "size = -1\n", "between 0"),
        (GOOD + "size = 1.5\n", "integer"),
        (GOOD + "size = true\n", "integer"),
        (GOOD + "size = nan\n", "integer"),
        (GOOD.replace('"mine"', '"../x"'), "may hold only"),
        (GOOD.replace('"mine"', '"lvis"'), "already used"),
        (GOOD + GOOD, "already used"),
        (GOOD.replace("models/f", "models/clip/ViT-B-32.pt"), "would both be written"),
        (GOOD.replace("models/f", "models/clip/ViT-B-32.pt/f"), "below the file"),
        (GOOD.replace('["https://example.org/f"]', "[]"), "at least one address"),
        (GOOD + 'content = { kind = "checkpoint" }\n', "layout"),
        ("[groups.a]\ntitle = 't'\nholds = ['b']\n[groups.b]\ntitle = 't'\nholds = ['a']\n", "contains itself"),
        ("[groups.a]\ntitle = 't'\nholds = ['nothing']\n", "no artifact called"),
        ("[groups.a]\ntitle = 't'\nholds = []\n", "must name something"),
        ("artifacts = 3\n", "list"),
        ("x = " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("\x00", "is not text"),
        ("a.b = 1" + "0" * 5000, "not valid TOML"),
        ("[[families]]\nname='f'\nvariable='n'\nfirst=0\nlast=99999999999999\naddresses=['https://e.org/{n}']\n"
         "target='models/{n}'\n" + HEAD, "1 to 25000"),
        ("[[families]]\nname='f'\nvariable='n'\nvalues=['../../x']\naddresses=['https://e.org/{n}']\n"
         "target='models/{n}'\n" + HEAD, "may hold only"),
    ],
)  # fmt: skip
def test_catalogues_that_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert (
        "more.toml" in caught.value.message
        or "group" in caught.value.message
        or "written" in caught.value.message
        or "no artifact" in caught.value.message
    )


def test_a_catalogue_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Catalogue.load([tmp_path / "absent.toml"])
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (9 << 20))
    with pytest.raises(ConfigError, match="larger"):
        Catalogue.load([big])


@settings(max_examples=15)
@given(st.text(max_size=300))
def test_any_text_is_a_catalogue_or_a_clear_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_text(text, encoding="utf-8")
    with contextlib.suppress(ConfigError):
        Catalogue.load([path])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sets/coco/train2017/000000000009.jpg", "coco-train2017"),
        ("/data/coco/annotations/instances_val2017.json", "coco-annotations"),
        ("lvis/lvis_v1_train.json", "lvis-train"),
        ("imagenet/ImageNet-21K/n02691156.tar", "imagenet-21k-lvis"),
        ("x/objects365/val/images/v1/patch3/a.jpg", "objects365-val-v1"),
        ("x/metadata/coco_clip_a+cname.npy", "coco-embeddings"),
        ("xcoco/train2017x/9.jpg", None),
        ("mine/annotations.json", None),
    ],
)
def test_where_a_file_of_the_layout_comes_from(catalogue, path, name):
    assert catalogue.name_of_source(Path(path)) == name
    assert name is None or catalogue.resolve([name])


def test_hints_name_what_can_be_downloaded(catalogue, repository):
    named = {
        name
        for folder in ("proxydet", "proxydet_cli")
        for path in (repository / folder).rglob("*.py")
        for name in re.findall(r"proxydet download ([a-z0-9][\w-]*)", path.read_text("utf-8"))
    }
    named -= {"puts", "says", "fills", "calls"}
    assert {"imagenet-21k-lvis", "clip-vit-b32"} <= named
    assert all(catalogue.resolve([name]) for name in named)

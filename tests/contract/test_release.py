"""What a release must be: versions that agree, locks that cover, a wheel that is whole, nothing of one machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from proxydet import errors
from proxydet._version import __version__
from proxydet_cli import failures
from proxydet_cli.reference import PAGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCKS = ["requirements.lock", "requirements-dev.lock"]

# Spelt in pieces, so that this file does not hold what it forbids.
FORBIDDEN = [
    "py" + "pi.org",
    "python" + "hosted",
    "download." + "pytorch.org/whl",
    "/wo" + "rk/",
    "/ro" + "ot/",
    "/home/" + "runner",
]


def tracked_files() -> list[Path]:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [REPOSITORY / name for name in listing.stdout.split("\0") if name]


def texts() -> Iterator[tuple[Path, str]]:
    for path in tracked_files():
        if path.is_file():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_index_host_and_no_path_of_a_machine():
    found = [
        f"{path.relative_to(REPOSITORY)}: {word}"
        for path, text in texts()
        for word in FORBIDDEN
        if word in text
    ]
    assert found == []


def test_no_loose_ends():
    loose = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|raise NotImplemented" + "Error")
    found = [
        f"{path.relative_to(REPOSITORY)}: {loose.search(text)}"
        for path, text in texts()
        if path.suffix == ".py" and loose.search(text)
    ]
    assert found == []


def test_changelog_begins_with_unreleased_and_this_version():
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", __version__]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> set[str]:
    text = (REPOSITORY / name).read_text()
    return {canonical(match) for match in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)}


def named(requirements: list[str]) -> set[str]:
    return {canonical(re.split(r"[^A-Za-z0-9._-]", text)[0]) for text in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_covers_every_dependency(lock):
    assert named(PROJECT["dependencies"]) <= locked(lock), "run: make lock"
    if "dev" in lock:
        extras = PROJECT["optional-dependencies"]
        (inner,) = re.findall(r"proxydet\[(.*)\]", " ".join(extras["dev"]))
        wanted = named([text for extra in ("dev", *inner.split(",")) for text in extras[extra]])
        assert wanted - {canonical(PROJECT["name"])} <= locked(lock), "run: make lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_version_has_hashes_and_no_address(lock):
    text = (REPOSITORY / lock).read_text()
    assert "://" not in text
    entries = re.split(r"\n(?=\S)", text)
    assert all("--hash=sha256:" in entry for entry in entries if re.match(r"[A-Za-z0-9]", entry))


def test_locks_agree():
    def versions(lock: str) -> set[str]:
        return set(re.findall(r"^\S+==\S+", (REPOSITORY / lock).read_text(), re.MULTILINE))

    assert versions(LOCKS[0]) <= versions(LOCKS[1])


def test_exit_codes_are_documented():
    page = (REPOSITORY / "docs/reference/exit-codes.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    raised = {
        kind("m").exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ProxydetError)
    }
    told = {int(code) for code in re.findall(r"^(\d+) ", failures.__doc__ or "", re.MULTILINE)}
    assert raised <= documented
    assert told == documented


@pytest.mark.parametrize("name", PAGES)
def test_reference_pages_are_fresh(name):
    typer = version("typer")
    if (
        name == "commands.md"
        and f"\ntyper=={typer} " not in (REPOSITORY / "requirements.lock").read_text()
    ):
        pytest.skip(f"written with another Typer than {typer}, which words its help differently")
    assert (REPOSITORY / "docs/reference" / name).read_text() == PAGES[name](), "run: make docs"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    for path, text in texts():
        if path.suffix != ".md":
            continue
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            page = path.parent / target if target else path
            assert page.exists(), f"{path.relative_to(REPOSITORY)}: {target}"
            if anchor and page.suffix == ".md":
                assert anchor in anchors(page), f"{path.relative_to(REPOSITORY)}: {target}#{anchor}"


def test_files_named_in_pages_exist():
    """Of all pages those in our folders; of the architecture page also those of ``proxydet/`` named without it."""
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    folders = r"(?:proxydet|proxydet_cli|tests|benchmarks|docs)/"
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = {
            REPOSITORY / name for name in re.findall(rf"(?<![\w/.-]){folders}[\w/.-]+\w", text)
        }
        if page.name == "architecture.md":
            named |= {
                REPOSITORY / "proxydet" / name for name in re.findall(r'(?:"|, )([\w/]+\.py)', text)
            }
        missing = sorted(str(path.relative_to(REPOSITORY)) for path in named if not path.exists())
        assert missing == [], page.relative_to(REPOSITORY)


def test_citation_names_this_version_and_the_paper():
    content = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    # What the format requires.
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert (content["version"], content["license"]) == (__version__, PROJECT["license"])
    paper = content["preferred-citation"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])


def test_makefile_targets_of_the_workflows_exist():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    programs = [REPOSITORY / ".ci/run", *(REPOSITORY / ".github/workflows").glob("*.yml")]
    assert len(programs) == 3
    for path in programs:
        text = path.read_text()
        assert set(re.findall(r"^(?:.*run: )?make ([a-z-]+)", text, re.MULTILINE)) <= targets
        if path.suffix == ".yml":
            jobs = yaml.safe_load(text)["jobs"]
            assert all("timeout-minutes" in job or "environment" in job for job in jobs.values())
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


def test_a_release_is_published_without_a_stored_token():
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "build"
    assert "secrets." not in json.dumps(jobs)


def test_the_dockerfile_names_what_exists():
    lines = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[1][0] == "FROM"
    text = "\n".join(rest for _, rest in steps)
    for kind, rest in steps:
        if kind == "RUN":  # as the shell reads it
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    kept = (REPOSITORY / ".dockerignore").read_text().split()
    copied = [name for kind, rest in steps if kind == "COPY" for name in rest.split()[:-1]]
    assert copied
    for name in copied:
        assert (REPOSITORY / name).exists()
        assert f"!{name}" in kept or f"!{name}/" in kept
    needed = {PROJECT["readme"], *PROJECT["license-files"], "proxydet", "proxydet_cli"}
    assert needed < set(copied)  # to build the package
    assert set(re.findall(r"--extra (\S+)", text)) <= set(PROJECT["optional-dependencies"])
    arguments = {rest.partition("=")[0] for kind, rest in steps if kind == "ARG"}
    assert all(f"${name}" in text or f"${{{name}}}" in text for name in arguments)
    assert set(re.findall(r"--build-arg (\w+)=", "\n".join(lines))) <= arguments


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """The folder of wheel and sdist of a copy of the tracked files, built without network."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        if path.is_file():
            target = source / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for kind in ("sdist", "wheel"):
        build = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
        subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    [built] = distributions.glob("*.whl")
    return built


def test_sdist_holds_every_tracked_file(distributions):
    [built] = distributions.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(REPOSITORY).as_posix() for path in tracked_files()}
    assert expected - held == set()


def test_wheel_holds_every_file_of_the_packages(wheel):
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in tracked_files()
        if path.relative_to(REPOSITORY).parts[0] in {"proxydet", "proxydet_cli"} and path.is_file()
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_installed_wheel_works_without_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import sys; sys.path.insert(0, '.'); import proxydet; print(proxydet.__file__);"
        "from proxydet_cli.main import main; sys.exit(main(['--version']))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == f"proxydet {__version__}"
    assert str(REPOSITORY) not in run.stdout

"""What holds for every command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from proxydet_cli.app import COMMANDS, load_command

REPOSITORY = Path(__file__).resolve().parents[2]


def module_file(name: str) -> Path:
    return REPOSITORY / f"proxydet_cli/commands/{name.replace('-', '_')}.py"


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, or its subcommands where it has some."""
    children = getattr(command, "commands", None)
    if not children:
        yield name, command
        return
    for child, subcommand in children.items():
        yield from leaves(f"{name} {child}", subcommand)


def all_leaves() -> list[tuple[str, Any]]:
    # A listed command without a module fails a test of its own, not the collection of all.
    present = [name for name in COMMANDS if module_file(name).is_file()]
    return [leaf for name in present for leaf in leaves(name, load_command(name))]


def options_of(command: Any) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)}


def help_of(name: str, command: Any) -> str:
    return str(command.get_help(typer.Context(command, info_name=f"proxydet {name}")))


def test_commands_and_modules_are_the_same():
    files = {p.stem.replace("_", "-") for p in (REPOSITORY / "proxydet_cli/commands").glob("*.py")}
    assert files - {"--init--"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_help_fits_an_80_column_terminal(name):
    assert len(COMMANDS[name]) <= 78 - 6 - len("quickstart"), "the listing would cut it off"
    assert COMMANDS[name].endswith(".")


@pytest.mark.parametrize(("name", "command"), all_leaves(), ids=lambda value: str(value)[:40])
def test_help_explains_with_an_example(name, command):
    text = help_of(name, command)
    assert "Examples:" in text
    assert f"proxydet {name}" in text.split("Examples:")[1]
    described = [p for p in command.params if getattr(p, "help", None)]
    assert len(described) == len(command.params), "an option has no help text"
    assert "--install-completion" not in text
    known = options_of(command) | {"--help"}
    assert "--json" in known
    for line in text.split("Examples:")[1].splitlines():
        if f"proxydet {name}" in line:
            used = set(re.findall(r"(?<=\s)--?[a-zA-Z][\w-]*", line.split(f"proxydet {name}")[1]))
            assert used <= known, line


def documented() -> list[tuple[str, str]]:
    """Every line of a code block in our pages, and of the Dockerfile, that calls proxydet, with the page."""
    image = (REPOSITORY / "Dockerfile").read_text("utf-8")
    in_image = re.findall(r"(?:docker run .* proxydet(?::cuda)?|&& proxydet) ([a-z][^#\n]*)", image)
    assert len(in_image) > 3
    pages = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
    return [("Dockerfile", line) for line in in_image] + [
        (page.relative_to(REPOSITORY).as_posix(), match[1])
        for page in sorted(pages)
        if page.name != "commands.md"
        for block in re.findall(r"^```.*?^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for match in re.finditer(
            r"^\s*(?:\$ |exec |srun (?:-\S+ )*)?(?:\S+/bin/)?proxydet ([a-z][^#\n]*)",
            block,
            re.MULTILINE,
        )
    ]


def test_commands_in_the_documentation_exist():
    known = dict(all_leaves())
    for page, line in documented():
        words = line.split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        name = f"{name} add" if name == "index" else name  # its default subcommand
        assert name in known, f"{page}: proxydet {line}"
        used = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert used <= options_of(known[name]), f"{page}: proxydet {line}"


def test_options_named_in_the_documentation_exist():
    """Also those in prose, of whatever command."""
    known = set().union(*(options_of(command) for _, command in all_leaves()))
    known |= {"--help", "--version", "--verbose"}
    known |= {"--no-deps", "--require-hashes"}  # pip
    known |= {"--build-arg", "--rm", "--user"}  # docker
    # SLURM
    known |= {
        "--array",
        "--cpus-per-task",
        "--gpus",
        "--gpus-per-node",
        "--nodes",
        "--ntasks",
        "--ntasks-per-node",
    }
    known |= {"--requeue", "--kill-on-bad-exit", "--signal", "--data-binary"}  # SLURM, and curl
    for page in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]:
        if page.name != "commands.md":
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*\w", page.read_text("utf-8")))
            assert named <= known, page.relative_to(REPOSITORY)


def test_programs_and_yaml_in_the_documentation_can_be_read():
    read = {"python": ast.parse, "yaml": yaml.safe_load}
    for page in (REPOSITORY / "docs").rglob("*.md"):
        text = page.read_text("utf-8")
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            read.get(kind, str)(block)


def test_only_output_writes(trees):
    for path, tree in trees.items():
        if path.parts[0] == "proxydet_cli" and path.name not in {"output.py", "reference.py"}:
            called = {
                ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)
            }
            assert not called & {"print", "typer.echo", "typer.secho", "rich.print"}, path

"""The commands, and how each is loaded only when it is asked for.

To add a command: write ``commands/<name>.py`` with an ``app`` (see :mod:`proxydet_cli.options`), and add its
name and one line of help to :data:`COMMANDS`. Modules of commands import the core inside functions, so that
``--help`` stays quick.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from proxydet_cli.options import Group, examples, heading, term
from proxydet_cli.output import Output, show_logs

GROUPS: dict[str, dict[str, str]] = {
    "Start": {
        "quickstart": "Train, evaluate and predict on a small synthetic data set.",
    },
    "Environment": {
        "setup": "Install detectron2 if missing and check the environment.",
        "env": "Report the environment next to the published one.",
        "patch": "Apply, revert and verify the published change of RoIAlign.",
        "verify": "Verify by running it that training is reproducible.",
    },
    "Data and class names": {
        "download": "Download checkpoints, data sets and metadata; verify them.",
        "data": "Prepare, check, count and preview data sets.",
        "vocab": "Build and inspect vocabularies of class names.",
    },
    "Detectors": {
        "train": "Train a detector on one CPU, one GPU or many nodes; resume.",
        "eval": "Compute average precision with confidence intervals.",
        "predict": "Detect objects in images from any class names.",
        "index": "Embed the regions of images once, for search.",
        "search": "Find objects in an index from any class names.",
        "serve": "Detect objects from a web page or over HTTP.",
        "export": "Export to ONNX or torch, to run without detectron2.",
        "push": "Upload to the Hugging Face hub, with a model card.",
    },
}
"""Name and one-line help of each command by group, in the order of the work."""

COMMANDS: dict[str, str] = {name: text for group in GROUPS.values() for name, text in group.items()}

_COMPLETING = "_PROXYDET_COMPLETE"  # set by the shell that asks for completions


def load_command(name: str) -> Any:
    """Import a command's module and build the command; its name must be in :data:`COMMANDS`."""
    module = importlib.import_module(f"proxydet_cli.commands.{name.replace('-', '_')}")
    command = typer.main.get_command(module.app)
    command.name = name
    return command


class LazyGroup(Group):
    """Lists commands from :data:`COMMANDS` and imports only the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was named; an unknown name is a usage error with suggestions."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name else None, rest

    def write_commands(self, _: Any, formatter: Any) -> None:
        """Write the commands by group."""
        for title, commands in GROUPS.items():
            with formatter.section(heading(title)):
                formatter.write_dl(
                    [(term(name.ljust(10)), text) for name, text in commands.items()]
                )


def _show_version(asked: bool) -> None:
    if asked:
        from proxydet._version import __version__

        Output().data(f"proxydet {__version__}")
        raise typer.Exit


def _main_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show more about what is done, on stderr.")
    ] = False,
) -> None:
    """Open-vocabulary object detection: train, evaluate, predict."""
    show_logs(verbose=verbose)


def build(*, own_help: bool = True) -> Any:
    """Build the command line without importing any command's module.

    Args:
        own_help: Offer ``--help`` and shell completion in front of a command's name.
    """
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=own_help,
        add_help_option=own_help,
        rich_markup_mode=None,
        no_args_is_help=True,
        context_settings={"help_option_names": ["--help", "-h"]},
        epilog=examples("proxydet quickstart", "proxydet COMMAND --help"),
    )
    app.callback()(_main_options)
    for name, text in COMMANDS.items():
        app.command(name, help=text)(_listed)
    return typer.main.get_command(app)


def _listed() -> None:
    """Stand for a command in the listing; :meth:`LazyGroup.resolve_command` loads the real one."""


def run(words: Sequence[str]) -> None:
    """Run the command line; usage errors, ``--help`` and success leave through SystemExit.

    Args:
        words: The words after the program's name.
    """
    # Absent options of some kinds make Typer import pydantic, a quarter of a second, before a command is reached.
    own_help = not (words and words[0] in COMMANDS) or _COMPLETING in os.environ
    build(own_help=own_help).main(args=[_at_home(word) for word in words], prog_name="proxydet")


def _at_home(word: str) -> str:
    """Expand the ``~/`` that a shell leaves as it is: in quotes, and after ``--output=``."""
    option, path = word.split("=", 1) if word.startswith("--") and "=" in word else ("", word)
    if not path.startswith("~/"):
        return word
    return (f"{option}=" if option else "") + os.path.expanduser(path)  # noqa: PTH111 - as it is without a home

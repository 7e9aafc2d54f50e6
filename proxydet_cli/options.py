"""What all commands share: how their Typer app is made, how help is laid out, and the options that mean the same.

::

    from proxydet_cli.options import Json, command_app, examples

    app = command_app()

    @app.command(epilog=examples("proxydet setup", "proxydet setup --dry-run"))
    def setup(json: Json = False) -> None:
        \"\"\"Install detectron2 if missing.\"\"\"

Options are listed in groups: an option's ``rich_help_panel`` names its group, which stands where its first option does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

GENERAL = "General options"
"""Group of the options that most commands have, at the end of the list."""

Json = Annotated[
    bool,
    typer.Option("--json", help="Write the result to stdout as JSON.", rich_help_panel=GENERAL),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would be done, and do nothing.", rich_help_panel=GENERAL
    ),
]
Yes = Annotated[
    bool,
    typer.Option("--yes", "-y", help="Do not ask before acting.", rich_help_panel=GENERAL),
]


def styled(text: str, **style: Any) -> str:
    """Return text with ANSI colours where stdout is a terminal that shows them; otherwise as it is."""
    plain = (
        not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    )
    return text if plain else typer.style(text, **style)


def heading(text: str) -> str:
    """Return the title of a section of a help text."""
    return styled(text, fg="green", bold=True)


def term(text: str) -> str:
    """Return a command or an option as help texts show it."""
    return styled(text, fg="cyan")


_METAVARS = {"int": "N", "float": "X", "path": "PATH", "str": "TEXT"}
_TYPE = re.compile(r"<(?:list\[)?(int|float|path|str)(?: range)?\]?>", re.IGNORECASE)


class _Help:
    """Lays out help: options by group, coloured on a terminal and plain elsewhere."""

    def format_usage(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the line of usage."""
        pieces = " ".join(self.collect_usage_pieces(ctx))
        formatter.write_usage(ctx.command_path, pieces, prefix=f"{heading('Usage')}: ")

    def format_options(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the subcommands if there are any, then arguments and options, each group under its title."""
        self.write_commands(ctx, formatter)
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title = "Arguments" if parameter.param_type_name == "argument" else "Options"
                title = getattr(parameter, "rich_help_panel", None) or title
                if "--help" in parameter.opts and set(groups) - {"Arguments", "Options"}:
                    title = GENERAL
                # Typer shows the types of Python; a metavar says more than one that stands behind it.
                usage = re.sub(r"(?<=[A-Z]) <[^>]*>", "", record[0])
                usage = _TYPE.sub(lambda match: _METAVARS[match[1].lower()], usage)
                groups.setdefault(title, []).append((term(usage), record[1]))
        for title, records in sorted(groups.items(), key=lambda group: group[0] == GENERAL):
            with formatter.section(heading(title)):
                formatter.write_dl(records)

    def write_commands(self: Any, ctx: Any, formatter: Any) -> None:
        """Write the subcommands and their one-line help."""
        names = self.list_commands(ctx) if hasattr(self, "list_commands") else []
        if names:
            commands = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(heading("Commands")):
                formatter.write_dl(
                    [(term(name), command.get_short_help_str(200)) for name, command in commands]
                )


class Command(_Help, typer.core.TyperCommand):
    """A command with our layout of help."""


class Group(_Help, typer.core.TyperGroup):
    """A command of subcommands with our layout of help."""

    default: str | None = None
    """The subcommand that is meant where none is named."""

    def parse_args(self: Any, ctx: Any, args: list[str]) -> Any:
        """Put the default subcommand in front of what names none."""
        if self.default and args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=Command, **settings)


def command_app(help: str | None = None, *, default: str | None = None) -> typer.Typer:
    """Make the Typer app of a command.

    Args:
        help: For a command with subcommands, what they have in common; None for a single command, whose
            docstring is its help.
        default: The subcommand that is meant where none is named.
    """
    return _App(
        cls=type("DefaultGroup", (Group,), {"default": default}),
        help=help,
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=help is not None,
    )


def given_options(context: typer.Context, *names: str) -> list[str]:
    """Return which options stand on the command line, as ``--name``.

    Args:
        context: Of the command.
        names: Names of the parameters that are looked for.
    """
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            off = context.params[option.name] is False and option.secondary_opts
            found.append(max(off or option.opts, key=len))
    return found


def examples(*lines: str) -> str:
    """Lay out a command's examples, one a line, for its ``epilog``."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# --- A detector and its classes, alike in every command that uses one --------------------------------------------------

Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        "-v",
        metavar="NAMES",
        help="Classes to detect: 'cup, plate, \"knife, fork\"', or a file as for --vocabulary.",
        rich_help_panel="Classes",
    ),
]
VocabularySource = Annotated[
    str | None,
    typer.Option(
        "--vocabulary",
        metavar="NAME|FILE",
        help="Instead of -v: a published vocabulary (lvis, coco, objects365, openimages; all: the classes of these four; "
        "lvis-descriptions, lvis-exemplars, lvis-multimodal, ...), a file of names (.txt, .json, .yaml, a COCO annotation "
        "file), of proxydet vocab build (.npz, .vocab), or of embeddings (.npy, with --names).",
        rich_help_panel="Classes",
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        "--background",
        metavar="NAMES",
        help="Classes that absorb false hits and are never reported: 'wall, floor', a file as for --vocabulary, or training: all classes "
        "of the training that are not asked for.",
        rich_help_panel="Classes",
    ),
]
NamesFile = Annotated[
    Path | None,
    typer.Option(
        "--names",
        metavar="FILE",
        help="Class names of a .npy --vocabulary.",
        rich_help_panel="Classes",
    ),
]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="Run folder of proxydet train or quickstart.",
        rich_help_panel="Detector",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="NAME|FILE",
        help="A published model (proxydet-r50, proxydet-r50-inl, proxydet-swinb-inl), OWNER/NAME[@REVISION] on the Hugging "
        "Face hub, or a checkpoint; with --run, one of the run's. [default: the run's last, else proxydet-r50-inl]",
        rich_help_panel="Detector",
    ),
]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="r50|swinb|FILE",
        help="Model of a --weights file, or a run's config.yaml. [default: r50]",
        rich_help_panel="Detector",
    ),
]
_DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|mtia)(:\d+)?")


def _known_device(device: str) -> str:
    if _DEVICE.fullmatch(device) is None:
        raise typer.BadParameter(
            f"{device!r} is not a device; choose auto, cpu, cuda, or cuda:1, ..."
        )
    return device


Device = Annotated[
    str,
    typer.Option(
        "--device",
        callback=_known_device,
        help="cpu, cuda, cuda:1, ...; auto: a GPU where there is one.",
        rich_help_panel="Detector",
    ),
]


class Precision(str, Enum):
    """Number formats of the network."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


Tta = Annotated[
    bool,
    typer.Option(
        "--tta",
        help="Run on each image mirrored too, and in three sizes: more accurate, 6 times slower.",
        rich_help_panel="Detector",
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        "--precision",
        help="Number format of the network: bf16 and fp16 are faster where the device has units for them (proxydet env); "
        "bf16 moves the quickstart's scores by 0.001 on average, by 0.05 at most; fp16 needs a GPU; auto takes the fastest. [default: inference.precision, fp32]",
        show_default=False,
        rich_help_panel="Detector",
    ),
]
Rescore = Annotated[
    bool | None,
    typer.Option(
        "--rescore/--no-rescore",
        help="Score a box by all proposals that agree on it: boxes gain, masks hardly; scores rise. "
        "[default: inference.rescore, no]",
        show_default=False,
        rich_help_panel="Detector",
    ),
]
Tiles = Annotated[
    int | None,
    typer.Option(
        "--tiles",
        metavar="PIXELS",
        min=0,
        help="Run on larger images in overlapping tiles of this side too, for small objects, and merge what is found; 0: not. "
        "[default: inference.tiles, 0]",
        show_default=False,
        rich_help_panel="Detector",
    ),
]
TileOverlap = Annotated[
    float | None,
    typer.Option(
        "--tile-overlap",
        min=0.0,
        max=0.9,
        help="Share of its side that a tile has in common with the next one. [default: inference.tile_overlap, 0.2]",
        show_default=False,
        rich_help_panel="Detector",
    ),
]
WholeImage = Annotated[
    bool | None,
    typer.Option(
        "--whole-image/--no-whole-image",
        help="With --tiles, run on the whole image too, for large objects. [default: inference.whole_image, yes]",
        show_default=False,
        rich_help_panel="Detector",
    ),
]
OneLabel = Annotated[
    bool,
    typer.Option(
        "--one-label/--all-labels",
        help="One label a box, or of each class that scores above the threshold.",
        rich_help_panel="Detections",
    ),
]
BaseAbove = Annotated[
    float,
    typer.Option(
        "--base-above",
        min=-1.0,
        max=1.0,
        help="Cosine with a base class of training above which a class counts as base.",
        rich_help_panel="Classes",
    ),
]

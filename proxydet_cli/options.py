"""What all commands share: how their Typer app is made, how help is laid out, and the options that mean the same.

::

    from proxydet_cli.options import Json, command_app, examples

    app = command_app()

    @app.command(epilog=examples("proxydet setup", "proxydet setup --dry-run"))
    def setup(json: Json = False) -> None:
        \"\"\"Install detectron2 if missing.\"\"\"

Options are listed in groups, each of which stands where its first option does; :func:`panel` declares the options of one.
Options that belong together are fields of a dataclass: a command with a parameter of that type has all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import typer.core

from proxydet.wording import nearest

GENERAL = "General options"
"""Group of the options that most commands have, at the end of the list."""


def panel(title: str) -> Callable[..., Any]:
    """Return a ``typer.Option`` whose options are listed under ``title``."""
    return functools.partial(typer.Option, rich_help_panel=title)


general = panel(GENERAL)
Json = Annotated[bool, general("--json", help="Write the result to stdout as JSON.")]
DryRun = Annotated[bool, general("--dry-run", help="Print what would be done, and do nothing.")]
Yes = Annotated[bool, general("--yes", "-y", help="Do not ask before acting.")]


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
        """Put the default subcommand in front of what names none; a near miss that is not a file is a usage error."""
        if self.default and args and args[0] not in (*self.commands, *ctx.help_option_names):
            near = nearest(args[0], list(self.commands))
            if near and not os.path.lexists(args[0]):
                raise typer.BadParameter(
                    f"there is no subcommand or file {args[0]!r}.{near}", ctx=ctx
                )
            args = [self.default, *args]
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        register = super().command(name, cls=Command, **settings)
        return lambda function: register(_flat(function))


def _flat(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with the fields of each parameter that is a dataclass as parameters of their own."""
    signature = inspect.signature(command, eval_str=True)

    def call(**values: Any) -> Any:
        given = {
            name: _filled(name, parameter.annotation, values)
            for name, parameter in signature.parameters.items()
        }
        return command(**given)

    call.__doc__, call.__name__ = command.__doc__, command.__name__
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
        for parameter in signature.parameters.values()
        for name, hint, default in _flat_fields(
            parameter.name, parameter.annotation, parameter.default
        )
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _flat_fields(name: str, hint: Any, default: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, type and default of a parameter, or of the fields of its dataclass, at any depth."""
    if not dataclasses.is_dataclass(hint):
        yield name, hint, default
        return
    hints = get_type_hints(hint, include_extras=True)
    for field in dataclasses.fields(hint):
        required = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if required else field.default
        yield from _flat_fields(field.name, hints[field.name], default)


def _filled(name: str, hint: Any, values: dict[str, Any]) -> Any:
    """Return the value of a parameter, or its dataclass with those of its fields."""
    if not dataclasses.is_dataclass(hint):
        return values[name]
    hints = get_type_hints(hint)
    fields = [field.name for field in dataclasses.fields(hint)]
    return hint(**{field: _filled(field, hints[field], values) for field in fields})  # type: ignore[operator]


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


def given_options(context: typer.Context, *names: str | type) -> list[str]:
    """Return which options stand on the command line, as ``--name``.

    Args:
        context: Of the command.
        names: Names of the parameters that are looked for, or dataclasses of them.
    """
    sought = {name for each in names for name, *_ in _flat_fields(str(each), each, None)}
    found = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in sought and source is not None and source.name == "COMMANDLINE":
            off = context.params[option.name] is False and option.secondary_opts
            found.append(max(off or option.opts, key=len))
    return found


def examples(*lines: str) -> str:
    """Lay out a command's examples, one a line, for its ``epilog``."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


# --- Options of several commands; those of a detector and of its classes are in `proxydet_cli.opening` ------------------

detections = panel("Detections")
Threshold = Annotated[
    float, detections("--score-threshold", min=0.0, max=1.0, help="Keep what scores above this.")
]
Top = Annotated[int, detections("--top", min=1, help="Keep at most this many an image.")]
OneLabel = Annotated[
    bool,
    detections(
        "--one-label/--all-labels",
        help="One label a box, or of each class that scores above the threshold.",
    ),
]
IndexFolder = Annotated[
    Path, typer.Argument(metavar="INDEX", help="The folder that proxydet index wrote.")
]

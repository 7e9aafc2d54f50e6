"""What all commands share: how their Typer app is made, their examples, and the options that mean the same.

::

    from proxydet_cli.options import Json, command_app, examples

    app = command_app()

    @app.command(epilog=examples("proxydet setup", "proxydet setup --dry-run"))
    def setup(json: Json = False) -> None:
        \"\"\"Make a working detectron2.\"\"\"
"""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before acting.")]


def command_app(help: str | None = None) -> typer.Typer:
    """Make the Typer app of a command, plain text all through.

    Args:
        help: For a command with subcommands, what they have in common; None for a single command, whose
            docstring is its help.
    """
    return typer.Typer(
        help=help, add_completion=False, rich_markup_mode=None, no_args_is_help=help is not None
    )


def examples(*lines: str) -> str:
    """Lay out a command's examples, one a line, for its ``epilog``."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)

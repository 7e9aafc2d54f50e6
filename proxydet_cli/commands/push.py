"""``proxydet push``: a run's detector to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from proxydet.wording import size_text
from proxydet_cli.options import DryRun, Json, Yes, command_app, examples
from proxydet_cli.output import Output

app = command_app()


@app.command(
    epilog=examples(
        "proxydet push runs/pets me/pets-detector --license apache-2.0 --dry-run",
        "proxydet push runs/pets me/pets-detector --private --yes",
    )
)
def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder of proxydet train or quickstart.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository; created where there is none.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="A checkpoint of the run. [default: its best weights, else its last]",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository. [default: everybody, unless the organisation's setting differs]",
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="Licence of the weights: apache-2.0, cc-by-nc-4.0, ..."
        ),
    ] = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Replace a model card (README.md) that is there."),
    ] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Upload a detector to the Hugging Face hub, with a model card.

    Others open it by its name: proxydet predict --weights OWNER/NAME, Detector.from_pretrained("OWNER/NAME"). Weights,
    configuration, classes and text encoder are uploaded in one commit; paths of this machine are left out.
    """
    from proxydet.hub import check_name, require_login
    from proxydet.paths import require_run
    from proxydet.weight_files import check_weight_file

    out = Output(json=json)
    check_name(repository)
    require_run(run)
    if weights is not None:
        check_weight_file(weights)
    if not dry_run:
        require_login(repository)
    from proxydet.publishing import prepared, upload

    with prepared(run, repository, weights=weights, license=license) as package:
        listing = "\n".join(f"{size_text(size):>8}  {name}" for name, size in package.files.items())
        if dry_run:
            values = {"repository": repository, "files": package.files, "card": package.card}
            out.data(values, f"{repository}:\n{listing}\n\n{package.card}")
            return
        seen_by = {
            True: "private",
            False: "public",
            None: "public unless your organisation's setting differs",
        }
        out.message(f"to {repository} (if new: {seen_by[private]}):\n{listing}")
        if not yes and not out.agreed("the upload", nothing="Nothing was uploaded."):
            return
        address = upload(package, private=private, keep_card=not overwrite_card)
    out.data(
        {"repository": repository, "commit": address},
        f"{address}\nopen it: proxydet predict photo.jpg --weights {repository}",
    )

"""``proxydet serve``: a web page and a JSON endpoint around a detector."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.opening import (
    background_classes,
    check_choice,
    chosen_vocabulary,
    fetch_published,
    tuned,
)
from proxydet_cli.options import (
    Background,
    BaseAbove,
    Classes,
    Device,
    Json,
    ModelConfig,
    NamesFile,
    PrecisionOption,
    Rescore,
    Run,
    TileOverlap,
    Tiles,
    Tta,
    VocabularySource,
    Weights,
    WholeImage,
    Yes,
    command_app,
    examples,
    given_options,
)

if TYPE_CHECKING:
    import socket

    from proxydet_cli.output import Output

app = command_app()

# Parameters that do nothing with --index.
_DETECTOR_ONLY = (
    *("run", "weights", "config", "device", "max_upload", "tta", "precision"),
    *("rescore", "tiles", "tile_overlap", "whole_image"),
)

Host = Annotated[
    str,
    typer.Option(
        "--host",
        help="Address to listen on; 0.0.0.0: all interfaces. There is no authentication.",
        rich_help_panel="Server",
    ),
]
Port = Annotated[
    int,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Port to listen on; 0: any free one.",
        rich_help_panel="Server",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Host name that requests may be addressed to, besides localhost; may be repeated.",
        rich_help_panel="Server",
    ),
]
IndexFolder = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="INDEX",
        help="Serve a search page of what proxydet index wrote, instead of a detector.",
        rich_help_panel="Detector",
    ),
]
OpenPage = Annotated[
    bool, typer.Option("--open", help="Open the page in the browser.", rich_help_panel="Server")
]
MaxUpload = Annotated[
    float,
    typer.Option(
        "--max-upload",
        min=0.01,
        metavar="MIB",
        help="Largest image file.",
        rich_help_panel="Limits",
    ),
]
MaxMegapixels = Annotated[
    float,
    typer.Option(
        "--max-megapixels",
        min=0.01,
        help="Largest image, in million pixels; with --index the largest that is shown.",
        rich_help_panel="Limits",
    ),
]
Queue = Annotated[
    int,
    typer.Option(
        "--queue", min=1, help="Requests that may wait; more are refused.", rich_help_panel="Limits"
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=0.1,
        help="Longest time for a response, in seconds.",
        rich_help_panel="Limits",
    ),
]


@app.command(
    epilog=examples(
        "proxydet serve --run runs/quickstart --open",
        "proxydet serve -v 'mug, kettle' --port 0 --json",
        "proxydet serve --index photos.index --open",
        "proxydet serve --host 0.0.0.0 --allow-host detector.example.org",
    )
)
def serve(
    context: typer.Context,
    classes: Classes = None,
    vocabulary: VocabularySource = None,
    names: NamesFile = None,
    background: Background = None,
    run: Run = None,
    weights: Weights = None,
    config: ModelConfig = None,
    index: IndexFolder = None,
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allow_host: AllowHost = None,
    open_page: OpenPage = False,
    max_upload: MaxUpload = 20,
    max_megapixels: MaxMegapixels = 50,
    queue: Queue = 32,
    timeout: Timeout = 60,
    tta: Tta = False,
    precision: PrecisionOption = None,
    rescore: Rescore = None,
    tiles: Tiles = None,
    tile_overlap: TileOverlap = None,
    whole_image: WholeImage = None,
    base_above: BaseAbove = 0.9,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Serve a detector, or the search of an index, on a web page and an HTTP endpoint.

    Listens on this machine only, unless --host says otherwise, until Ctrl-C or SIGTERM; then it finishes the request in
    progress and ends with exit code 0. Classes of -v or --vocabulary are detected where a request names none.
    """
    from proxydet.errors import DataError, JobInterruptedError
    from proxydet_cli import failures, output
    from proxydet_cli.output import Output

    out = Output(json=json)
    check_choice(classes, vocabulary, names, background)
    _check_packages()
    from proxydet.models import find_detector
    from proxydet.serve.server import bind, is_loopback
    from proxydet.serve.server import serve as serve_app
    from proxydet_cli.commands.download import with_downloads

    if index is not None and (useless := given_options(context, *_DETECTOR_ONLY)):
        raise typer.BadParameter(
            f"--index runs no detector and takes no uploads: leave out {', '.join(useless)}"
        )
    if index is not None and not index.is_dir():  # before the address is printed
        raise DataError(
            f"there is no index {index}",
            hint="make one with: proxydet index FOLDER -o photos.index",
            path=index,
        )
    named = None if index is not None else find_detector(run=run, weights=weights, config=config)
    with bind(host, port) as listening:
        loopback_only = is_loopback(listening)
        if not loopback_only:
            out.warning(
                "everyone who reaches this machine over the network can use this server: it has neither authentication "
                "nor encryption"
            )
        if named is not None:
            fetch_published(named, classes, vocabulary, yes=yes)
        from proxydet.serve.app import Served, ServingSettings, build_app
        from proxydet.serve.examples import packaged_examples, run_examples

        def opened() -> Served:
            """Load the model, or open the index; while the page is there already."""
            if named is None:
                from proxydet.index.search import RegionIndex

                assert index is not None
                searched = RegionIndex(index)
                chosen = chosen_vocabulary(
                    searched,
                    classes,
                    vocabulary,
                    names,
                    base_above,
                    background=background,
                    yes=None,
                )
                hidden = background and background_classes(searched, background)
                return Served(index=searched, vocabulary=chosen, background=hidden or None)
            from proxydet.detector import open_named

            detector = tuned(
                open_named(named, device=device),
                tta=tta,
                precision=precision,
                rescore=rescore,
                tiles=tiles,
                tile_overlap=tile_overlap,
                whole_image=whole_image,
            )
            chosen = chosen_vocabulary(
                detector, classes, vocabulary, names, base_above, background=background, yes=None
            )
            # Images of a run's own data are shown to its user alone.
            own = named.run if loopback_only and not allow_host else None
            found = run_examples(own) if own else () if named.run else packaged_examples()
            hidden = background and background_classes(detector, background)
            return Served(
                detector=detector, vocabulary=chosen, background=hidden or None, examples=found
            )

        settings = ServingSettings(
            max_upload_bytes=round(max_upload * 2**20),
            max_pixels=round(max_megapixels * 1e6),
            queue_places=queue,
            wait_seconds=timeout,
            allowed_hosts=tuple(name.strip().lower() for name in (*(allow_host or ()), host)),
            loopback_only=loopback_only,
        )
        _show_server_logs()

        def serve_once() -> None:
            application = build_app(
                opened,
                settings,
                base_above=base_above,
                name="index" if named is None else named.name,
                search=named is None,
            )
            # A copy, since a server closes what it was given: after a download the same address is served again.
            with listening.dup() as copy:
                try:
                    serve_app(application, copy, on_started=lambda: _announce(out, copy, open_page))
                except JobInterruptedError as error:
                    # A job may still run, and torch aborts a process whose interpreter ends meanwhile.
                    code = failures.report(error)
                    output.flush()
                    os._exit(code)

        with_downloads(serve_once, yes=yes)
    out.message("stopped")


def _check_packages() -> None:
    """Say before any work what is not installed."""
    from importlib import import_module
    from importlib.util import find_spec

    from proxydet.errors import MissingDependencyError

    needed = {
        "starlette": "starlette",
        "uvicorn": "uvicorn",
        "python_multipart": "python-multipart",
    }
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="run: pip install 'proxydet[serve]'",
        )
    for module, name in needed.items():
        try:
            import_module(module)
        except ImportError as error:
            raise MissingDependencyError(
                f"the server needs the package {name}, which cannot be imported: {error}",
                hint="run: pip install --force-reinstall 'proxydet[serve]'",
            ) from error


def _show_server_logs() -> None:
    """Show one line a request, and what uvicorn has to say, on stderr."""
    from proxydet_cli.output import LogHandler

    # Handlers of their own: that of the core shows warnings only.
    for name, level in (("proxydet.serve.access", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            handler = LogHandler()
            handler.addFilter(_without_traceback)
            logger.addHandler(handler)
            logger.propagate = False


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and not os.environ.get("PROXYDET_DEBUG"):
        record.msg = f"{record.getMessage().strip()}: {record.exc_info[1]!r}"
        record.args, record.exc_info, record.exc_text = None, None, None
    return True


def _announce(out: Output, listening: socket.socket, open_page: bool) -> None:
    """Say where the page is: on stderr, or as one line of JSON on stdout."""
    from proxydet.serve.server import address_of

    address = address_of(listening)
    host, port = listening.getsockname()[:2]
    if out.json:
        out.line({"address": address, "host": host, "port": port})
    else:
        out.message(f"{address} (Ctrl-C stops)")
    if open_page:
        import webbrowser

        if not webbrowser.open(address):
            out.warning(f"no browser could be opened; the page is {address}")

"""``proxydet serve``: a web page and a JSON endpoint around a detector."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxydet_cli.opening import (
    BaseAbove,
    ClassOptions,
    DetectorOptions,
    InferenceOptions,
    fetch_published,
    read_background,
)
from proxydet_cli.options import Json, Yes, command_app, examples, given_options, panel
from proxydet_cli.output import Output

if TYPE_CHECKING:
    import socket


app = command_app()

_server, _limits = panel("Server"), panel("Limits")


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
    classes: ClassOptions,
    model: DetectorOptions,
    inference: InferenceOptions,
    *,
    index: Annotated[
        Path | None,
        panel("Detector")(
            "--index",
            metavar="INDEX",
            help="Serve a search page of what proxydet index wrote, instead of a detector.",
        ),
    ] = None,
    host: Annotated[
        str,
        _server(
            "--host",
            help="Address to listen on; 0.0.0.0: all interfaces. There is no authentication.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, _server("--port", min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8000,
    allow_host: Annotated[
        list[str] | None,
        _server(
            "--allow-host",
            metavar="NAME",
            help="Host name that requests may be addressed to, besides localhost; may be repeated.",
        ),
    ] = None,
    open_page: Annotated[bool, _server("--open", help="Open the page in the browser.")] = False,
    max_upload: Annotated[
        float, _limits("--max-upload", min=0.01, metavar="MIB", help="Largest image file.")
    ] = 20,
    max_megapixels: Annotated[
        float,
        _limits(
            "--max-megapixels",
            min=0.01,
            help="Largest image, in million pixels; with --index the largest that is shown.",
        ),
    ] = 50,
    queue: Annotated[
        int, _limits("--queue", min=1, help="Requests that may wait; more are refused.")
    ] = 32,
    timeout: Annotated[
        float, _limits("--timeout", min=0.1, help="Longest time for a response, in seconds.")
    ] = 60,
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

    out = Output(json=json)
    classes.check()
    _check_packages()
    from proxydet.serve.server import bind, is_loopback
    from proxydet.serve.server import serve as serve_app
    from proxydet_cli.commands.download import with_downloads

    if index is not None and (
        useless := given_options(context, DetectorOptions, InferenceOptions, "max_upload")
    ):
        raise typer.BadParameter(
            f"--index runs no detector and takes no uploads: leave out {', '.join(useless)}"
        )
    if index is not None and not index.is_dir():  # before the address is printed
        raise DataError(
            f"there is no index {index}",
            hint="make one with: proxydet index FOLDER -o photos.index",
            path=index,
        )
    named = model.find() if index is None else None
    if named is not None:
        inference.check(named)
    with bind(host, port) as listening:
        loopback_only = is_loopback(listening)
        if not loopback_only:
            out.warning(
                "everyone who reaches this machine over the network can use this server: it has neither authentication "
                "nor encryption"
            )
        if named is not None:
            fetch_published(named, classes, yes=yes)
        from proxydet.serve.app import Served, ServingSettings, build_app
        from proxydet.serve.examples import packaged_examples, run_examples

        def opened() -> Served:
            """Load the model, or open the index; while the page is there already."""
            if named is None:
                from proxydet.index.search import RegionIndex

                assert index is not None
                served = Served(index=RegionIndex(index))
            else:
                from proxydet.detector import open_named

                # Images of a run's own data are shown to its user alone.
                own = named.run if loopback_only and not allow_host else None
                served = Served(
                    detector=inference.apply(open_named(named, device=model.device)),
                    examples=run_examples(own) if own else () if named.run else packaged_examples(),
                )
            hidden, asked = classes.background, served.classes
            return replace(
                served,
                vocabulary=classes.open(asked, base_above=base_above, yes=None),
                background=asked.background_of(read_background(hidden)) if hidden else None,
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

    missing = []
    for name in ("starlette", "uvicorn", "python-multipart"):
        module = name.replace("-", "_")
        if find_spec(module) is None:
            missing.append(name)
            continue
        try:
            import_module(module)
        except ImportError as error:
            raise MissingDependencyError(
                f"the server needs the package {name}, which cannot be imported: {error}",
                hint="run: pip install --force-reinstall 'proxydet[serve]'",
            ) from error
    if missing:
        raise MissingDependencyError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="run: pip install 'proxydet[serve]'",
        )


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

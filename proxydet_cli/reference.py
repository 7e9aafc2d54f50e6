"""Writes the reference pages from the program itself: ``python -m proxydet_cli.reference docs/reference``."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import typer

import proxydet
from proxydet.config import (
    config_class,
    field_docs,
    field_types,
    parse_yaml,
    scalar_text,
    to_mapping,
    type_name,
)
from proxydet.data.records import DEVIATIONS
from proxydet.detectron2_keys import OURS
from proxydet.recipes import RECIPES, RunConfig
from proxydet_cli.app import COMMANDS, build, load_command

_WIDTH = 100


def commands_page() -> str:
    """The help of every command and subcommand, as one Markdown page."""
    parts = ["# Commands", "Written by `make docs` from the commands' own help."]
    for name, text in _help_texts("proxydet", build()):
        parts.append(f"## {name}\n\n```\n{text.rstrip()}\n```")
    for command in COMMANDS:
        for name, text in _help_texts(f"proxydet {command}", load_command(command)):
            parts.append(f"{'#' * len(name.split())} {name}\n\n```\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _help_texts(name: str, command: Any) -> Iterator[tuple[str, str]]:
    context = typer.Context(
        command, info_name=name, max_content_width=_WIDTH, terminal_width=_WIDTH
    )
    yield name, command.get_help(context)
    if name != "proxydet":
        for subname, subcommand in getattr(command, "commands", {}).items():
            yield from _help_texts(f"{name} {subname}", subcommand)


_CONFIGURATION = """# Configuration

Written by `make docs` from the dataclasses that the program reads.

A configuration is put together from a recipe, a YAML file (`--config`, whole or partial) and single keys (`--set`), the later
ones winning; values are checked against each other when all are in place. Lists and mappings are written as in YAML, in
quotes for the shell: `--set 'evaluation.iou_types=[bbox]'`. `proxydet train --show-config` writes the result; a run keeps it as `config.yaml`. An unknown key or a wrong
type is an error that names the nearest key. In YAML, `off` and `no` are text, `2e-4` is a number.

Defaults below are those of the dataclasses, which are the published R50's; a recipe changes some."""


def configuration_page() -> str:
    """Describe every recipe and every key, as one Markdown page."""
    docs = {name: " ".join((inspect.getdoc(made) or "").split()) for name, made in RECIPES.items()}
    recipes = [f"| `{name}` | {_cell(text)} |" for name, text in docs.items()]
    parts = [
        _CONFIGURATION,
        "## Recipes",
        "\n".join(["| recipe | what it is |", "|---|---|", *recipes]),
        "## Keys",
        *_sections(RunConfig, to_mapping(RunConfig()), ""),
    ]
    return "\n\n".join(parts) + "\n"


def _sections(cls: type, values: Mapping[str, Any], where: str) -> list[str]:
    """Describe a class's own keys in a table, then each nested class under a heading of its own.

    Args:
        cls: A configuration class.
        values: Its defaults in the whole configuration.
        where: Dotted path of the class in it.
    """
    docs = field_docs(cls)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for name, annotation in field_types(cls).items():
        path = f"{where}.{name}" if where else name
        inner = config_class(annotation)
        if inner is not None and values[name] is not None:
            summary = (inspect.getdoc(inner) or "").split("\n\n")[0]
            null = " May be null." if type(None) in get_args(annotation) else ""
            text = f"{docs[name]} {' '.join(summary.split())}{null}"
            nested += [f"### {path}", text, *_sections(inner, values[name], path)]
        else:
            default = scalar_text(values[name])
            assert parse_yaml(default) == values[name], default
            cells = (type_name(annotation), f"`{default}`", docs[name])
            rows.append(f"| `{path}` | {' | '.join(map(_cell, cells))} |")
    table = ["\n".join(rows)] if len(rows) > 2 else []
    return [*table, *nested]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_ANNOTATION_FILES = """# Annotation files

Written by `make docs` from the table that the readers follow. `proxydet data check PATH` counts by it; training, evaluation
and statistics read what it leaves.

| format | named by |
|---|---|
| COCO, LVIS, OpenImages (as `data prepare openimages` writes it) | the JSON file, plain or gzipped |
| Pascal VOC | the data set's folder, a folder of XML files, one XML file, or a list in `ImageSets/Main` |
| YOLO (Ultralytics, Roboflow, Darknet, the YOLO exports of CVAT and Label Studio) | `data.yaml` (one of its parts with `part`), a folder of rows or of images or the one above them, or a list of images |
| labelme | a folder of its JSON files, also in folders below, or one of them |
| VGG VIA (1 and 2) | the project, or its export as JSON or CSV |
| CVAT | the XML of "CVAT for images 1.1" (one subset of a project with `part`); its COCO and YOLO exports are those formats |
| Label Studio | the JSON or JSON-MIN export; its COCO, YOLO and VOC exports are those formats |

Annotations are read once into a store in the cache folder (`PROXYDET_CACHE`), named by the digest of their content. Masks
are optional: objects without one train boxes, and neither help nor harm when masks are scored. Pascal VOC's corners are
pixel numbers from 1, both inclusive, unless a corner of the data set is 0; `difficult` objects are marked to be ignored. An
image's name may lack its ending, in any format: it is found when the image is opened, and refused where several files fit.
YOLO's rows hold fractions and VIA writes no sizes, so the images must be there when their annotations are read; YOLO's class
names come from the nearest `data.yaml`, `classes.txt` or `obj.names`, in the rows' folder or above it. VIA's class is the attribute
of regions that most of them have. Circles and ellipses are outlines, brush strokes and painted masks are masks; points and lines
have no area and are dropped. labelme's shapes of one label and `group_id` are one object. Of several annotations of a Label Studio
task the ground truth is used, else the newest.

`check`, `stats`, `preview` and [`init`](../how-to/own-data.md) also take the folder of a whole export, and find its format, its parts
(train, val or valid, test, in names of folders, files or lists) and its images.

How a data set is scored is printed with every result, and chosen with `--protocol`; by default a file whose images all have
`neg_category_ids` and whose categories all have a `frequency` is scored by LVIS's protocol, one whose images all have
`pos_category_ids` by OpenImages', one with none of these lists by COCO's. Anything between is refused.

Every deviation has one fate. **Mended**: used, with the value in the last column. **Dropped**: left out. **Refused**: nothing
is read, exit code 3. **Noted**: used as written, because the official evaluators count it as it is, and
reported because something is probably wrong.

Results files (`proxydet eval --results`) are read by the same rules: what is written here of a file, of ids, boxes and masks of
annotations holds for detections, and a warning counts what was mended and dropped. Beyond that, unknown images and categories and
boxes that reach out of their image are refused: [how to evaluate](../how-to/evaluate.md#when-results-are-refused)."""


def annotation_page() -> str:
    """Describe every deviation, as one Markdown page."""
    parts = [_ANNOTATION_FILES]
    for of in ("file", "category", "image", "annotation", "polygon", "detection"):
        rows = [
            f"## {of.capitalize()}",
            "",
            "| field | deviation | fate | then |",
            "|---|---|---|---|",
        ]
        rows += [
            f"| {row.field} | {row.what} | {row.fate} | {row.then} |"
            for row in DEVIATIONS.values()
            if row.of == of
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


_PYTHON = """# Python

Written by `make docs` from the docstrings. `import proxydet` loads neither torch nor numpy: each name is imported when it is first
used. Errors are [one tree](exit-codes.md). What own code is given: [change the method](../how-to/change-the-method.md)."""

_MORE_PYTHON = (
    "proxydet.recipes:resolve_config",
    "proxydet.training_run:run_training",
    "proxydet.losses.criterion:Criterion",
    "proxydet.data.formats.collected:Objects",
    "proxydet.training.logs:Logger",
)
"""What stands in the reference besides `proxydet.__all__`."""


def python_page() -> str:
    """Describe the public classes and functions, as one Markdown page."""
    named = []
    for path in (*(f"proxydet:{name}" for name in proxydet.__all__), *_MORE_PYTHON):
        module, name = path.split(":")
        named.append((name, f"{module}.{name}", getattr(import_module(module), name)))
    parts = [_PYTHON]
    for name, path, thing in named:
        if inspect.isclass(thing) or inspect.isfunction(thing):
            parts += [f"## {path}", *_described(name, thing)]
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(value, "__func__", value)
            if isinstance(value, property) and not member.startswith("_"):
                parts += [f"### {name}.{member}", _markdown(inspect.getdoc(value) or "")]
            elif inspect.isfunction(function) and (member == "__call__" or member[0] != "_"):
                parts += [f"### {name}.{member}", *_described(member, getattr(thing, member))]
    return "\n\n".join(parts) + "\n"


def _described(name: str, thing: Any) -> list[str]:
    """Return the signature of a class or function, and its docstring with that of its constructor."""
    text = re.sub(r"<[\w.]+ object at 0x\w+>", "...", str(inspect.signature(thing)))
    signature = f"{name}{re.sub(chr(39), '', text)}"
    if len(signature) > _WIDTH:  # a parameter on each line, at commas outside of brackets
        signature = re.sub(r", (?=[\w*/]+(?::|=|,|\)))", ",\n    ", signature)
    docs = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing) and thing.__init__.__doc__ and "__init__" in vars(thing):
        docs.append(inspect.cleandoc(thing.__init__.__doc__))
    return [f"```\n{signature}\n```", *map(_markdown, docs)]


def _markdown(doc: str) -> str:
    """Return a docstring as Markdown: its sections as lists, its literals as code."""
    lines: list[str] = []
    section = False
    for line in doc.replace("``", "`").splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            section = True
            lines += [f"**{line[:-1]}**", ""]
        elif section and (entry := re.match(r" {4}(\w[\w*, ]*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.strip():
            lines.append(line.strip() if lines[-1] == "" else f"  {line.strip()}")
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines).strip()


_DETECTRON2 = """# Keys of detectron2 and Detic

Written by `make docs` from the table by which `--config` refuses such a file: it names, for each key in the file, what stands for it
here. Keys are set with `--set KEY=VALUE` or in a YAML file ([configuration](configuration.md)).

| theirs | here |
|---|---|"""


def detectron2_page() -> str:
    """List what stands here for keys of detectron2's configurations, as one Markdown page."""
    rows = [f"| `{key}` | {ours} |" for key, ours in OURS.items()]
    return "\n".join([_DETECTRON2, *rows]) + "\n"


def tutorial_notebook() -> str:
    """The tutorial as a Jupyter notebook, nbformat 4.5: its text and its Python, after a cell that installs proxydet."""
    page = Path(__file__).parents[1] / "docs" / "tutorial" / "first-detector.md"
    parts = re.split(r"^```python\n(.*?)^```$", page.read_text("utf-8"), flags=re.M | re.S)
    install = "%pip install --quiet proxydet\n!proxydet setup"
    cells: list[dict[str, Any]] = []
    for index, text in enumerate([parts[0], install, *parts[1:]]):
        source = text.strip().splitlines(keepends=True)
        cell: dict[str, Any] = {"id": f"cell-{index}", "metadata": {}, "source": source}
        if index == 1 or (index > 1 and index % 2 == 0):
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **cell})
        else:
            cells.append({"cell_type": "markdown", **cell})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


PAGES = {
    "commands.md": commands_page,
    "configuration.md": configuration_page,
    "annotation-files.md": annotation_page,
    "python.md": python_page,
    "detectron2-keys.md": detectron2_page,
    "../tutorial/first-detector.ipynb": tutorial_notebook,
}
"""What writes each page of the folder."""

if __name__ == "__main__":
    for name, page in PAGES.items():
        Path(sys.argv[1], name).write_text(page(), encoding="utf-8")

"""Makes detectron2 importable: import this module before the first import of detectron2.

::

    import proxydet.runtime.d2  # noqa: F401
    from detectron2.structures import Instances

Importing it checks that detectron2 is there (:class:`~proxydet.errors.MissingDependencyError` with the hint
``run: proxydet setup`` otherwise) and installs the repairs of :mod:`proxydet.runtime.detectron2`, once. Ruff's
import order keeps the line above third-party imports (section ``detectron2`` in ``pyproject.toml``).
"""

from __future__ import annotations

from proxydet.runtime.detectron2 import activate

INSTALLED = activate()

"""What a run stands on: detectron2, RoIAlign and its modes, the environment report, determinism, two runs compared.

Importing anything of this package puts it where `proxydet` offers the function of the same name. So the package can be
called, too: ``proxydet.environment()`` is :func:`proxydet.environment.report.environment` either way.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Environment(ModuleType):
    def __call__(self, **options: Any) -> Any:
        return import_module("proxydet.environment.report").environment(**options)


sys.modules[__name__].__class__ = _Environment

"""Open-vocabulary object detection with class-wise mixup."""

from proxydet._version import __version__

__all__ = ["__version__"]

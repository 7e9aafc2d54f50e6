"""The version of proxydet."""

__version__ = "0.1.0"

"""pip's settings for reaching the package index, said in uv's terms.

uv does not read pip's configuration. Who installed proxydet with pip behind a mirror, a proxy or a private
certificate has told pip how to get out, and should not have to say it again.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec

_UV_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "proxy": ("ALL_PROXY", "HTTPS_PROXY", "https_proxy", "all_proxy"),
    "cert": ("SSL_CERT_FILE",),
    "trusted-host": ("UV_INSECURE_HOST",),
}
"""pip's setting -> the variable that says it to uv, and the ones that say it already if they are set."""


def uv_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Make the environment in which uv reaches the index as pip does.

    Args:
        environment: The environment to start from; what it already tells uv stays.

    Returns:
        A copy with variables added for pip's index, proxy, certificate and trusted hosts; for an offline pip
        (``no-index``), its folders of files.
    """
    settings = pip_settings(environment)
    result = dict(environment)
    for setting, variables in _UV_VARIABLES.items():
        value = settings.get(setting)
        if value and not any(environment.get(variable) for variable in variables):
            result[variables[0]] = value
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        result.setdefault("UV_NO_INDEX", "1")
        result.setdefault("UV_FIND_LINKS", ",".join(settings.get("find-links", "").split()))
    return result


def pip_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Read pip's settings: its configuration files, and over them its environment variables.

    Args:
        environment: Where the ``PIP_...`` variables are looked up.

    Returns:
        Setting (``"index-url"``) to value.
    """
    settings = _from_files()
    for name, value in environment.items():
        if name.startswith("PIP_") and value:
            settings[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def _from_files() -> dict[str, str]:
    if find_spec("pip") is None:
        return {}
    # Our own interpreter and constant arguments.
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in answer.stdout.splitlines():
        key, separator, value = line.partition("=")
        section, _, setting = key.partition(".")
        if separator and section in found:
            found[section][setting] = str(ast.literal_eval(value))
    return {**found["global"], **found["install"]}

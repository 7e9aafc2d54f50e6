"""What this machine and its packages are, next to the environment of the published results.

::

    report = environment()
    report.worst                       # "may change results"
    print(report.to_markdown())        # a block for an issue
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from proxydet.inspection.accelerator import TorchProbe, tool_facts
from proxydet.inspection.machine import machine_facts
from proxydet.inspection.nvidia import judged_driver
from proxydet.inspection.packages import package_facts
from proxydet.inspection.published import judged_fields
from proxydet.inspection.report import EnvironmentReport, Field, Verdict
from proxydet.paths import datasets_folder

__all__ = ["EnvironmentReport", "Field", "Verdict", "environment"]


def environment(*, quick: bool = False, data_root: Path | None = None) -> EnvironmentReport:
    """Report the environment; what is missing or broken is a field, never an error.

    Args:
        quick: Do not import torch; its fields then come from its files, and the GPUs from nvidia-smi.
        data_root: The folder of the data sets, whose disk is measured; None for the default.

    Returns:
        All fields with the published values and a verdict for each difference. Torch is asked in a process of its
        own unless this one has imported it: a torch that crashes is reported like one that is missing.
    """
    probe = None if quick else TorchProbe()
    facts = machine_facts(datasets_folder() if data_root is None else data_root)
    facts |= package_facts() | tool_facts()
    if probe is not None:
        facts |= probe.facts()
    facts["driver"] = judged_driver(facts)
    return EnvironmentReport(
        fields=judged_fields(facts),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
    )

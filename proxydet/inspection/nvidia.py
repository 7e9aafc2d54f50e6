"""Facts about NVIDIA's driver and GPUs that need no torch: from nvidia-smi, and from what a CUDA needs of a driver."""

from __future__ import annotations

import re

from proxydet.inspection.facts import Fact, Facts, ask, numbers

_QUERIES = ("driver_version,name,memory.total,compute_cap", "driver_version,name,memory.total")
"""Asked in turn: drivers before 470 do not know the compute capability."""

_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580,)}
"""By major version of CUDA, the least driver on Linux (NVIDIA's CUDA compatibility guide, minor versions)."""

_MIB = 2**20

Kinds = dict[tuple[str, str, int], list[str]]
"""Name, architecture and bytes of memory to the numbers of the GPUs that are alike."""


def driver_facts() -> Facts:
    """Ask nvidia-smi for the driver, the GPUs and their topology.

    Returns:
        ``driver`` and ``gpu.topology`` always; ``gpu.names``, ``gpu.count`` and ``gpu.memory`` where it lists GPUs.
    """
    listed = _list_gpus()
    topology = ask(["nvidia-smi", "topo", "-m"]) if listed.value is not None else listed
    # It underlines its headings on a terminal and elsewhere.
    plain = Fact(re.sub(r"\x1b\[[0-9;]*m", "", topology.value)) if topology.value else topology
    lines = (listed.value or "").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    if not rows or min(map(len, rows)) < 3:
        # Without a GPU it may say so in a sentence, and end as if all were well.
        told = Fact(None, f"nvidia-smi: {lines[0]}") if lines else listed
        return {"driver": told, "gpu.topology": plain}
    kinds: Kinds = {}
    for index, (_, name, memory, *arch) in enumerate(rows):
        key = (name, arch[0] if arch else "unknown", _bytes(memory))
        kinds.setdefault(key, []).append(str(index))
    return {"driver": Fact(rows[0][0]), "gpu.topology": plain, **kind_facts(kinds)}


def _list_gpus() -> Fact:
    found = Fact(None)
    for query in _QUERIES:
        found = ask(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
        if found.value is not None or found.problem.endswith("not found"):
            break
    return found


def _bytes(memory: str) -> int:
    """``"32768 MiB"`` in bytes; 0 where the driver says ``[N/A]``."""
    return int(memory.split()[0]) * _MIB if memory.split()[0].isdigit() else 0


def kind_facts(kinds: Kinds) -> Facts:
    """Name GPUs, those of one kind together.

    Args:
        kinds: The GPUs.

    Returns:
        ``gpu.names``, ``gpu.count`` and ``gpu.memory``.
    """
    names = [f"GPU {','.join(n)}: {name} (arch={arch})" for (name, arch, _), n in kinds.items()]
    memory = [f"{size / 2**30:.1f} GiB" for _, _, size in kinds]
    return {
        "gpu.names": Fact("; ".join(names)),
        "gpu.count": Fact(str(sum(map(len, kinds.values())))),
        "gpu.memory": Fact("; ".join(memory)),
    }


def judged_driver(facts: Facts) -> Fact:
    """Add to the driver that it is too old for the CUDA which torch was built with, where it is.

    Args:
        facts: ``driver``, and ``torch.cuda`` and ``gpu.available`` where they are known.

    Returns:
        The driver. A GPU that torch can use makes it good enough: NVIDIA's compatibility package lets old ones serve.
    """
    driver, cuda = facts["driver"], facts.get("torch.cuda", Fact(None))
    works = facts.get("gpu.available", Fact(None)).value == "Yes"
    if driver.value is None or cuda.value is None or works:
        return driver
    least = _OLDEST_DRIVER.get(numbers(cuda.value)[0])
    if least is None or numbers(driver.value) >= least:
        return driver
    wanted = ".".join(map(str, least))
    return Fact(driver.value, f"CUDA {cuda.value} of PyTorch needs {wanted} or later")

"""Two machines that share nothing but a network and a folder: network namespaces with names and addresses of their own.

Needs root and iproute2 (``ip netns``); skipped with the reason elsewhere.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TOY = Path(__file__).parents[2] / "unit/training/toy_run.py"
HOSTS = {"node-a": "10.231.7.1", "node-b": "10.231.7.2"}

pytestmark = pytest.mark.slow


def call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def namespace_of(host: str) -> str:
    return f"proxydet-{host}-{os.getpid()}"


@pytest.fixture
def machines() -> Iterator[None]:
    """Two namespaces joined by a cable; each knows both names."""
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and iproute2; missing: {', '.join(missing) or 'root'}")
    ends = {host: f"pd{index}-{os.getpid()}"[:15] for index, host in enumerate(HOSTS)}
    names = "127.0.0.1 localhost\n" + "".join(f"{ip} {host}\n" for host, ip in HOSTS.items())
    folders = [Path("/etc/netns", namespace_of(host)) for host in HOSTS]
    try:
        try:
            for host in HOSTS:
                call("ip", "netns", "add", namespace_of(host))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(names)
        first, second = HOSTS
        cable = ["ip", "link", "add", ends[first], "netns", namespace_of(first), "type", "veth"]
        call(*cable, "peer", "name", ends[second], "netns", namespace_of(second))
        for host, address in HOSTS.items():
            inside = ("ip", "-n", namespace_of(host))
            call(*inside, "addr", "add", f"{address}/24", "dev", ends[host])
            call(*inside, "link", "set", "lo", "up")
            call(*inside, "link", "set", ends[host], "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", namespace_of(host)], capture_output=True)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def start(host: str, folder: Path) -> subprocess.Popen[str]:
    """Run the toy training as one machine of two."""
    words = [sys.executable, str(TOY), str(folder), "--nodes", "2", "--endpoint", "node-a:29400"]
    inner = f"hostname {host}; exec {shlex.join(words)}"
    command = ["ip", "netns", "exec", namespace_of(host), "unshare", "--uts", "sh", "-c", inner]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_two_machines_train_as_two_processes_of_one_do(machines: None, tmp_path: Path) -> None:
    nodes = [start(host, tmp_path / "apart") for host in HOSTS]
    for node in nodes:
        _, errors = node.communicate(timeout=600)
        assert node.returncode == 0, errors
    alone = [sys.executable, str(TOY), str(tmp_path / "alone"), "--launch", "2"]
    subprocess.run(alone, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    apart, together = weights(tmp_path / "apart"), weights(tmp_path / "alone")
    assert all(torch.equal(apart[name], together[name]) for name in together)

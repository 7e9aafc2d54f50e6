"""A drawn data set that is small enough to train on in seconds; two nodes on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from proxydet.data.synthetic import SyntheticConfig, make_dataset


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> list[str]:
    """Overrides that name the data set."""
    folder = tmp_path_factory.mktemp("drawn")
    config = SyntheticConfig(
        images_train=24, images_val=4, image_label_images_per_class=2, size=96, image_label_size=48
    )
    path = make_dataset(folder / "data", config)
    return [f"data.description={path}", f"data.cache={folder / 'cache'}", "training.threads=1"]


@pytest.fixture
def base(drawn) -> list[str]:
    """Overrides of a training of a few steps."""
    return [
        *drawn,
        "training.iterations=6",
        "training.checkpoints.period=2",
        "training.log.period=1",
        "training.log.tensorboard=false",
    ]


def path_of(overrides: list[str], key: str) -> Path:
    """Find the value of an override that is a path."""
    return next(Path(item.split("=", 1)[1]) for item in overrides if item.startswith(f"{key}="))


NODES = {"node-1": "10.231.7.1", "node-2": "10.231.7.2"}


class TwoNodes:
    """Two network namespaces with names and addresses of their own; the file system is one."""

    names = tuple(NODES)

    def __init__(self, hosts: Path) -> None:
        self._hosts = hosts

    @staticmethod
    def namespace(name: str) -> str:
        return f"proxydet-{name}-{os.getpid()}"

    def start(
        self, name: str, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a node."""
        inner = 'mount --bind "$1" /etc/hosts && hostname "$0" && shift && exec "$@"'
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.namespace(name)}",
            "unshare",
            "--uts",
            "--mount",
        ]
        return subprocess.Popen(
            [*enter, "sh", "-c", inner, name, str(self._hosts), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Iterator[TwoNodes]:
    """Two namespaces joined by a cable; each knows both names."""
    missing = [name for name in ("ip", "nsenter", "unshare", "hostname") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root, iproute2, util-linux; missing: {', '.join(missing) or 'root'}")
    hosts = tmp_path_factory.mktemp("nodes") / "hosts"
    lines = [f"{address} {name}" for name, address in NODES.items()]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    spaces = {name: TwoNodes.namespace(name) for name in NODES}
    ends = {name: f"pd{index}-{os.getpid()}"[:15] for index, name in enumerate(NODES)}

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for space in spaces.values():
                ip("netns", "add", space)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
        first, second = NODES
        peer = ("peer", "name", ends[second], "netns", spaces[second])
        ip("link", "add", ends[first], "netns", spaces[first], "type", "veth", *peer)
        for name, address in NODES.items():
            ip("-n", spaces[name], "addr", "add", f"{address}/24", "dev", ends[name])
            ip("-n", spaces[name], "link", "set", "lo", "up")
            ip("-n", spaces[name], "link", "set", ends[name], "up")
        yield TwoNodes(hosts)
    finally:
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

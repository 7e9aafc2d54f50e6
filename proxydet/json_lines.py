"""Files of one JSON object a line, which grow while a run goes on and may end in the middle of a line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxydet.errors import DiskFullError


class JsonLines:
    """A file of one JSON object a line, each with the ``iteration`` it belongs to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the records; a last line that was cut short by a crash is passed over."""
        if not self.path.exists():
            return
        *whole, _cut = self.path.read_text(encoding="utf-8").split("\n")
        yield from map(json.loads, whole)

    def append(self, record: dict[str, Any]) -> None:
        """Write a record.

        Raises:
            DiskFullError: There is no room.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    f"There is no room on the disk for {self.path}.",
                    hint="Make room and start the same command again: it goes on from the newest checkpoint.",
                    path=self.path,
                ) from error
            raise

    def forget_after(self, iteration: int) -> None:
        """Remove the records of steps that an interrupted run took and a resumed one will take again."""
        kept = [record for record in self.read() if record["iteration"] <= iteration]
        if not self.path.exists():
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        temporary.replace(self.path)

"""Keeps text embeddings between runs, by what made them."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)

_TABLES = """
CREATE TABLE IF NOT EXISTS embeddings (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
"""
_VARIABLES = 500


class EmbeddingCache:
    """A file of embeddings, each under the digest of the encoder's weights and the encoded text.

    Several processes may use the file at once. A damaged file is put aside and begun anew: all that it held
    can be computed again.

    Args:
        path: The file; its folder is made when first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, encoder_digest: str, texts: Iterable[str]) -> dict[str, Floats]:
        """Find embeddings (D,) by text; texts that are not there are left out."""
        by_key = {_key(encoder_digest, text): text for text in texts}
        found: dict[str, Floats] = {}
        with self._opened() as database:
            keys = list(by_key)
            for start in range(0, len(keys), _VARIABLES):
                chunk = keys[start : start + _VARIABLES]
                marks = ",".join("?" * len(chunk))
                query = f"SELECT key, row FROM embeddings WHERE key IN ({marks})"  # noqa: S608 only question marks
                for key, row in database.execute(query, chunk):
                    found[by_key[bytes(key)]] = np.frombuffer(row, "<f4").astype(np.float32)
        return found

    def put(self, encoder_digest: str, rows: Mapping[str, Floats]) -> None:
        """Keep embeddings (D,) by text."""
        entries = [
            (_key(encoder_digest, t), row.astype("<f4").tobytes()) for t, row in rows.items()
        ]
        with self._opened() as database, database:
            database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?)", entries)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as database:
            yield database

    def _connect(self) -> sqlite3.Connection:
        try:
            return _connected(self.path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = self.path.with_name(f"{self.path.name}.damaged")
            self.path.replace(aside)
            logger.warning("the cache of embeddings is damaged (%s); it is now %s", error, aside)
            return _connected(self.path)


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=30)
    try:
        database.executescript(_TABLES)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _key(encoder_digest: str, text: str) -> bytes:
    return hashlib.sha256(f"{encoder_digest}\n{text}".encode()).digest()

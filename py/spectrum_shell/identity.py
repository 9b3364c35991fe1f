"""Ids for events that come without one: the same line of a file always gets the same id.

An id is a UUID (version 5) of what the line says and of how often the file said it before. So a
file that is loaded twice, or has grown since, brings no event a second time, while two equal
lines of one file stay two events.
"""

import hashlib
import sqlite3
from uuid import NAMESPACE_URL, uuid5

NAMESPACE = uuid5(NAMESPACE_URL, "spectrum:raw_events")

_VARIANTS = "89ab" * 4
_FILTER_BITS = 27
_FILTER_MASK = (1 << _FILTER_BITS) - 1
_MEMORY_ENTRIES = 100_000
_CACHE_KIB = 8_192


class EventIds:
    """The ids of one file's lines.

    ``derive(content)`` is uuid5(NAMESPACE, content) for the first line with that content, and
    uuid5(NAMESPACE, content + NUL + n) for the n-th. Use a new instance for each file.
    """

    def __init__(self, memory_entries: int = _MEMORY_ENTRIES) -> None:
        self._occurrences = Occurrences(memory_entries)

    def derive(self, content: bytes) -> str:
        digest = hashlib.sha1(NAMESPACE.bytes + content, usedforsecurity=False)
        occurrence = self._occurrences.count(digest.digest())
        if occurrence > 1:
            digest.update(b"\0%d" % occurrence)
        text = digest.hexdigest()
        variant = _VARIANTS[int(text[16], 16)]
        return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{variant}{text[17:20]}-{text[20:32]}"


class Occurrences:
    """How often each digest was seen, exactly, in bounded memory.

    Recent digests are counted in a dictionary. When it is full it goes to a temporary SQLite
    file, sorted, and a bit filter (16 MiB) remembers what may be there, so that a new line, the
    usual case, costs no look-up. Digests are told apart by their first 64 bits: two that agree
    share a count, which still yields different ids.
    """

    def __init__(self, memory_entries: int = _MEMORY_ENTRIES) -> None:
        self._memory_entries = memory_entries
        self._recent: dict[int, int] = {}
        self._file: sqlite3.Connection | None = None
        self._filter = bytearray()

    def count(self, digest: bytes) -> int:
        """1 for the first time a digest is seen, 2 for the second, ..."""
        key = int.from_bytes(digest[:8], "big", signed=True)
        seen = self._recent.get(key)
        if seen is None:
            seen = self._count_in_file(key)
        self._recent[key] = seen + 1
        if len(self._recent) >= self._memory_entries:
            self._spill()
        return seen + 1

    def _count_in_file(self, key: int) -> int:
        bit = key & _FILTER_MASK
        if self._file is None or not self._filter[bit >> 3] >> (bit & 7) & 1:
            return 0
        row = self._file.execute("SELECT seen FROM digests WHERE digest = ?", (key,)).fetchone()
        return row[0] if row else 0

    def _spill(self) -> None:
        if self._file is None:
            self._file = _open_temporary_file()
            self._filter = bytearray(1 << (_FILTER_BITS - 3))
        keys = sorted(self._recent)
        self._file.execute("BEGIN")
        self._file.executemany(
            "INSERT OR REPLACE INTO digests VALUES (?, ?)",
            zip(keys, map(self._recent.__getitem__, keys), strict=True),
        )
        self._file.execute("COMMIT")
        for key in keys:
            bit = key & _FILTER_MASK
            self._filter[bit >> 3] |= 1 << (bit & 7)
        self._recent.clear()


def _open_temporary_file() -> sqlite3.Connection:
    """A database without a name: SQLite removes its file when the connection ends."""
    file = sqlite3.connect("", isolation_level=None)
    file.execute("PRAGMA journal_mode = OFF")
    file.execute("PRAGMA synchronous = OFF")
    file.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    file.execute("CREATE TABLE digests (digest INTEGER PRIMARY KEY, seen INTEGER NOT NULL)")
    return file

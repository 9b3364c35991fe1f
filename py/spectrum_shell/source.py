"""Files and standard input as lines of bytes, unpacked where they are gzip, in bounded memory."""

import gzip
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spectrum_shell.errors import Refused

LONGEST_LINE = 16 * 1024 * 1024

_BLOCK = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Source:
    """One input: ``lines()`` gives its lines, ``bytes_read`` says how far it got.

    ``size`` is the number of bytes as stored (packed, if the input is), or None where it cannot
    be known, as for a pipe.
    """

    def __init__(self, path: str) -> None:
        self.name = "standard input" if path == "-" else path
        self.bytes_read = 0
        self._owned = path != "-"
        # Closed when the source is left; standard input is not ours to close.
        self._file: BinaryIO = Path(path).open("rb") if self._owned else sys.stdin.buffer  # noqa: SIM115
        self._head = b""
        status = os.fstat(self._file.fileno())
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else None

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            self._file.close()

    def read(self, size: int = _BLOCK) -> bytes:
        """At most ``size`` stored bytes; empty at the end."""
        block, self._head = self._head, b""
        if not block:
            block = self._file.read1(size)
            self.bytes_read += len(block)
        elif len(block) > size:
            block, self._head = block[:size], block[size:]
        return block

    def lines(self) -> Iterator[bytes]:
        """The lines, unpacked, without their newline. Raises Refused for a damaged file."""
        rest = b""
        first = True
        for block in self._blocks():
            if first:
                if block.startswith(_UTF16_MARKS):
                    raise Refused(
                        f"{self.name}: this is UTF-16 text",
                        "make it UTF-8 first: iconv -f UTF-16 -t UTF-8",
                    )
                block = block.removeprefix(_UTF8_MARK)
                first = False
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            if len(rest) > LONGEST_LINE:
                raise Refused(
                    f"{self.name}: a line is longer than {LONGEST_LINE // 1024**2} MiB",
                    "one event a line is needed: is this the right file?",
                )
            yield from lines
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        while len(self._head) < len(_UTF8_MARK):
            more = self._file.read1(_BLOCK)
            if not more:
                break
            self.bytes_read += len(more)
            self._head += more
        stream = gzip.GzipFile(fileobj=self) if self._head.startswith(_GZIP_MAGIC) else self
        try:
            while block := stream.read(_BLOCK):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Refused(
                f"{self.name}: the gzip data is damaged: {error}",
                "fetch the file again, or check it with gzip -t",
            ) from error

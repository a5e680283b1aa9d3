"""Server-sent events (WHATWG HTML, section 9.2.6), read from bytes as they arrive."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END_OF_LINE = re.compile(rb"\r\n|\n|\r(?!$)")  # a last CR may be half of a CRLF


class Decoder:
    """Makes events of pieces that are cut anywhere. Only their data is handed out: ours holds all that the fields tell."""

    def __init__(self) -> None:
        self.retry_seconds = 0.0
        """How long the service asks to wait before the stream is opened again."""
        self._rest = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that `piece` completes."""
        *lines, self._rest = _END_OF_LINE.split(self._rest + piece)
        for line in lines:
            if line:
                self._take(line.decode(errors="replace"))
            elif self._data:
                yield "\n".join(self._data)
                self._data = []

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        elif name == "retry" and (milliseconds := value.strip()).isdecimal():
            self.retry_seconds = int(milliseconds) / 1000

"""Text in, its first wrongly decoded piece out (shards must hold what people wrote)."""

from __future__ import annotations

import re

_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_FOREIGN = re.compile(r"[^\x00-\x7f]{2,}")


def broken_text(text: str) -> str | None:
    """The first piece of a text that was decoded wrongly: lost or control characters, or UTF-8 read as Windows-1252."""
    if found := _BROKEN.search(text):
        return found[0]
    for piece in _FOREIGN.findall(text):
        try:
            if piece.encode("cp1252").decode("utf-8") != piece:
                return piece
        except UnicodeError:
            continue
    return None

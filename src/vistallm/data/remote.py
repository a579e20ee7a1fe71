"""Places of files: a local path, `http(s)://`, `s3://` (by `aws s3 cp`) or `pipe:COMMAND` -> bytes, tried again.

A remote file is read as a stream that reconnects where it was cut off, or is kept whole in a cache folder.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

REMOTE = ("http://", "https://", "s3://", "pipe:")
FINAL = (400, 401, 403, 404, 410)  # HTTP answers that another try does not change


def is_remote(place: str) -> bool:
    """Whether a place is not a local path."""
    return place.startswith(REMOTE)


def join(root: str, name: str) -> str:
    """The place of a file in a root; `{}` in a `pipe:` command stands for the file's name."""
    if root.startswith("pipe:"):
        return root.replace("{}", shlex.quote(name))
    return f"{root.rstrip('/')}/{name}"


@dataclass(frozen=True)
class Files:
    """Opens places for reading.

    Attributes:
        cache: folder that keeps whole copies of remote files; None = read them as streams.
        retries: tries without a byte of progress before it gives up; wait: seconds before the second, doubled each
            time; timeout: seconds without a byte that count as a failed try.
    """

    cache: Path | None = None
    retries: int = 5
    wait: float = 0.5
    timeout: float = 60.0

    def open(self, place: str, size: int | None = None) -> BinaryIO:
        """Open a place; `size` is what the file must have, in bytes, when it is kept in the cache."""
        if not is_remote(place):
            return Path(place).open("rb")
        if self.cache is None:
            return cast(BinaryIO, io.BufferedReader(_Stream(place, self), 1 << 20))
        return self._cached(place, size).open("rb")

    def _cached(self, place: str, size: int | None) -> Path:
        assert self.cache is not None
        digest = hashlib.sha256(place.encode()).hexdigest()[:16]
        path = self.cache / f"{digest}-{size}-{place.rpartition('/')[2][-60:]}"
        if path.is_file():
            return path
        self.cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out, io.BufferedReader(_Stream(place, self), 1 << 20) as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
            if size is not None and temporary.stat().st_size != size:
                raise ValueError(
                    f"{place}: the index says {size} bytes, got {temporary.stat().st_size}; the shard was replaced "
                    "or cut; build or copy it again"
                )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


class _Stream(io.RawIOBase):
    """A remote file from its start; after a failure it connects again and goes on at the same byte."""

    def __init__(self, place: str, files: Files) -> None:
        self.place, self.files = place, files
        self._at = 0
        self._source: http.client.HTTPResponse | subprocess.Popen[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read some bytes, 0 at the end; raises ValueError when the tries are used up."""
        for attempt in range(self.files.retries):
            if attempt:
                time.sleep(self.files.wait * 2 ** (attempt - 1))
            try:
                if self._source is None:
                    self._source = self._connect()
                count = self._read(buffer)
            except (OSError, http.client.HTTPException) as error:
                last: Exception = error
                self._drop()
                if isinstance(error, urllib.error.HTTPError) and error.code in FINAL:
                    break
                continue
            self._at += count
            return count
        raise ValueError(
            f"{self.place}: gave up at byte {self._at} after {attempt + 1} tries ({type(last).__name__}: {last}); "
            "check the address and the network, then start again: the run resumes (data.cache keeps what is read)"
        ) from last

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def _connect(self) -> http.client.HTTPResponse | subprocess.Popen[bytes]:
        """Open the source at byte `_at`."""
        skip = self._at
        source: http.client.HTTPResponse | subprocess.Popen[bytes]
        if self.place.startswith("http"):
            request = urllib.request.Request(self.place, headers={"Range": f"bytes={skip}-"} if skip else {})
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.files.timeout)
            skip = 0 if answer.status == 206 else skip  # a server without ranges sends the whole file again
            source = answer
        else:
            s3 = f"aws s3 cp {shlex.quote(self.place)} -"
            command = self.place.removeprefix("pipe:") if self.place.startswith("pipe:") else s3
            source = subprocess.Popen(["timeout", str(24 * 3600), "sh", "-c", command], stdout=subprocess.PIPE)
        pipe = source.stdout if isinstance(source, subprocess.Popen) else source
        assert pipe is not None
        while skip:
            done = len(pipe.read(min(skip, 1 << 20)))
            if not done:
                raise ConnectionError(f"ended {skip} bytes before the place where reading stopped")
            skip -= done
        return source

    def _read(self, buffer: memoryview) -> int:
        """Read from the open source; an end that comes too early is a ConnectionError."""
        source = self._source
        if isinstance(source, subprocess.Popen):
            assert source.stdout is not None
            count = source.stdout.readinto(buffer)  # type: ignore[attr-defined]
            if count == 0 and (code := source.wait()) != 0:
                raise ConnectionError(f"the command ended with code {code}")
            return count
        assert source is not None
        left = source.length
        count = source.readinto(buffer)
        if count == 0 and left:
            raise ConnectionError(f"the connection ended {left} bytes early")
        return count

    def _drop(self) -> None:
        source, self._source = self._source, None
        if isinstance(source, subprocess.Popen):
            source.kill()
            source.wait()
            assert source.stdout is not None
            source.stdout.close()
        elif source is not None:
            source.close()

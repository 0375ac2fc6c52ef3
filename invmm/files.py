"""Files that are whole or absent, and what identifies them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_MAX_BYTES = 2 << 30
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a run after a power cut, sees all of it or nothing.

    Raises:
        OSError: for example a full disk; the temporary file is removed and `path` untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_file(path: Path) -> bytes:
    """All bytes of a regular file; a pipe, a device or a folder in its place never hangs a command.

    Raises:
        OSError: it is missing, unreadable, no regular file, or larger than 2 GiB.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > _MAX_BYTES:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes", str(path))
        return file.read()


FileState = tuple[int, int, int, int]
"""Changes whenever a file is written: what was read of it in one state can be kept."""


def state_of(path: Path) -> FileState:
    """The state of a file now.

    Raises:
        OSError: it is missing.
    """
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; of a file that was not written since, as it was found."""
    return _sha256(path, state_of(path))


@lru_cache(maxsize=1 << 16)
def _sha256(path: Path, state: FileState) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_key(image_id: str) -> str:
    """A folder name for any id: a readable part and a hash, never a path."""
    digest = hashlib.sha256(image_id.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{_UNSAFE.sub('-', image_id)[:60].strip('.-') or 'image'}-{digest}"


def json_digest(content: Mapping[str, Any]) -> str:
    """12 hex digits over plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

"""Read and write files safely: atomic writes, bounded reads, locks between processes, and strict JSON.

A file is written under a temporary name, flushed to disk, then renamed. A command that computes for minutes calls
:func:`check_target` first, to learn whether its result can be written.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

LARGEST = 256 * 2**20
"""Most bytes that are read of a file to see whether it is ours; almost all of ours are smaller."""


def read_plain(path: Path, most: int = LARGEST) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: the file cannot be read, is larger than ``most`` bytes, or is no regular file. The call neither waits
            for a pipe nor reads a device without end.
    """

    def refuse(number: int, why: str) -> OSError:
        return OSError(number, why, str(path))

    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise refuse(errno.EINVAL, "No plain file")
        content = file.read(most + 1)
    if len(content) > most:
        raise refuse(errno.EFBIG, f"More than {most:,} bytes")
    return content


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> Path:
    """Write ``path`` atomically and return it; on an error the previous file is left unchanged.

    A symbolic link stays a link, and its target is written. The umask decides who may read the file.

    Raises:
        OSError: the file cannot be written.
    """
    whole = path.resolve()
    temporary = whole.with_name(f".{whole.name[:200]}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        sync(temporary)
        os.replace(temporary, whole)
        sync(whole.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def check_target(
    path: Path,
    what: str,
    ours: Callable[[bytes], bool],
    *,
    todo: str = "name another file",
    make_folder: bool = False,
    largest: int | None = LARGEST,
) -> Path:
    """Return ``path`` if it may be written: it does not exist, is empty, or is of our own kind.

    Call this before the work whose result goes there. Nothing is created.

    Args:
        path: the file to write.
        what: the file in words, such as ``a tuning table``.
        ours: takes a file's bytes; returns whether it is an earlier file of this kind, which may be replaced.
        todo: what the user can do.
        make_folder: whether the writer creates the folder; otherwise the folder must exist.
        largest: a larger file, in bytes, is not ours. None: any size, and ``ours`` gets the first :data:`LARGEST`
            bytes.

    Raises:
        UserError: ``path`` is a folder, a link to nothing, another kind of file, read-only, or in a folder that cannot
            be written.
    """

    def refuse(why: str, cause: BaseException | None = None) -> UserError:
        error = UserError(f"{what} that can be written", f"{path} ({why})", todo)
        error.__cause__ = cause
        return error

    try:
        if path.is_dir():
            raise refuse("a folder")
        if path.is_symlink() and not path.exists():
            raise refuse("a link to nothing")
        if path.exists() and not path.is_file():
            raise refuse("no regular file")
        if path.is_file() and path.stat().st_size:
            content = b""
            if largest is None or path.stat().st_size <= largest:
                with path.open("rb") as file:
                    content = file.read(LARGEST if largest is None else largest)
            if not content or not ours(content):
                raise refuse(f"there already, and not {what}: it would be lost")
            if not os.access(path, os.W_OK):
                raise refuse("read-only")
        check_folder(path.resolve().parent, make_folder)
    except OSError as error:
        raise refuse(error.strerror or str(error), error) from error
    return path


def check_folder(folder: Path, make: bool = True) -> None:
    """Check that files can be written into ``folder``; with ``make`` the folder need not exist yet.

    Raises:
        OSError: they cannot.
    """
    while make:
        try:
            os.lstat(folder)
            break
        except FileNotFoundError:  # any other error, such as a name that is too long, would also stop the writer
            folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, shared by all processes and threads that read, change and write it.

    The lock is the file ``<name>.lock`` in the same folder. The system releases it if the process dies.
    """
    import filelock

    lock_file = path.resolve().with_name(f"{path.name}.lock")
    lock: filelock.BaseFileLock = filelock.FileLock(lock_file, thread_local=False)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks: the file's existence is the lock
        lock = filelock.SoftFileLock(lock_file, timeout=60, thread_local=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def json_text(value: Any, **layout: Any) -> str:
    """Return ``value`` as standard JSON; NaN and infinities, which JSON lacks, become ``null``.

    Args:
        value: mappings, lists, tuples, strings, numbers, booleans and None.
        layout: options of :func:`json.dumps`: indent, separators, sort_keys.
    """
    return json.dumps(_finite(value), allow_nan=False, **layout)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def json_value(text: str | bytes) -> Any:
    """Parse standard JSON.

    Raises:
        ValueError: ``text`` is not JSON. Bare NaN and excessive nesting are refused too.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None

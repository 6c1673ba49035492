"""Write the files of a run; a disk that is full or read-only becomes an error that says how to go on."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io import safe_files


def write_file(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all, as :func:`resnet_fast.io.safe_files.write_whole` does.

    Raises:
        UserError: The file cannot be written, for example because the disk is full.
    """
    try:
        safe_files.write_whole(path, content)
    except OSError as error:
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> UserError:
    """Return the error to raise when writing ``path`` failed with ``error``."""
    return UserError(
        f"space and permission to write {path}", str(error.strerror), "fix that and continue with --resume auto"
    )

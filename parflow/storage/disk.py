"""What is said when a disk doesn't take or give what it is asked to: why, how much room is left, and what to do."""

from __future__ import annotations

import errno
import os

from parflow.errors import OutputError


def out_of(error: OSError, path: str) -> str:
    """Say why a file can't be written or read, and what to do: on a full disk, how much room is left there.

    Examples
    --------
    >>> out_of(PermissionError(13, "Permission denied"), "/srv/results")
    'Permission denied. Check its permissions and its disk, then resume the run.'
    """
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Check its permissions and its disk, then resume the run."
    return f"{reason}{room(path)}. Make room there, then resume the run."


def room(path: str) -> str:
    """Say how much room is left on a path's disk; nothing where nobody knows."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        disk = os.statvfs(path)
    except OSError:
        return ""
    return f" ({disk.f_bavail * disk.f_frsize:,} of {disk.f_blocks * disk.f_frsize:,} bytes are free at {path})"


def unwritable(path: str, error: OSError) -> OutputError:
    """Return the error of a sink whose file can't be written."""
    place = error.filename2 or error.filename or path
    return OutputError(f"can't write {place!r}: {out_of(error, path)}")

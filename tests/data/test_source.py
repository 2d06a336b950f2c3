"""Bytes from disks and servers: every range is the slice of the file, whatever the server does in
between.
"""

import gzip
import hashlib
import io
import logging
import os
import random
import re
import resource
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import web
from pipeline.data.source import PIECE, Sources, Stat, expand, is_remote
from pipeline.errors import JobError, UserError
from tests.helpers.server import Server

DATA = random.Random(1).randbytes(100_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole schedule of tries in hundredths of a second."""
    monkeypatch.setattr(web, "TRIES", 4)
    monkeypatch.setattr(web, "WAIT_FIRST", 0.002)
    monkeypatch.setattr(web, "WAIT_MAX", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(DATA)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        yield server


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which are not waited for."""
    waits: list[float] = []
    monkeypatch.setattr(web.time, "sleep", waits.append)
    return waits


def ranges(server: Server) -> list[str]:
    return [asked for _, _, asked in server.requests]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def refused(call: Callable[[], object], kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


# Locations


def test_what_is_remote() -> None:
    assert all(map(is_remote, ("http://h/a", "https://h:1/a?b#c", "HTTPS://h")))
    assert not any(
        map(
            is_remote,
            ("a.tar", "/http://h/a", "file:///a", "http:///a", "http:a", "s3://b/a", "pipe:cat"),
        )
    )


def test_patterns_name_locations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "with space.tar", "100%.tar", "[x]*.tar"):
        (folder / name).write_bytes(b"")
    first, second = f"{folder}/a.tar", f"{folder}/b.tar"
    for patterns in (
        (first, second),
        (f"{folder}/?.tar",),
        (f"{folder}/{{a,b}}.tar",),
        (f"file:{folder}/{{a,b}}.tar",),
    ):
        assert expand(patterns) == [first, second]
    assert expand((second, first)) == [second, first]
    assert expand(
        (f"file://{folder}/with%20space.tar", f"FILE://localhost{folder}/100%25.tar")
    ) == [
        f"{folder}/with space.tar",
        f"{folder}/100%.tar",
    ]
    assert expand((f"{folder}/[x]*.tar",)) == [f"{folder}/[x]*.tar"]  # a file of that very name
    monkeypatch.chdir(folder)
    assert expand(("./?.tar",)) == ["./a.tar", "./b.tar"]  # as written


def test_urls_are_expanded_and_not_looked_for() -> None:
    assert expand(("https://nowhere.invalid/{00..02}.tar?sig=a%2A[1]",)) == [
        f"https://nowhere.invalid/0{i}.tar?sig=a%2A[1]" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "pipe:cat {folder}/a.tar",
            "runs a program, which data may not; serve the tar by https or copy it",
        ),
        ("s3://bucket/a.tar", "s3: is not read; serve the tar by https or copy it to a disk"),
        ("gs://bucket/a.tar", "gs: is not read"),
        ("hdfs://host/a.tar", "hdfs: is not read"),
        ("ftp://host/a.tar", "ftp: is not read"),
        (
            "https://host/*.tar",
            r"https://host/\*.tar: a server lists nothing; write the numbers as {{00000..00127}}",
        ),
        ("https:///a.tar", "names no server; write https://HOST/PATH"),
        ("http:a.tar", "names no server; write http://HOST/PATH"),
        ("file://other{folder}/a.tar", "is on another host; write file:///PATH"),
        ("file:{folder}/b.tar", "/b.tar: no such file"),
        ("{folder}/b.tar", "b.tar: no such file"),
        ("{folder}/{{a,b}}.tar", "b.tar: no such file"),
        ("{folder}/*.tgz", "matches no file"),
        ("{folder}", r"a folder; add /\*.tar"),
        ("{folder}/../*", r"shards: a folder; add /\*.tar"),
        ("{folder}/{{a,b.tar", "write it like"),
        ("${{NO_SUCH_NAME}}.tar", "write it like"),
    ],
)
def test_bad_patterns(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.shards: .*{message.format()}"):
        expand((pattern.format(folder=folder),))


def test_no_pattern_and_one_named_twice(folder: Path) -> None:
    assert refused(lambda: expand(())).startswith("data.shards: empty")
    for again in (f"{folder}/a.tar", f"file:{folder}/a.tar", f"{folder}/./a.tar"):
        assert "a.tar: named twice" in refused(
            lambda again=again: expand((f"{folder}/*.tar", again))
        )
    assert "named twice" in refused(lambda: expand(("http://h/{0..3}", "http://h/2")))


# Any range is the slice of the file


@pytest.mark.parametrize(
    "where", ["disk", "server", "server and cache", "server and a small cache"]
)
def test_any_range_from_eight_threads(
    where: str, folder: Path, server: Server, tmp_path: Path
) -> None:
    draw = random.Random(2)
    ends = [sorted(draw.choices(range(len(DATA) + 1), k=2)) for _ in range(40)]
    ends += [[0, 0], [0, 1], [0, len(DATA)], [len(DATA) - 1, len(DATA)], [len(DATA), len(DATA)]]
    location = f"{folder}/a.tar" if where == "disk" else server.url("a.tar")
    cached = {"server and cache": 1 << 30, "server and a small cache": 200_000}.get(where, 0)
    sources = Sources(tmp_path / "cache" if cached else None, cached)
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda span: sources.read(location, span[0], span[1] - span[0]), ends * 3)
        )
    assert found == [DATA[start:end] for start, end in ends] * 3


def test_stat(folder: Path, server: Server) -> None:
    time_ns = (folder / "a.tar").stat().st_mtime_ns
    assert Sources().stat(f"{folder}/a.tar") == Stat(len(DATA), str(time_ns))
    assert Sources().stat(server.url("a.tar")) == Stat(len(DATA), f'"{time_ns:x}"')
    server.etag = ""
    assert Sources().stat(server.url("a.tar")).stamp.endswith(" GMT")
    server.stamps = False
    assert Sources().stat(server.url("a.tar")) == Stat(len(DATA), "")
    assert {method for method, _, _ in server.requests} == {"GET"}  # HEAD is refused


def test_an_empty_file(folder: Path, server: Server) -> None:
    (folder / "empty.tar").write_bytes(b"")
    for ranges in (True, False):  # 416, or 200 with nothing in it
        server.ranges = ranges
        for location in (f"{folder}/empty.tar", server.url("empty.tar")):
            sources = Sources()
            assert sources.stat(location).size == 0
            assert sources.read(location, 0, 0) == b""
            assert sources.fetch(location) == b""
            with sources.open(location) as file:
                assert file.read() == b""
            assert "ends before byte 7" in refused(lambda s=sources, at=location: s.read(at, 2, 5))


def test_no_fewer_bytes_than_asked_for(folder: Path, server: Server) -> None:
    for location in (f"{folder}/a.tar", server.url("a.tar")):
        message = refused(lambda at=location: Sources().read(at, 99_000, 2_000))
        assert message.startswith(f"{location}: ends before byte 101000, ")
        with pytest.raises(UserError):
            Sources().read(location, 200_000, 1)


def test_as_many_files_as_there_are(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [folder / f"{i}.tar" for i in range(100)]
    for path in paths:
        path.write_bytes(path.name.encode())
    sources = Sources()
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(soft, len(os.listdir("/proc/self/fd")) + 40), hard)
    )  # noqa: PTH208
    try:
        assert [sources.read(str(path), 0, len(path.name)) for path in paths] == [
            path.name.encode() for path in paths
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_not_there(folder: Path, server: Server) -> None:
    sources = Sources()
    for location in (f"{folder}/b.tar", server.url("b.tar")):
        assert sources.fetch(location) is None
        for call in (sources.stat, sources.open, lambda at: sources.read(at, 0, 1)):
            assert refused(lambda call=call, at=location: call(at)).startswith(f"{location}: ")
    assert "cannot be read: Is a directory" in refused(lambda: sources.read(str(folder), 0, 1))
    assert "cannot be read: Is a directory" in refused(lambda: sources.fetch(str(folder)))


# From end to end


def test_a_file_is_open_as_any_other(folder: Path, server: Server) -> None:
    with Sources().open(server.url("a.tar")) as file, (folder / "a.tar").open("rb") as truth:
        draw = random.Random(3)
        for _ in range(200):
            at, whence = draw.choice(
                [(draw.randrange(120_000), os.SEEK_SET), (-draw.randrange(100_000), os.SEEK_END)]
            )
            size = draw.randrange(20_000)
            assert file.seek(at, whence) == truth.seek(at, whence) == file.tell()
            assert file.read(size) == truth.read(size)
        assert file.seek(0) == 0
        assert file.read() == DATA
        assert file.read(1) == b""
    assert file.closed


def test_a_scan_asks_in_pieces(folder: Path, server: Server, tmp_path: Path) -> None:
    with tarfile.open(folder / "big.tar", "w") as tar:
        for i in range(20):
            member = tarfile.TarInfo(f"{i:03d}.jpg")
            member.size = PIECE // 8 + i
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    size = (folder / "big.tar").stat().st_size
    sources = Sources(tmp_path / "cache", 1 << 30)
    with sources.open(server.url("big.tar")) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        assert tar.getnames() == [f"{i:03d}.jpg" for i in range(20)]
    assert len(server.requests) <= 1 + -(-size // PIECE) + 1
    server.requests.clear()
    with sources.open(server.url("big.tar")) as file:
        assert file.read() == (folder / "big.tar").read_bytes()
    assert ranges(server) == [
        f"bytes={at}-{min(at + PIECE, size) - 1}" for at in range(0, size, PIECE)
    ]
    server.requests.clear()
    with sources.open(server.url("big.tar")) as file:
        assert len(file.read(2 * PIECE + 9)) == 2 * PIECE + 9
    assert ranges(server) == [
        f"bytes={at}-{min(at + PIECE, size) - 1}" for at in range(0, size, PIECE)
    ]
    assert not files(tmp_path / "cache")


def test_a_small_file_as_a_whole(folder: Path, server: Server) -> None:
    for location in (f"{folder}/a.tar", server.url("a.tar")):
        assert Sources().fetch(location) == DATA
    assert ranges(server) == [""]
    for status in (403, 404, 410):
        server.statuses["a.tar"] = status
        assert Sources().fetch(server.url("a.tar")) is None
    server.statuses["a.tar"] = 401
    assert "401 Unauthorized" in refused(lambda: Sources().fetch(server.url("a.tar")))


def test_bytes_are_as_they_lie_on_the_server(folder: Path, server: Server) -> None:
    """A server may say of a *.gz that it is compressed; whoever wants it unpacked can do that."""
    (folder / "index.gz").write_bytes(packed := gzip.compress(DATA[:1000] * 9))
    server.headers["Content-Encoding"] = "gzip"
    assert Sources().fetch(server.url("index.gz")) == packed
    assert Sources().read(server.url("index.gz"), 3, 500) == packed[3:503]


def test_connections_are_kept(server: Server) -> None:
    sources = Sources()
    for i in range(20):
        assert sources.read(server.url("a.tar"), i, 5_000) == DATA[i : i + 5_000]
    assert server.connections == 1


# What passes is tried again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_status_that_passes(server: Server, status: int, slept: list[float]) -> None:
    server.fail, server.fail_status = 3, status
    assert Sources().read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=10-29"] * 4
    assert all(
        wait / 2 <= given <= wait for given, wait in zip(slept, (0.002, 0.004, 0.008), strict=True)
    )


@pytest.mark.parametrize("knob", ["cut", "shift"])
def test_a_wrong_answer_that_passes(server: Server, knob: str, slept: list[float]) -> None:
    """A body that breaks off, a range that is not the one asked for."""
    setattr(server, knob, 2)
    assert Sources().read(server.url("a.tar"), 10, 50_000) == DATA[10:50_010]
    assert len(server.requests) == 3


def test_a_small_file_that_breaks_off(server: Server) -> None:
    server.cut = 2
    assert Sources().fetch(server.url("a.tar")) == DATA
    assert len(server.requests) == 3


def test_a_server_too_slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READ_TIMEOUT", 0.1)
    server.slow, server.delay = 1, 5.0
    start = time.monotonic()
    assert Sources().read(server.url("a.tar"), 0, 9) == DATA[:9]
    assert time.monotonic() - start < 4
    server.slow = 99
    message = refused(lambda: Sources().read(server.url("a.tar"), 0, 9), JobError)
    assert "timed out" in message


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("1", 1.0), ("86400", 3.0), ("Fri, 31 Dec 2099 23:59:59 GMT", 3.0), ("0", 0.0), ("soon", 0.0)],
)
def test_a_server_that_says_when(
    server: Server,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    retry_after: str,
    expected: float,
) -> None:
    monkeypatch.setattr(web, "WAIT_MAX", 3.0)
    server.fail, server.retry_after = 1, retry_after
    assert Sources().read(server.url("a.tar"), 0, 9) == DATA[:9]
    assert slept == [pytest.approx(expected, abs=0.01)]


def test_the_waits_grow_to_a_bound(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(web.time, "sleep", slept.append)
    with Server(Path()) as server:
        url = server.url("a.tar")
    message = refused(lambda: Sources().read(url, 0, 9), JobError)
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(slept, bounds, strict=True))
    assert len(set(slept[-3:])) == 3  # jitter
    assert re.match(rf"{re.escape(url)}: 10 tries in \d+ s failed, the last with: ", message)
    assert "Connection refused" in message
    assert message.endswith("once the server answers, the same command goes on")


def test_a_server_that_stays_away_is_told_of(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail = 99
    with caplog.at_level(logging.WARNING, "cascade"):
        message = refused(lambda: Sources().read(server.url("a.tar"), 0, 9), JobError)
    assert re.match(
        r"http://[\d.:]+/a\.tar: 4 tries in \d+ s failed, the last with: 503 Service Unavailable; ",
        message,
    )
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "503 Service Unavailable; try 4 of 4 in 0 s"
    ]


# What does not pass is said at once


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_status_that_stays(server: Server, status: int, slept: list[float]) -> None:
    server.statuses["a.tar"] = status
    sources, url = Sources(), server.url("a.tar")
    for call in (sources.stat, sources.open, lambda at: sources.read(at, 0, 9)):
        assert refused(lambda call=call: call(url)).startswith(
            f"{url}: the server answers {status} "
        )
    assert (len(server.requests), slept) == (3, [])


def test_a_server_without_ranges(folder: Path, server: Server, slept: list[float]) -> None:
    with (folder / "big.tar").open("wb") as file:
        file.truncate(64 << 20)
    server.ranges = False
    message = refused(lambda: Sources().read(server.url("big.tar"), 0, 9))
    assert message.startswith(
        f"{server.url('big.tar')}: the server does not answer ranges (200 rather than 206)"
    )
    server.stop()
    assert (len(server.requests), slept) == (1, [])
    assert server.sent < 32 << 20  # what the sockets between hold, but not the file


@pytest.mark.parametrize("what", ["ETag", "size"])
def test_a_file_that_changes(folder: Path, server: Server, what: str) -> None:
    sources, url = Sources(), server.url("a.tar")
    assert sources.read(url, 0, 9) == DATA[:9]
    if what == "ETag":
        server.etag = '"new"'
    else:
        server.stamps = False
        sources = Sources()
        assert sources.stat(url) == (len(DATA), "")
        (folder / "a.tar").write_bytes(DATA + b"more")
    message = refused(lambda: sources.read(url, 0, 9))
    assert message.startswith(
        f"{url}: changed on the server while it was read, from 100000 bytes of version "
    )
    assert Sources().read(url, 0, 9) == DATA[:9]  # another process knows nothing of the old one


def test_a_file_that_shrinks(folder: Path, server: Server) -> None:
    """The answer is then 416, without ETag."""
    sources, url = Sources(), server.url("a.tar")
    sources.stat(url)
    (folder / "a.tar").write_bytes(DATA[:50])
    assert "changed on the server" in refused(lambda: sources.read(url, 100, 9))


def test_redirects(folder: Path, server: Server) -> None:
    server.redirects |= {
        "b.tar": "/a.tar",
        "c.tar": server.url("b.tar"),
        "loop.tar": "/loop.tar",
        "f.tar": "ftp://h/a",
    }
    server.redirects["file.tar"] = f"file://{folder}/a.tar"
    sources = Sources()
    assert sources.read(server.url("c.tar"), 5, 9) == DATA[5:14]
    assert ranges(server) == ["bytes=5-13"] * 3
    assert sources.stat(server.url("c.tar")).size == len(DATA)
    assert "the server answers 302 Found" in refused(lambda: sources.stat(server.url("loop.tar")))
    for name in ("f.tar", "file.tar"):
        assert "write or redirect to http(s)://HOST/PATH" in refused(
            lambda name=name: sources.stat(server.url(name))
        )


# The cache


def test_cached_ranges_outlive_the_server(server: Server, tmp_path: Path) -> None:
    sources, spans = Sources(tmp_path / "cache", 1 << 20), [(i * 1000, 2000) for i in range(50)]
    for _ in range(2):
        assert all(
            sources.read(server.url("a.tar"), at, size) == DATA[at : at + size]
            for at, size in spans
        )
    assert len(server.requests) == 1 + 50
    server.stop()
    assert all(
        sources.read(server.url("a.tar"), at, size) == DATA[at : at + size] for at, size in spans
    )
    assert "Connection refused" in refused(
        lambda: sources.read(server.url("a.tar"), 0, 1), JobError
    )


def test_each_range_is_a_file(server: Server, tmp_path: Path) -> None:
    stamp = Sources().stat(server.url("a.tar")).stamp
    Sources(tmp_path / "cache", 1 << 20).read(server.url("a.tar"), 10, 20)
    name = hashlib.sha256(f"{server.url('a.tar')}\n{stamp}\n10\n20".encode()).hexdigest()
    assert files(tmp_path / "cache") == [tmp_path / "cache" / name[:2] / name]


def test_a_folder_that_two_share(server: Server, tmp_path: Path) -> None:
    one, two, other = (
        Sources(tmp_path / "a", 1 << 20),
        Sources(tmp_path / "a", 1 << 20),
        Sources(tmp_path / "b", 1),
    )
    for sources in (one, two, other):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=0-0", "bytes=0-0", "bytes=10-29"]
    server.etag = '"new"'
    assert Sources(tmp_path / "a", 1 << 20).read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server)[-1] == "bytes=10-29"  # another version is another range


def test_without_a_stamp_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    """The next process could not tell whether the file is still the same."""
    server.stamps = False
    sources = Sources(tmp_path / "cache", 1 << 20)
    for _ in range(2):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=10-29"]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:]]
)
def test_a_damaged_file_is_fetched_again(
    server: Server, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    sources = Sources(tmp_path / "cache", 1 << 20)
    sources.read(server.url("a.tar"), 10, 20)
    (path,) = files(tmp_path / "cache")
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=10-29"]


def test_the_cache_is_bounded(server: Server, tmp_path: Path) -> None:
    limit, draw = 60_000, random.Random(4)
    sources, cache = Sources(tmp_path / "cache", limit), tmp_path / "cache"
    for _ in range(150):
        at, size = draw.randrange(80_000), draw.choice([10, 1_000, 20_000])
        assert sources.read(server.url("a.tar"), at, size) == DATA[at : at + size]
        assert sum(path.stat().st_size for path in files(cache)) <= limit
    assert sum(path.stat().st_size for path in files(cache)) > limit / 2
    before = files(cache)
    sources.read(server.url("a.tar"), 0, limit)  # with its checksum larger than the limit
    assert files(cache) == before
    Sources(cache, limit // 4).read(server.url("a.tar"), 1, 10)  # a bound that is lowered
    assert sum(path.stat().st_size for path in files(cache)) <= limit // 4


def test_eight_threads_and_two_owners_keep_the_bound(server: Server, tmp_path: Path) -> None:
    limit, draw = 64_000, random.Random(5)
    owners = [Sources(tmp_path / "cache", limit) for _ in range(2)]
    jobs = [(draw.choice(owners), draw.randrange(90_000), 2_000) for _ in range(400)]
    with ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda job: job[0].read(server.url("a.tar"), job[1], job[2]), jobs)
        assert list(found) == [DATA[at : at + size] for _, at, size in jobs]
    assert (
        sum(path.stat().st_size for path in files(tmp_path / "cache"))
        <= limit * 17 / 16 + 8 * 2_004
    )


def test_the_least_recently_used_goes_first(server: Server, tmp_path: Path) -> None:
    sources = Sources(tmp_path / "cache", 3 * 20_004)

    def fetched(at: int) -> bool:
        before = len(server.requests)
        assert sources.read(server.url("a.tar"), at, 20_000) == DATA[at : at + 20_000]
        return len(server.requests) > before

    assert [fetched(at) for at in (0, 1, 2, 0, 3)] == [
        True,
        True,
        True,
        False,
        True,
    ]  # for 3, 1 had to go
    assert [fetched(at) for at in (0, 2, 3, 1)] == [False, False, False, True]


def test_what_else_lies_in_the_folder_stays(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache" / "photos").mkdir(parents=True)
    mine = [tmp_path / "cache" / "thesis.tex", tmp_path / "cache" / "photos" / "a.jpg"]
    for path in mine:
        path.write_bytes(bytes(100))
    sources = Sources(tmp_path / "cache", 50)
    for at in range(10):
        sources.read(server.url("a.tar"), at, 40)
    assert all(path.exists() for path in mine)


def test_a_folder_that_is_emptied_meanwhile(server: Server, tmp_path: Path) -> None:
    sources = Sources(tmp_path / "cache", 50_000)
    for at in range(100):
        assert sources.read(server.url("a.tar"), at, 1_000) == DATA[at : at + 1_000]
        if at % 7 == 0:
            for path in files(tmp_path / "cache"):
                path.unlink()
            for path in (tmp_path / "cache").iterdir():
                path.rmdir()
    assert files(tmp_path / "cache")


@pytest.mark.parametrize("trouble", ["full disk", "no folder"])
def test_a_cache_that_fails_is_done_without(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    writes: list[Path] = []

    def full(path: Path, data: bytes) -> int:
        writes.append(path)
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    if trouble == "full disk":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        (tmp_path / "cache").write_text("a file, as it happens")
    sources = Sources(tmp_path / "cache", 1 << 20)
    with caplog.at_level(logging.WARNING, "cascade"), ThreadPoolExecutor(8) as threads:
        spans = [(at, 1_000) for at in range(30)] * 2
        found = threads.map(lambda span: sources.read(server.url("a.tar"), *span), spans)
        assert list(found) == [DATA[at : at + size] for at, size in spans]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/cache: the cache of remote shards fails (No")
    assert files(tmp_path / "cache") == []
    assert len(writes) <= 8  # the threads that were writing when the first found out

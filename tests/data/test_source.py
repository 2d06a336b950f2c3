"""Bytes from disks and servers: every range equals the slice of the file, or is refused, whatever
the server does.
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
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.source import READ_SIZE, Sources, Stat, expand, is_remote
from pipeline.data.web import RetryPolicy
from pipeline.errors import JobError, UserError
from tests.helpers.server import Server

DATA = random.Random(1).randbytes(100_000)


# All attempts in hundredths of a second.
QUICK = RetryPolicy(attempts=4, first_wait=0.002, max_wait=0.01)


def make_sources(
    cache: Path | None = None, limit: int = 0, *, retry: RetryPolicy = QUICK
) -> Sources:
    return Sources(cache, limit, retry)


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


def recording(waits: list[float], retry: RetryPolicy = QUICK) -> RetryPolicy:
    """Appends the waits to a list instead of waiting."""
    return replace(retry, sleep=waits.append)


def ranges(server: Server) -> list[str]:
    return [request.range for request in server.requests]


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def error_of(call: Callable[[], object], kind: type[Exception] = UserError) -> str:
    """The message of the error that `call` raises, one line."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


# Locations


@pytest.mark.parametrize("location", ["http://h/a", "https://h:1/a?b#c", "HTTPS://h"])
def test_locations_on_servers(location: str) -> None:
    assert is_remote(location)


@pytest.mark.parametrize(
    "location",
    ["a.tar", "/http://h/a", "file:///a", "http:///a", "http:a", "s3://b/a", "pipe:cat"],
)
def test_locations_that_are_not_on_servers(location: str) -> None:
    assert not is_remote(location)


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
    assert expand((f"{folder}/[x]*.tar",)) == [f"{folder}/[x]*.tar"]  # a file of this name
    monkeypatch.chdir(folder)
    assert expand(("./?.tar",)) == ["./a.tar", "./b.tar"]  # as written


def test_urls_are_expanded_without_a_request() -> None:
    assert expand(("https://nowhere.invalid/{00..02}.tar?sig=a%2A[1]",)) == [
        f"https://nowhere.invalid/0{i}.tar?sig=a%2A[1]" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "pipe:cat {folder}/a.tar",
            "runs a program, which is not allowed for data; serve the tar by https or copy it",
        ),
        ("s3://bucket/a.tar", "s3: is not supported; serve the tar by https or copy it to a disk"),
        ("gs://bucket/a.tar", "gs: is not supported"),
        ("hdfs://host/a.tar", "hdfs: is not supported"),
        ("ftp://host/a.tar", "ftp: is not supported"),
        (
            "https://host/*.tar",
            r"https://host/\*.tar: \* does not work on servers, which list no files; write the "
            "numbers as {{00000..00127}}",
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
    assert error_of(lambda: expand(())).startswith("data.shards: empty")
    for again in (f"{folder}/a.tar", f"file:{folder}/a.tar", f"{folder}/./a.tar"):
        assert "a.tar: named twice" in error_of(
            lambda again=again: expand((f"{folder}/*.tar", again))
        )
    assert "named twice" in error_of(lambda: expand(("http://h/{0..3}", "http://h/2")))


# Ranges


@pytest.mark.parametrize("kind", ["disk", "server", "server and cache", "server and a small cache"])
def test_any_range_equals_the_slice_of_the_file(
    kind: str, folder: Path, server: Server, tmp_path: Path
) -> None:
    draw = random.Random(2)
    ends = [sorted(draw.choices(range(len(DATA) + 1), k=2)) for _ in range(40)]
    ends += [[0, 0], [0, 1], [0, len(DATA)], [len(DATA) - 1, len(DATA)], [len(DATA), len(DATA)]]
    location = f"{folder}/a.tar" if kind == "disk" else server.url("a.tar")
    limit = {"server and cache": 1 << 30, "server and a small cache": 200_000}.get(kind, 0)
    sources = make_sources(tmp_path / "cache" if limit else None, limit)
    with ThreadPoolExecutor(8) as threads:
        results = list(
            threads.map(lambda span: sources.read(location, span[0], span[1] - span[0]), ends * 3)
        )
    assert results == [DATA[start:end] for start, end in ends] * 3


def test_stat(folder: Path, server: Server) -> None:
    time_ns = (folder / "a.tar").stat().st_mtime_ns
    assert make_sources().stat(f"{folder}/a.tar") == Stat(len(DATA), str(time_ns))
    assert make_sources().stat(server.url("a.tar")) == Stat(len(DATA), f'"{time_ns:x}"')
    server.etag = ""
    assert make_sources().stat(server.url("a.tar")).version.endswith(" GMT")
    server.stamps = False
    assert make_sources().stat(server.url("a.tar")) == Stat(len(DATA), "")
    assert {request.method for request in server.requests} == {"GET"}  # HEAD is refused


def test_an_empty_file(folder: Path, server: Server) -> None:
    (folder / "empty.tar").write_bytes(b"")
    for ranges in (True, False):  # 416, or 200 with an empty body
        server.ranges = ranges
        for location in (f"{folder}/empty.tar", server.url("empty.tar")):
            sources = make_sources()
            assert sources.stat(location).size == 0
            assert sources.read(location, 0, 0) == b""
            assert sources.fetch(location) == b""
            with sources.open(location) as file:
                assert file.read() == b""
            assert "ends before byte 7" in error_of(lambda s=sources, at=location: s.read(at, 2, 5))


def test_a_range_beyond_the_end_is_an_error(folder: Path, server: Server) -> None:
    for location in (f"{folder}/a.tar", server.url("a.tar")):
        message = error_of(lambda at=location: make_sources().read(at, 99_000, 2_000))
        assert message.startswith(f"{location}: ends before byte 101000, ")
        with pytest.raises(UserError):
            make_sources().read(location, 200_000, 1)


def test_more_files_than_descriptors(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    paths = [folder / f"{i}.tar" for i in range(100)]
    for path in paths:
        path.write_bytes(path.name.encode())
    sources = make_sources()
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, num_open + 40), hard))
    try:
        assert [sources.read(str(path), 0, len(path.name)) for path in paths] == [
            path.name.encode() for path in paths
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_missing_files(folder: Path, server: Server) -> None:
    sources = make_sources()
    for location in (f"{folder}/b.tar", server.url("b.tar")):
        assert sources.fetch(location) is None
        for call in (sources.stat, sources.open, lambda at: sources.read(at, 0, 1)):
            assert error_of(lambda call=call, at=location: call(at)).startswith(f"{location}: ")
    assert "cannot be read: Is a directory" in error_of(lambda: sources.read(str(folder), 0, 1))
    assert "cannot be read: Is a directory" in error_of(lambda: sources.fetch(str(folder)))


# From end to end


def test_an_open_file_reads_and_seeks_like_a_local_one(folder: Path, server: Server) -> None:
    with make_sources().open(server.url("a.tar")) as file, (folder / "a.tar").open("rb") as local:
        draw = random.Random(3)
        for _ in range(200):
            at, whence = draw.choice(
                [(draw.randrange(120_000), os.SEEK_SET), (-draw.randrange(100_000), os.SEEK_END)]
            )
            size = draw.randrange(20_000)
            assert file.seek(at, whence) == local.seek(at, whence) == file.tell()
            assert file.read(size) == local.read(size)
        assert file.seek(0) == 0
        assert file.read() == DATA
        assert file.read(1) == b""
    assert file.closed


def test_a_scan_requests_large_ranges(folder: Path, server: Server, tmp_path: Path) -> None:
    with tarfile.open(folder / "big.tar", "w") as tar:
        for i in range(20):
            member = tarfile.TarInfo(f"{i:03d}.jpg")
            member.size = READ_SIZE // 8 + i
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    size = (folder / "big.tar").stat().st_size
    sources = make_sources(tmp_path / "cache", 1 << 30)
    with sources.open(server.url("big.tar")) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        assert tar.getnames() == [f"{i:03d}.jpg" for i in range(20)]
    assert len(server.requests) <= 1 + -(-size // READ_SIZE) + 1
    server.requests.clear()
    with sources.open(server.url("big.tar")) as file:
        assert file.read() == (folder / "big.tar").read_bytes()
    assert ranges(server) == [
        f"bytes={at}-{min(at + READ_SIZE, size) - 1}" for at in range(0, size, READ_SIZE)
    ]
    server.requests.clear()
    with sources.open(server.url("big.tar")) as file:
        assert len(file.read(2 * READ_SIZE + 9)) == 2 * READ_SIZE + 9
    assert ranges(server) == [
        f"bytes={at}-{min(at + READ_SIZE, size) - 1}" for at in range(0, size, READ_SIZE)
    ]
    assert not files(tmp_path / "cache")


def test_a_small_file_as_a_whole(folder: Path, server: Server) -> None:
    for location in (f"{folder}/a.tar", server.url("a.tar")):
        assert make_sources().fetch(location) == DATA
    assert ranges(server) == [""]
    for status in (403, 404, 410):
        server.statuses["a.tar"] = status
        assert make_sources().fetch(server.url("a.tar")) is None
    server.statuses["a.tar"] = 401
    assert "401 Unauthorized" in error_of(lambda: make_sources().fetch(server.url("a.tar")))


def test_bytes_are_read_as_stored(folder: Path, server: Server) -> None:
    """Not decompressed, if the server declares a *.gz as compressed."""
    packed = gzip.compress(DATA[:1000] * 9)
    (folder / "index.gz").write_bytes(packed)
    server.headers["Content-Encoding"] = "gzip"
    assert make_sources().fetch(server.url("index.gz")) == packed
    assert make_sources().read(server.url("index.gz"), 3, 500) == packed[3:503]


def test_connections_are_reused(server: Server) -> None:
    sources = make_sources()
    for i in range(20):
        assert sources.read(server.url("a.tar"), i, 5_000) == DATA[i : i + 5_000]
    assert server.connections == 1


# Transient failures are retried


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_transient_status_is_retried(server: Server, status: int) -> None:
    server.fail = 3
    server.fail_status = status
    waits: list[float] = []
    sources = make_sources(retry=recording(waits))
    assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=10-29"] * 4
    backoffs = (0.002, 0.004, 0.008)
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, backoffs, strict=True))


@pytest.mark.parametrize("failure", ["cut", "shift"])
def test_a_wrong_response_is_retried(server: Server, failure: str) -> None:
    """A truncated body, or another range than the requested one."""
    setattr(server, failure, 2)
    assert make_sources().read(server.url("a.tar"), 10, 50_000) == DATA[10:50_010]
    assert len(server.requests) == 3


def test_a_truncated_small_file_is_retried(server: Server) -> None:
    server.cut = 2
    assert make_sources().fetch(server.url("a.tar")) == DATA
    assert len(server.requests) == 3


def test_a_slow_server(server: Server) -> None:
    impatient = replace(QUICK, read_timeout=0.1)
    server.slow = 1
    server.delay = 5.0
    start = time.monotonic()
    assert make_sources(retry=impatient).read(server.url("a.tar"), 0, 9) == DATA[:9]
    assert time.monotonic() - start < 4
    server.slow = 99
    sources = make_sources(retry=impatient)
    message = error_of(lambda: sources.read(server.url("a.tar"), 0, 9), JobError)
    assert "timed out" in message


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("1", 1.0), ("86400", 3.0), ("Fri, 31 Dec 2099 23:59:59 GMT", 3.0), ("0", 0.0), ("soon", 0.0)],
)
def test_retry_after_is_followed_up_to_a_limit(
    server: Server, retry_after: str, expected: float
) -> None:
    server.fail = 1
    server.retry_after = retry_after
    waits: list[float] = []
    sources = make_sources(retry=recording(waits, replace(QUICK, max_wait=3.0)))
    assert sources.read(server.url("a.tar"), 0, 9) == DATA[:9]
    assert waits == [pytest.approx(expected, abs=0.01)]


def test_the_waits_double_up_to_a_limit() -> None:
    waits: list[float] = []
    with Server(Path()) as server:
        url = server.url("a.tar")
    sources = make_sources(retry=recording(waits, RetryPolicy()))
    message = error_of(lambda: sources.read(url, 0, 9), JobError)
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits[-3:])) == 3  # jitter
    assert re.match(rf"{re.escape(url)}: 10 attempts in \d+ s failed, the last with: ", message)
    assert "Connection refused" in message
    assert message.endswith("run the same command again when the server responds")


def test_a_server_that_keeps_failing_is_reported(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail = 99
    with caplog.at_level(logging.WARNING, "cascade"):
        message = error_of(lambda: make_sources().read(server.url("a.tar"), 0, 9), JobError)
    assert re.match(r"http://[\d.:]+/a\.tar: 4 attempts in \d+ s failed, the last with: ", message)
    assert "503 Service Unavailable; " in message
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "503 Service Unavailable; attempt 4 of 4 in 0 s"
    ]


# Permanent failures are raised at once


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_permanent_status_is_not_retried(server: Server, status: int) -> None:
    server.statuses["a.tar"] = status
    waits: list[float] = []
    sources = make_sources(retry=recording(waits))
    url = server.url("a.tar")
    for call in (sources.stat, sources.open, lambda at: sources.read(at, 0, 9)):
        assert error_of(lambda call=call: call(url)).startswith(
            f"{url}: the server answers {status} "
        )
    assert len(server.requests) == 3
    assert not waits


def test_a_server_without_ranges(folder: Path, server: Server) -> None:
    with (folder / "big.tar").open("wb") as file:
        file.truncate(64 << 20)
    server.ranges = False
    message = error_of(lambda: make_sources().read(server.url("big.tar"), 0, 9))
    assert message.startswith(
        f"{server.url('big.tar')}: the server does not support ranges (200 instead of 206)"
    )
    server.stop()
    assert len(server.requests) == 1
    assert server.sent < 32 << 20  # what fits into the buffers of the sockets, not the file


@pytest.mark.parametrize("change", ["ETag", "size"])
def test_a_changed_file_is_refused(folder: Path, server: Server, change: str) -> None:
    sources = make_sources()
    url = server.url("a.tar")
    assert sources.read(url, 0, 9) == DATA[:9]
    if change == "ETag":
        server.etag = '"new"'
    else:
        server.stamps = False
        sources = make_sources()
        assert sources.stat(url) == (len(DATA), "")
        (folder / "a.tar").write_bytes(DATA + b"more")
    message = error_of(lambda: sources.read(url, 0, 9))
    assert message.startswith(
        f"{url}: changed on the server during reading, from 100000 bytes of version "
    )
    assert make_sources().read(url, 0, 9) == DATA[:9]  # another process has not read the old one


def test_a_shorter_file_is_refused(folder: Path, server: Server) -> None:
    """The response is 416, without ETag."""
    sources = make_sources()
    url = server.url("a.tar")
    sources.stat(url)
    (folder / "a.tar").write_bytes(DATA[:50])
    assert "changed on the server" in error_of(lambda: sources.read(url, 100, 9))


def test_redirects(folder: Path, server: Server) -> None:
    server.redirects |= {
        "b.tar": "/a.tar",
        "c.tar": server.url("b.tar"),
        "loop.tar": "/loop.tar",
        "f.tar": "ftp://h/a",
    }
    server.redirects["file.tar"] = f"file://{folder}/a.tar"
    sources = make_sources()
    assert sources.read(server.url("c.tar"), 5, 9) == DATA[5:14]
    assert ranges(server) == ["bytes=5-13"] * 3
    assert sources.stat(server.url("c.tar")).size == len(DATA)
    assert "the server answers 302 Found" in error_of(lambda: sources.stat(server.url("loop.tar")))
    for name in ("f.tar", "file.tar"):
        assert "write or redirect to http(s)://HOST/PATH" in error_of(
            lambda name=name: sources.stat(server.url(name))
        )


# The cache


def test_cached_ranges_outlive_the_server(server: Server, tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "cache", 1 << 20)
    spans = [(i * 1000, 2000) for i in range(50)]
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
    assert "Connection refused" in error_of(
        lambda: sources.read(server.url("a.tar"), 0, 1), JobError
    )


def test_each_range_is_a_file(server: Server, tmp_path: Path) -> None:
    version = make_sources().stat(server.url("a.tar")).version
    make_sources(tmp_path / "cache", 1 << 20).read(server.url("a.tar"), 10, 20)
    name = hashlib.sha256(f"{server.url('a.tar')}\n{version}\n10\n20".encode()).hexdigest()
    assert files(tmp_path / "cache") == [tmp_path / "cache" / name[:2] / name]


def test_two_readers_share_a_folder(server: Server, tmp_path: Path) -> None:
    first = make_sources(tmp_path / "a", 1 << 20)
    second = make_sources(tmp_path / "a", 1 << 20)
    other = make_sources(tmp_path / "b", 1)
    for sources in (first, second, other):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=0-0", "bytes=0-0", "bytes=10-29"]
    server.etag = '"new"'
    assert make_sources(tmp_path / "a", 1 << 20).read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server)[-1] == "bytes=10-29"  # another version is another range


def test_a_file_without_a_version_is_not_cached(server: Server, tmp_path: Path) -> None:
    """The next process could not know whether the file is still the same."""
    server.stamps = False
    sources = make_sources(tmp_path / "cache", 1 << 20)
    for _ in range(2):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=10-29"]


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9] + b"x" + data[10:]]
)
def test_a_damaged_range_is_fetched_again(
    server: Server, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    sources = make_sources(tmp_path / "cache", 1 << 20)
    sources.read(server.url("a.tar"), 10, 20)
    (path,) = files(tmp_path / "cache")
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert sources.read(server.url("a.tar"), 10, 20) == DATA[10:30]
    assert ranges(server) == ["bytes=0-0", "bytes=10-29", "bytes=10-29"]


def test_the_size_of_the_cache_is_limited(server: Server, tmp_path: Path) -> None:
    limit = 60_000
    draw = random.Random(4)
    cache = tmp_path / "cache"
    sources = make_sources(cache, limit)
    for _ in range(150):
        at, size = draw.randrange(80_000), draw.choice([10, 1_000, 20_000])
        assert sources.read(server.url("a.tar"), at, size) == DATA[at : at + size]
        assert sum(path.stat().st_size for path in files(cache)) <= limit
    assert sum(path.stat().st_size for path in files(cache)) > limit / 2
    before = files(cache)
    sources.read(server.url("a.tar"), 0, limit)  # with its checksum larger than the limit
    assert files(cache) == before
    make_sources(cache, limit // 4).read(server.url("a.tar"), 1, 10)  # a lower limit
    assert sum(path.stat().st_size for path in files(cache)) <= limit // 4


def test_eight_threads_and_two_readers_keep_the_limit(server: Server, tmp_path: Path) -> None:
    limit = 64_000
    draw = random.Random(5)
    readers = [make_sources(tmp_path / "cache", limit) for _ in range(2)]
    calls = [(draw.choice(readers), draw.randrange(90_000), 2_000) for _ in range(400)]
    with ThreadPoolExecutor(8) as threads:
        results = threads.map(lambda call: call[0].read(server.url("a.tar"), *call[1:]), calls)
        assert list(results) == [DATA[at : at + size] for _, at, size in calls]
    assert (
        sum(path.stat().st_size for path in files(tmp_path / "cache"))
        <= limit * 17 / 16 + 8 * 2_004
    )


def test_the_least_recently_used_goes_first(server: Server, tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "cache", 3 * 20_004)

    def is_fetched(at: int) -> bool:
        before = len(server.requests)
        assert sources.read(server.url("a.tar"), at, 20_000) == DATA[at : at + 20_000]
        return len(server.requests) > before

    # 3 evicts 1, as 0 was used again.
    assert [is_fetched(at) for at in (0, 1, 2, 0, 3)] == [True, True, True, False, True]
    assert [is_fetched(at) for at in (0, 2, 3, 1)] == [False, False, False, True]


def test_other_files_in_the_folder_are_not_evicted(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache" / "photos").mkdir(parents=True)
    others = [tmp_path / "cache" / "thesis.tex", tmp_path / "cache" / "photos" / "a.jpg"]
    for path in others:
        path.write_bytes(bytes(100))
    sources = make_sources(tmp_path / "cache", 50)
    for at in range(10):
        sources.read(server.url("a.tar"), at, 40)
    assert all(path.exists() for path in others)


def test_a_folder_that_is_emptied_by_others(server: Server, tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "cache", 50_000)
    for at in range(100):
        assert sources.read(server.url("a.tar"), at, 1_000) == DATA[at : at + 1_000]
        if at % 7 == 0:
            for path in files(tmp_path / "cache"):
                path.unlink()
            for path in (tmp_path / "cache").iterdir():
                path.rmdir()
    assert files(tmp_path / "cache")


@pytest.mark.parametrize("failure", ["full disk", "no folder"])
def test_reading_continues_without_a_failing_cache(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: str,
) -> None:
    writes: list[Path] = []

    def full(path: Path, data: bytes) -> int:
        writes.append(path)
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(28, "No space left on device")

    if failure == "full disk":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        (tmp_path / "cache").write_text("a file")
    sources = make_sources(tmp_path / "cache", 1 << 20)
    with caplog.at_level(logging.WARNING, "cascade"), ThreadPoolExecutor(8) as threads:
        spans = [(at, 1_000) for at in range(30)] * 2
        results = threads.map(lambda span: sources.read(server.url("a.tar"), *span), spans)
        assert list(results) == [DATA[at : at + size] for at, size in spans]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}/cache: the cache of remote shards fails (No")
    assert files(tmp_path / "cache") == []
    assert len(writes) <= 8  # those of the threads that were writing at the first failure

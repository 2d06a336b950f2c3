"""Ranges of files on a web server, with retries.

A GET with `Range: bytes=A-B` is answered with status 206, these bytes and `Content-Range: bytes
A-B/SIZE` (RFC 9110, section 14). Every object store and every common web server supports it.

Transient failures (no connection, a timeout, a truncated body, 408, 429, 5xx) are retried with
exponential backoff and jitter, so that a thousand readers do not return at the same moment; after
`RetryPolicy.attempts` attempts they are a `JobError`. Permanent failures (404, 403, a server
without ranges) are a `UserError` at once. So is a file whose size or version differs from the first
response: offsets into the old file are meaningless in the new one, and a `JobError`, which invites
a restart, would continue the run with other data.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

from pipeline.errors import JobError, UserError

log = logging.getLogger("cascade")

CONNECTIONS = 64  # kept open per server, so that as many threads can reuse them
RETRYABLE = (408, 429)  # statuses below 500 that are retried

T = TypeVar("T")

# urllib3 follows redirects. All else is retried here, where a truncated body is detected too.
REDIRECTS = Retry(
    total=None, connect=0, read=0, status=0, other=0, redirect=5, raise_on_redirect=False
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a request is repeated. The default spans about two minutes."""

    attempts: int = 10
    first_wait: float = 0.5  # seconds after the first attempt; doubled after each
    max_wait: float = 30.0  # seconds; limits Retry-After too
    connect_timeout: float = 10.0  # seconds
    read_timeout: float = 30.0  # seconds between bytes
    # A busy object store rejects some requests every minute: only later retries are logged.
    silent_attempts: int = 2
    sleep: Callable[[float], object] = time.sleep  # seconds -> ignored

    def wait(self, attempt: int) -> float:
        """Seconds to wait after attempt 1, 2, ...: between a half and all of the backoff."""
        backoff = min(self.max_wait, self.first_wait * 2 ** (attempt - 1))
        return backoff * random.uniform(0.5, 1)


class Stat(NamedTuple):
    """Size and version of a file."""

    size: int  # bytes
    # Differs where the content may differ: a file's modification time in ns; for a URL its ETag,
    # else Last-Modified, else "".
    version: str


class ByteRange(NamedTuple):
    """The content of a range response, as its headers declare it."""

    start: int  # bytes; start and stop are 0 for a range beyond the end of the file
    stop: int
    total: int  # size of the file, bytes


class _TransientError(HTTPError):
    """A response after which the request is repeated."""


class Web:
    """Reads URLs from any thread. Each must remain the file that it was in the first response."""

    def __init__(self, retry: RetryPolicy | None = None) -> None:
        self._retry = retry or RetryPolicy()
        self._pool = PoolManager(maxsize=CONNECTIONS)
        self._first_stats: dict[str, Stat] = {}  # setdefault is atomic: no lock

    def stat(self, url: str) -> Stat:
        """As in the first response to this object; requested at most once."""
        if url not in self._first_stats:
            # A range rather than HEAD, which signed URLs and some servers reject.
            self.read_range(url, 0, 1)
        return self._first_stats[url]

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size) by one range request; fewer, or none, at the end of the
        file.
        """

        def parse(response: BaseHTTPResponse) -> bytes:
            received = _content_range(url, response)
            self._check_version(url, response, received)

            # A request that reaches beyond the end is answered with what there is.
            expected = max(0, min(size, received.total - offset))
            bounds = (offset, offset + expected) if expected else (0, 0)
            if (received.start, received.stop) != bounds:
                header = response.headers.get("Content-Range")
                raise _TransientError(f"the wrong range, Content-Range: {header}")

            data = response.read(expected, decode_content=False) if expected else b""
            if len(data) < expected:
                raise _TransientError(f"{len(data)} of {expected} bytes")
            return data

        # The last byte of a range is included (RFC 9110, section 14.1.2).
        return self._request(url, {"Range": f"bytes={offset}-{offset + size - 1}"}, parse)

    def fetch(self, url: str) -> bytes | None:
        """The whole file; None if it does not exist.

        403 counts as missing: object stores answer it instead of 404 to clients that may not list
        the files.
        """

        def parse(response: BaseHTTPResponse) -> bytes | None:
            if response.status in (403, 404, 410):
                return None
            if response.status != 200:
                raise _rejected(url, response)
            # urllib3 raises if the body is shorter than Content-Length.
            return response.read(decode_content=False)

        return self._request(url, {}, parse)

    def _check_version(self, url: str, response: BaseHTTPResponse, received: ByteRange) -> None:
        """UserError if the file is not the one of the first response."""
        headers = response.headers
        stat = Stat(received.total, headers.get("ETag") or headers.get("Last-Modified") or "")
        first = self._first_stats.setdefault(url, stat)

        # A response without bytes may lack an ETag: then only sizes are compared.
        if stat.size != first.size or (received.stop and stat != first):
            raise UserError(
                f"{url}: changed on the server during reading, from {first.size} bytes of version "
                f"{first.version!r} to {stat.size} of {stat.version!r}; restore the old one or "
                "start a new run"
            )

    def _request(
        self, url: str, headers: dict[str, str], parse: Callable[[BaseHTTPResponse], T]
    ) -> T:
        """`parse` of the response, whose body is not yet read; repeated while either fails in a way
        that is transient.
        """
        policy = self._retry
        start = time.monotonic()
        cause: Exception | None = None

        for attempt in range(1, policy.attempts + 1):
            wait = policy.wait(attempt)
            try:
                # Leaving the context closes the connection unless the whole body was read.
                with self._open(url, headers) as response:
                    if response.status in RETRYABLE or response.status >= 500:
                        # Retry-After can lengthen the wait, up to `max_wait`, but not shorten it.
                        retry_after = REDIRECTS.get_retry_after(response) or 0
                        wait = max(wait, min(policy.max_wait, retry_after))
                        raise _TransientError(f"{response.status} {response.reason}")
                    return parse(response)
            except LocationValueError as error:
                raise UserError(
                    f"{url}: {error}; write or redirect to http(s)://HOST/PATH"
                ) from error
            except HTTPError as error:
                cause = error.reason if isinstance(error, MaxRetryError) else error

            if attempt == policy.attempts:
                break
            if attempt > policy.silent_attempts:
                log.warning(
                    "%s: %s; attempt %d of %d in %.0f s",
                    url,
                    cause,
                    attempt + 1,
                    policy.attempts,
                    wait,
                )
            policy.sleep(wait)

        raise JobError(
            f"{url}: {policy.attempts} attempts in {time.monotonic() - start:.0f} s failed, the "
            f"last with: {cause}; run the same command again when the server responds"
        )

    def _open(self, url: str, headers: dict[str, str]) -> BaseHTTPResponse:
        timeout = Timeout(connect=self._retry.connect_timeout, read=self._retry.read_timeout)
        return self._pool.request(
            "GET",
            url,
            headers={"Accept-Encoding": "identity", **headers},  # the bytes as stored
            retries=REDIRECTS,
            timeout=timeout,
            preload_content=False,
        )


def _content_range(url: str, response: BaseHTTPResponse) -> ByteRange:
    """What the response to a range request contains; UserError or _TransientError if it is none."""
    text = response.headers.get("Content-Range", "")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
        if not match:
            raise _TransientError(f"no range, Content-Range: {text}")
        return ByteRange(start=int(match[1]), stop=int(match[2]) + 1, total=int(match[3]))

    # The range begins beyond the end; the response has only the file's size.
    if response.status == 416 and (match := re.fullmatch(r"bytes \*/(\d+)", text)):
        return ByteRange(start=0, stop=0, total=int(match[1]))

    if response.status == 200:
        # Apache answers a range of an empty file in this way.
        if response.headers.get("Content-Length") == "0":
            return ByteRange(start=0, stop=0, total=0)
        raise UserError(
            f"{url}: the server does not support ranges (200 instead of 206); use one that does"
        )
    raise _rejected(url, response)


def _rejected(url: str, response: BaseHTTPResponse) -> UserError:
    return UserError(
        f"{url}: the server answers {response.status} {response.reason}; check the address and its "
        "access rights"
    )

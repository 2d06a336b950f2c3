"""Files on a web server, read by ranges, however badly the network behaves.

HTTP reads in any order as a disk does: a GET with `Range: bytes=A-B` is answered 206 with just
those bytes and `Content-Range: bytes A-B/SIZE` (RFC 9110, section 14). Every object store and every
common web server does it.

A network fails often and shortly. Whatever may pass (no connection, a timeout, a body cut short,
408, 429, 5xx) is tried again, waiting 0.5 s, 1 s, 2 s ... with jitter, lest a thousand readers come
back at once; after `TRIES` it is a `JobError`. What will not pass (404, 403, a server without
ranges) is a `UserError` at once. So is a file that is not the one first seen, by its size or its
version: places in the old one say nothing of the new, and starting again by itself, which a
`JobError` invites to, would go on with other data.
"""

import logging
import random
import re
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

from pipeline.errors import JobError, UserError

log = logging.getLogger("cascade")

TRIES = 10  # over about two minutes of waiting: a server that restarts, a network that is rewired
WAIT_FIRST, WAIT_MAX = (
    0.5,
    30.0,
)  # seconds after the first try, doubled after each, and the most, Retry-After included
QUIET_TRIES = (
    2  # a busy object store turns some requests away every minute; from the next on it is told
)
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds; the second between bytes
CONNECTIONS = 64  # kept open per server, so that as many threads need not connect anew

T = TypeVar("T")
# Redirects are followed by urllib3 and all else is tried again here, where a body that breaks off
# is seen too.
REDIRECTS = Retry(
    total=None, connect=0, read=0, status=0, other=0, redirect=5, raise_on_redirect=False
)


class Stat(NamedTuple):
    size: int  # bytes
    stamp: str  # another one when the content may be: the time of a file; a server's ETag, else Last-Modified, else ""


class _Again(HTTPError):
    """An answer that another try may better."""


class Web:
    """Reads URLs, from any thread, each of which has to stay the file that it was when first seen."""

    def __init__(self) -> None:
        self._pool = PoolManager(maxsize=CONNECTIONS)
        self._seen: dict[str, Stat] = {}  # setdefault needs no lock

    def stat(self, url: str) -> Stat:
        """As first seen: it is asked for once."""
        if url not in self._seen:
            self.part(url, 0, 1)  # rather than HEAD, which signed URLs and some servers refuse
        return self._seen[url]

    def part(self, url: str, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size) by one range request; fewer, or none, where the file
        ends before.
        """

        def answer(response: BaseHTTPResponse) -> bytes:
            start, end, total = _content_range(url, response)
            stat = Stat(
                total, response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            )
            seen = self._seen.setdefault(url, stat)
            if total != seen.size or (
                end and stat != seen
            ):  # an answer without bytes may have no ETag
                raise UserError(
                    f"{url}: changed on the server while it was read, from {seen.size} bytes of version "
                    f"{seen.stamp!r} to {stat.size} of {stat.stamp!r}; put the old one back or start a new run"
                )
            wanted = max(0, min(size, total - offset))
            if (start, end) != ((offset, offset + wanted) if wanted else (0, 0)):
                raise _Again(
                    f"the wrong range, Content-Range: {response.headers.get('Content-Range')}"
                )
            data = response.read(wanted, decode_content=False) if wanted else b""
            if len(data) < wanted:
                raise _Again(f"{len(data)} of {wanted} bytes")
            return data

        return self._ask(url, {"Range": f"bytes={offset}-{offset + size - 1}"}, answer)

    def fetch(self, url: str) -> bytes | None:
        """The whole file; None if it is not there.

        403 means that too: object stores answer it, rather than 404, to those who may not list the
        files.
        """

        def answer(response: BaseHTTPResponse) -> bytes | None:
            if response.status in (403, 404, 410):
                return None
            if response.status != 200:
                raise _refused(url, response)
            return response.read(
                decode_content=False
            )  # urllib3 raises where that is less than Content-Length

        return self._ask(url, {}, answer)

    def _ask(self, url: str, headers: dict[str, str], answer: Callable[[BaseHTTPResponse], T]) -> T:
        """What `answer` makes of the response, its body not yet read; tried again while that or the
        network fails.
        """
        headers = {"Accept-Encoding": "identity", **headers}  # the bytes as they lie there
        timeout, start = Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT), time.monotonic()
        cause: Exception | None = None
        for tried in range(1, TRIES + 1):
            wait = min(WAIT_MAX, WAIT_FIRST * 2 ** (tried - 1)) * random.uniform(0.5, 1)
            try:
                with self._pool.request(
                    "GET",
                    url,
                    headers=headers,
                    retries=REDIRECTS,
                    timeout=timeout,
                    preload_content=False,
                ) as response:  # the end closes the connection, unless all of the body was read
                    if response.status in (408, 429) or response.status >= 500:
                        wait = max(wait, min(WAIT_MAX, REDIRECTS.get_retry_after(response) or 0))
                        raise _Again(f"{response.status} {response.reason}")
                    return answer(response)
            except LocationValueError as error:
                raise UserError(
                    f"{url}: {error}; write or redirect to http(s)://HOST/PATH"
                ) from error
            except HTTPError as error:
                cause = error.reason if isinstance(error, MaxRetryError) else error
            if tried < TRIES:
                if tried > QUIET_TRIES:
                    log.warning(
                        "%s: %s; try %d of %d in %.0f s", url, cause, tried + 1, TRIES, wait
                    )
                time.sleep(wait)
        raise JobError(
            f"{url}: {TRIES} tries in {time.monotonic() - start:.0f} s failed, the last with: {cause}; "
            "once the server answers, the same command goes on"
        )


def _content_range(url: str, response: BaseHTTPResponse) -> tuple[int, int, int]:
    """(start, end, size of the file) in the answer to a range request; start and end are 0 beyond
    the file's end.
    """
    text = response.headers.get("Content-Range", "")
    if response.status == 206 and (place := re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)):
        return int(place[1]), int(place[2]) + 1, int(place[3])
    if response.status == 206:
        raise _Again(f"no range, Content-Range: {text}")
    if response.status == 416 and (place := re.fullmatch(r"bytes \*/(\d+)", text)):
        return 0, 0, int(place[1])
    if (
        response.status == 200 and response.headers.get("Content-Length") == "0"
    ):  # an empty file, says Apache
        return 0, 0, 0
    if response.status == 200:
        raise UserError(
            f"{url}: the server does not answer ranges (200 rather than 206); serve it from one that does"
        )
    raise _refused(url, response)


def _refused(url: str, response: BaseHTTPResponse) -> UserError:
    return UserError(
        f"{url}: the server answers {response.status} {response.reason}; see that the address is right and open to you"
    )

"""A local web server with range requests, which fails on demand."""

import contextlib
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

WAIT = 10.0  # seconds after which a thread that should end counts as hanging
PIECE = 1 << 16  # bytes of a body that are sent at a time


class Request(NamedTuple):
    """A request that the server received."""

    method: str
    path: str
    range: str  # the header Range, or ""


class Server(ThreadingHTTPServer):
    """Serves the files of `folder` at `url(name)` inside its context; the attributes can be set at
    any time.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder

        # What has happened so far.
        self.requests: list[Request] = []
        self.connections = 0  # opened by clients
        self.sent = 0  # bytes of bodies

        # How many of the next responses fail, and how.
        self.fail = 0  # with `fail_status`, and `retry_after` as Retry-After if it is not empty
        self.fail_status = 503
        self.retry_after = ""
        self.cut = 0  # the connection is closed in the middle of the body
        self.shift = 0  # the range begins one byte too late
        self.slow = 0  # no response for `delay` seconds
        self.delay = 0.0

        # All responses.
        self.ranges = True  # False: 200 with the whole file for any range
        self.stamps = True  # False: neither ETag nor Last-Modified
        self.etag: str | None = None  # None: made from the file's modification time
        self.headers: dict[str, str] = {}  # with every file
        self.statuses: dict[str, int] = {}  # by name
        self.redirects: dict[str, str] = {}  # from names to URLs

        self._stop = threading.Event()
        self._sockets: set[socket] = set()
        self._threads_started: list[threading.Thread] = []
        self._lock = threading.Lock()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def __enter__(self) -> Self:
        self._start(self.serve_forever, 0.01)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes open connections too."""
        self._stop.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # closed by the client
                    connection.shutdown(SHUT_RDWR)
        for thread in self._threads_started:
            thread.join(WAIT)
            assert not thread.is_alive()

    def count_down(self, failure: str) -> bool:
        """Whether this response is one of those that fail in this way."""
        with self._lock:
            remaining = getattr(self, failure)
            setattr(self, failure, max(0, remaining - 1))
        return remaining > 0

    def wait(self, seconds: float) -> None:
        """Returns earlier if the server stops."""
        self._stop.wait(seconds)

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads_started.append(thread)
        thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._sockets.add(request)
            self.connections += 1
        self._start(self.process_request_thread, request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that closes its connection is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.requests.append(Request("HEAD", self.path, ""))
        self.respond(405)

    def do_GET(self) -> None:
        server = self.server
        name = unquote(urlsplit(self.path).path)[1:]
        server.requests.append(Request("GET", self.path, self.headers.get("Range", "")))

        if server.count_down("slow"):
            server.wait(server.delay)
        if server.count_down("fail"):
            retry = {"Retry-After": server.retry_after} if server.retry_after else {}
            self.respond(server.fail_status, retry)
        elif name in server.redirects:
            self.respond(302, {"Location": server.redirects[name]})
        elif name in server.statuses or not (server.folder / name).is_file():
            self.respond(server.statuses.get(name, 404), body=b"<html>no</html>")
        else:
            self.send_file(server.folder / name)

    def send_file(self, path: Path) -> None:
        """The file, or the requested range of it."""
        server = self.server
        data = path.read_bytes()
        headers = dict(server.headers)
        if server.stamps:
            stat = path.stat()
            headers["Last-Modified"] = self.date_time_string(int(stat.st_mtime))
            headers["ETag"] = f'"{stat.st_mtime_ns:x}"' if server.etag is None else server.etag

        requested = self.headers.get("Range", "")
        if not (requested and server.ranges):
            self.respond(200, headers, data)
            return

        first, _, last = requested.removeprefix("bytes=").partition("-")
        begin = int(first) + server.count_down("shift")
        end = min(int(last or len(data)) + 1, len(data))
        if begin >= len(data):
            self.respond(416, {"Content-Range": f"bytes */{len(data)}"})
        else:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self.respond(206, headers, data[begin:end])

    def respond(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()

        if status < 400 and body and self.server.count_down("cut"):
            body = body[: len(body) // 2]
            self.close_connection = True
        for begin in range(0, len(body), PIECE):
            self.server.sent += self.wfile.write(body[begin : begin + PIECE])

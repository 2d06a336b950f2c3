"""A web server on this machine that answers ranges, and misbehaves when it is told to."""

import contextlib
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Any, Self
from urllib.parse import unquote, urlsplit

WAIT = 10.0  # seconds after which something that has to end is said to hang


class Server(ThreadingHTTPServer):
    """Serves the files of `folder` at `url(name)` while the context lasts; the attributes can be
    set at any time.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str]] = []  # (method, path, Range or "")
        self.connections = 0  # that clients have opened so far
        self.sent = 0  # bytes of bodies
        # How many of the next answers go wrong, and how:
        self.fail = 0  # `fail_status`, after `retry_after` if it says something
        self.fail_status, self.retry_after = 503, ""
        self.cut = 0  # the connection is closed in the middle of the body
        self.shift = 0  # a range that begins one byte later than asked for
        self.slow = 0  # nothing for `delay` seconds
        self.delay = 0.0
        # How all are:
        self.ranges = True  # False: 200 with the whole file, whatever range is asked for
        self.stamps = True  # False: neither ETag nor Last-Modified
        self.etag: str | None = None  # rather than one made of the file's time
        self.headers: dict[str, str] = {}  # with every file
        self.statuses: dict[str, int] = {}  # of these names
        self.redirects: dict[str, str] = {}  # of these names to these URLs
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
        """Ends the connections that are still open too."""
        self._stop.set()
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # the client was first
                    connection.shutdown(SHUT_RDWR)
        for thread in self._threads_started:
            thread.join(WAIT)
            assert not thread.is_alive()

    def take(self, knob: str) -> bool:
        """Whether this answer is one of those that go wrong so."""
        with self._lock:
            left = getattr(self, knob)
            setattr(self, knob, max(0, left - 1))
        return left > 0

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
        """A client that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, ""))
        self.answer(405)

    def do_GET(self) -> None:
        server, name, asked = (
            self.server,
            unquote(urlsplit(self.path).path)[1:],
            self.headers.get("Range", ""),
        )
        server.requests.append(("GET", self.path, asked))
        path = server.folder / name
        if server.take("slow"):
            server._stop.wait(server.delay)
        if server.take("fail"):
            return self.answer(
                server.fail_status,
                {"Retry-After": server.retry_after} if server.retry_after else {},
            )
        if name in server.redirects:
            return self.answer(302, {"Location": server.redirects[name]})
        if name in server.statuses or not path.is_file():
            return self.answer(server.statuses.get(name, 404), body=b"<html>no</html>")
        data, headers = path.read_bytes(), dict(server.headers)
        if server.stamps:
            headers["Last-Modified"] = self.date_time_string(int(path.stat().st_mtime))
            headers["ETag"] = (
                f'"{path.stat().st_mtime_ns:x}"' if server.etag is None else server.etag
            )
        if not (asked and server.ranges):
            return self.answer(200, headers, data)
        start, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(start) + server.take("shift"), min(int(last or len(data)) + 1, len(data))
        if begin >= len(data):
            return self.answer(416, {"Content-Range": f"bytes */{len(data)}"})
        return self.answer(
            206,
            headers | {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"},
            data[begin:end],
        )

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if status < 400 and body and self.server.take("cut"):
            body, self.close_connection = body[: len(body) // 2], True
        for begin in range(0, len(body), 1 << 16):
            self.server.sent += self.wfile.write(body[begin : begin + (1 << 16)])

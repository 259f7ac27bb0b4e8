"""A proxy before a tracking server that can be away, slow, or without room: `python -m tests.soak.proxy PORT UPSTREAM`.

``GET /__mode?mode=gone&after=3&seconds=2`` sets what happens to all requests after the next three, for two seconds;
``GET /__count`` says how many there were.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import requests

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "host"}
SLOW_S = 0.1


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.mode, self.after, self.until, self.seconds = "ok", 0, float("inf"), 0.0
        self.count = 0

    def set(self, *, mode: str, after: int, seconds: float) -> None:
        with self.lock:
            self.mode, self.after, self.seconds, self.until = mode, after, seconds, float("inf")

    def now(self) -> str:
        with self.lock:
            self.count += 1
            if self.mode == "ok":
                return "ok"
            if self.after > 0:
                self.after -= 1
                return "ok"
            if self.until == float("inf") and self.seconds:
                self.until = time.monotonic() + self.seconds
            if time.monotonic() > self.until:
                self.mode = "ok"
            return self.mode


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


def serve(port: int, upstream: str) -> None:
    state, session = _State(), threading.local()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _handle(self) -> None:
            if self.path.startswith("/__mode"):
                asked = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
                state.set(mode=asked["mode"], after=int(asked["after"]), seconds=float(asked["seconds"]))
                self._answer(200, b"", {})
                return
            if self.path == "/__count":
                self._answer(200, str(state.count).encode(), {})
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            mode = state.now()
            is_artifact = self.command == "PUT" and "/mlflow-artifacts/" in self.path
            if mode == "gone":
                self.close_connection = True
                return
            if mode == "slow":
                time.sleep(SLOW_S)
            if mode == "full" and is_artifact:
                self._answer(507, b'{"error_code": "INTERNAL_ERROR", "message": "No space left on device"}', {})
                return
            if mode == "read-only" and is_artifact:
                self._answer(403, b'{"error_code": "PERMISSION_DENIED", "message": "Read-only"}', {})
                return
            if not hasattr(session, "own"):
                session.own = requests.Session()
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            answer = session.own.request(
                self.command, upstream + self.path, data=body, headers=headers, allow_redirects=False, timeout=60
            )
            if mode == "lost":
                # the server did what was asked, and nobody hears of it
                self.close_connection = True
                return
            self._answer(
                answer.status_code,
                answer.content,
                {name: value for name, value in answer.headers.items() if name.lower() not in _HOP},
            )

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle  # noqa: N815, RUF100 - the library's names

    _Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])

"""A web server before a tracking server that gives one wrong answer at one endpoint, and passes everything else on."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

HTML = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
LOGIN = "/login"
ANSWERS = ("401", "403", "404", "413", "429", "500", "503", "redirect", "HTML", "empty", "closed")
PASSING = ("429", "500", "503", "closed")
"""Answers that may be gone in a moment; to ask again after any other one helps only after something was mended."""

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "host"}
_NAMES = re.compile(r"(?<=/)(?:m-)?[0-9a-f]{32}(?=/|$)|(?<=/artifacts/).*|(?<=/experiments/)\d+|\d+(?=/)")


class Stub:
    """The first request to `endpoint` gets `answer`; what was asked is in `asked`."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.endpoint, self.answer, self.always = upstream, "", "", False
        self.asked: list[str] = []
        self.given = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = stub.answer_to(self.command, self.path)
                html = {"Content-Type": "text/html"}
                if self.path.startswith(LOGIN) or answer == "HTML":
                    self._reply(200, HTML, html)
                elif answer == "closed":
                    self.close_connection = True
                elif answer == "empty":
                    self._reply(200, b"", {})
                elif answer == "redirect":
                    self._reply(302, b"", {"Location": LOGIN})
                elif answer:
                    self._reply(int(answer), HTML, html)
                else:
                    self._pass_on(body)

            def _pass_on(self, body: bytes) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
                # no connection is kept: the server closes idle ones, and a request may come just then
                got = requests.request(
                    self.command, stub.upstream + self.path, data=body, headers=headers, allow_redirects=False
                )
                kept = {name: value for name, value in got.headers.items() if name.lower() not in _HOP}
                self._reply(got.status_code, got.content, kept)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle  # noqa: N815, RUF100 - the library's names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def answer_to(self, method: str, path: str) -> str:
        """Return the answer to a request, empty to pass it on."""
        endpoint = f"{method} {_NAMES.sub('*', path.partition('?')[0])}"
        with self._lock:
            self.asked.append(endpoint)
            if endpoint != self.endpoint or (self.given and not self.always):
                return ""
            self.given += 1
            return self.answer

    def set(self, endpoint: str = "", answer: str = "", *, always: bool = False) -> None:
        """Choose the wrong answer, and forget what was asked."""
        with self._lock:
            self.endpoint, self.answer, self.always, self.given, self.asked = endpoint, answer, always, 0, []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

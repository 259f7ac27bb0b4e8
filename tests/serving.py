"""A real `mlflow server` on loopback, with a SQLite store and proxied artifacts; and a proxy to put before it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import requests

if TYPE_CHECKING:
    from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self.folder / 'm.db'}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.uri}/health", timeout=2).ok:
                    return
            except requests.RequestException:
                time.sleep(0.3)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 15)
            self.process.wait(timeout=30)
            self.process = None


_HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "host"}


class Request(BaseHTTPRequestHandler):
    """A request to a proxy, which says what becomes of it."""

    protocol_version = "HTTP/1.1"
    server: _ProxyServer

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.proxy.handle(self, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_any  # noqa: N815, RUF100 - the library's names

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def ask_upstream(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Return status, content and headers of the upstream's answer."""
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        url = self.server.proxy.upstream + self.path
        # no connection is kept: the server closes idle ones, and a request may come just then
        got = requests.request(self.command, url, data=body, headers=headers, allow_redirects=False, timeout=60)
        return got.status_code, got.content, {k: v for k, v in got.headers.items() if k.lower() not in _HOP}


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class Proxy:
    """A web server that passes requests on; subclasses answer some of them, or all, otherwise."""

    def __init__(self, upstream: str = "", *, port: int = 0) -> None:
        self.upstream = upstream
        self._server = _ProxyServer(("127.0.0.1", port), Request)
        self._server.proxy = self
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def handle(self, request: Request, body: bytes) -> None:
        request.reply(*request.ask_upstream(body))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

"""A proxy before a tracking server that can be away, slow, or without room: `python -m tests.soak.proxy PORT UPSTREAM`.

``GET /__mode?mode=gone&after=3&seconds=2`` sets what happens to all requests after the next three, for two seconds;
``GET /__count`` says how many there were.
"""

from __future__ import annotations

import sys
import threading
import time
from urllib.parse import parse_qs, urlparse

from tests.serving import Proxy, Request

SLOW_S = 0.1
_REFUSED = {
    "full": (507, b'{"error_code": "INTERNAL_ERROR", "message": "No space left on device"}'),
    "read-only": (403, b'{"error_code": "PERMISSION_DENIED", "message": "Read-only"}'),
}


class FaultyProxy(Proxy):
    def __init__(self, upstream: str, *, port: int) -> None:
        self._lock = threading.Lock()
        self._mode, self._after, self._until, self._seconds = "ok", 0, float("inf"), 0.0
        self._count = 0
        super().__init__(upstream, port=port)

    def _mode_now(self) -> str:
        with self._lock:
            self._count += 1
            if self._mode == "ok":
                return "ok"
            if self._after > 0:
                self._after -= 1
                return "ok"
            if self._until == float("inf") and self._seconds:
                self._until = time.monotonic() + self._seconds
            if time.monotonic() > self._until:
                self._mode = "ok"
            return self._mode

    def handle(self, request: Request, body: bytes) -> None:
        if request.path.startswith("/__mode"):
            asked = {name: values[0] for name, values in parse_qs(urlparse(request.path).query).items()}
            with self._lock:
                self._mode, self._after, self._seconds = asked["mode"], int(asked["after"]), float(asked["seconds"])
                self._until = float("inf")
            request.reply(200)
            return
        if request.path == "/__count":
            request.reply(200, str(self._count).encode())
            return
        mode = self._mode_now()
        if mode == "slow":
            time.sleep(SLOW_S)
        if mode in _REFUSED and request.command == "PUT" and "/mlflow-artifacts/" in request.path:
            request.reply(*_REFUSED[mode])
            return
        # if the answer is lost, the server did what was asked, and nobody hears of it
        answer = None if mode == "gone" else request.ask_upstream(body)
        if answer is None or mode == "lost":
            request.close_connection = True
        else:
            request.reply(*answer)


if __name__ == "__main__":
    FaultyProxy(sys.argv[2], port=int(sys.argv[1]))
    threading.Event().wait()

"""A web server before a tracking server that gives one wrong answer at one endpoint, and passes everything else on."""

from __future__ import annotations

import re
import threading

from tests.serving import Proxy, Request

LOGIN = "/login"
ANSWERS = ("401", "403", "404", "413", "429", "500", "503", "redirect", "HTML", "empty", "closed")
PASSING = ("429", "500", "503", "closed")
"""Answers that may be gone in a moment; to ask again after any other one helps only after something was mended."""

_SIGN_IN = (b"<!DOCTYPE html><html><body>Please sign in</body></html>", {"Content-Type": "text/html"})
_NAMES = re.compile(r"(?<=/)(?:m-)?[0-9a-f]{32}(?=/|$)|(?<=/artifacts/).*|(?<=/experiments/)\d+|\d+(?=/)")


class Stub(Proxy):
    """The first request to `endpoint` gets `answer`; what was asked is in `asked`."""

    def __init__(self, upstream: str) -> None:
        self.endpoint, self.answer, self.always = "", "", False
        self.asked: list[str] = []
        self.given = 0
        self._lock = threading.Lock()
        super().__init__(upstream)

    def handle(self, request: Request, body: bytes) -> None:
        answer = self.answer_to(request.command, request.path)
        if request.path.startswith(LOGIN) or answer == "HTML":
            request.reply(200, *_SIGN_IN)
        elif answer == "closed":
            request.close_connection = True
        elif answer == "empty":
            request.reply(200)
        elif answer == "redirect":
            request.reply(302, headers={"Location": LOGIN})
        elif answer:
            request.reply(int(answer), *_SIGN_IN)
        else:
            super().handle(request, body)

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

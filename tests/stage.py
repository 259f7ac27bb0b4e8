"""Several processes at work on one registry, held up before and after every step, in an order that a test chooses."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class DiedError(BaseException):
    """Ends an actor where it stands, as SIGKILL does: nothing that it still asks of the registry is done."""


class Stage:
    """Tags of one model, a clock, and actors that take turns."""

    where = "a stage"

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.now = 1000.0
        self.actors: list[Actor] = []

    def act(self, script: Callable[[Actor], None], *, skew: float = 0.0) -> Actor:
        actor = Actor(self, script, skew=skew)
        self.actors.append(actor)
        return actor

    def play(self, turns: Iterable[tuple[int, float]], look: Callable[[], None]) -> None:
        """Let actors take steps: each turn is an actor's number and the seconds that pass before; look after each."""
        try:
            for number, seconds in turns:
                self.now += seconds
                look()
                self.actors[number % len(self.actors)].step()
                look()
        finally:
            for actor in self.actors:
                actor.die()
        for actor in self.actors:
            if actor.error is not None:
                raise actor.error


class Actor:
    """A process: its tags are those of the stage, its clock may differ."""

    def __init__(self, stage: Stage, script: Callable[[Actor], None], *, skew: float) -> None:
        self._stage, self._script, self._skew = stage, script, skew
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._dead = self.done = False
        self.error: BaseException | None = None
        self.where = stage.where
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._dead:
                self._script(self)
        except DiedError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by the stage
            self.error = error
        self.done = True
        self._back.release()

    def step(self) -> None:
        if not self.done:
            self._go.release()
            assert self._back.acquire(timeout=60)

    def die(self) -> None:
        self._dead = True
        while not self.done:
            self.step()
        self._thread.join(60)

    def wait(self) -> None:
        """Called by the actor: until its next turn."""
        self._back.release()
        self._go.acquire()
        if self._dead:
            raise DiedError

    def clock(self) -> float:
        return self._stage.now + self._skew

    def sleep(self, seconds: float) -> None:  # noqa: ARG002, RUF100 - time passes between turns
        self.wait()

    def read(self) -> dict[str, str]:
        self.wait()
        there = dict(self._stage.tags)
        self.wait()
        return there

    def write(self, key: str, value: str) -> None:
        self.wait()
        self._stage.tags[key] = value
        self.wait()

    def remove(self, key: str) -> None:
        self.wait()
        self._stage.tags.pop(key, None)
        self.wait()

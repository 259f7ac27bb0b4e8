from __future__ import annotations

import itertools
import json
import threading
import time
from hashlib import sha256
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amici_eval.common.errors import InvalidSpecError, LeaseHeldError, ModelNotFoundError, TrackingError
from amici_eval.tracking.registry_tags import LEASE_TAG, Lease, RegistryTags, held
from tests.stage import Actor, Stage

TTL = 10.0
SKEW = 1.9
"""Seconds that clocks may differ by: a fifth of the time to live, less a little."""

# who is on, for how many steps, and after how many seconds: long runs are what leads to holders at all
bursts = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from([1, 1, 2, 3, 5, 8, 12, 16]),
        st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.0, 2.5, 6.5, 8.5, 10.5]),
    ),
    min_size=5,
    max_size=40,
)


class Memory:
    where = "memory"

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.n_writes = 0
        self.fails = False

    def read(self) -> dict[str, str]:
        return dict(self.tags)

    def write(self, key: str, value: str) -> None:
        if self.fails:
            raise TrackingError(value="gone", rule="it must answer", fix="start it")
        self.n_writes += 1
        self.tags[key] = value

    def remove(self, key: str) -> None:
        self.tags.pop(key, None)


def markers(tags: dict[str, str]) -> list[str]:
    return [key for key in tags if key.startswith(f"{LEASE_TAG}.")]


def play_leases(
    plan: list[tuple[int, int, float]], *, skews: list[float], salt: int, wait_s: float, patient: bool
) -> int:
    """Let three processes ask for, renew and release a lease; return how often one of them held it."""
    stage, leases, n_held = Stage(), {}, itertools.count()
    count = itertools.count()

    def script(actor: Actor) -> None:
        for _ in range(3):
            try:
                with held(
                    actor, "x", ttl_s=TTL, wait_s=wait_s, owner="a", renew=False, clock=actor.clock, sleep=actor.sleep
                ) as lease:
                    next(n_held)
                    leases[actor] = lease
                    for _ in range(2):
                        actor.wait()
                        lease.mark(holds=True)
                    if patient:
                        lease.still_mine()
            except LeaseHeldError:
                actor.wait()

    def look() -> None:
        holders = [actor for actor, lease in leases.items() if actor.clock() < lease.held_until]
        assert len(holders) <= 1, "two hold the lease"

    for skew in skews:
        stage.act(script, skew=skew)

    def nonce(n_bytes: int) -> str:
        return sha256(f"{salt} {next(count)}".encode()).hexdigest()[: 2 * n_bytes]

    with mock.patch("amici_eval.tracking.registry_tags.secrets.token_hex", side_effect=nonce):
        stage.play([(actor, 0.0 if k else wait) for actor, n, wait in plan for k in range(n)], look)
    return next(n_held)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    plan=bursts,
    skews=st.lists(st.floats(0, SKEW), min_size=3, max_size=3),
    salt=st.integers(0, 5),
    wait_s=st.sampled_from([0.0, 30.0]),
    patient=st.booleans(),
)
def test_never_two_holders_whatever_the_order_of_steps(plan, skews, salt, wait_s, patient):
    play_leases(plan, skews=skews, salt=salt, wait_s=wait_s, patient=patient)


def test_clocks_that_differ_by_more_than_is_assumed_can_make_two_holders():
    # the first takes the lease; the clock of the second is a whole time to live ahead: it takes over at once
    plan = [(0, 12, 0.0), (1, 20, 0.0)]
    assert play_leases(plan, skews=[0.0, SKEW, 0.0], salt=0, wait_s=0.0, patient=False) == 1
    with pytest.raises(AssertionError, match="two hold the lease"):
        play_leases(plan, skews=[0.0, TTL + 1, 0.0], salt=0, wait_s=0.0, patient=False)


@pytest.mark.parametrize("salt", range(4))
def test_one_of_those_who_ask_at_once_gets_it(salt):
    # in step from the first write on: all see each other
    plan = [(number, 1, 0.01) for _ in range(60) for number in range(3)]
    assert play_leases(plan, skews=[0.0, 0.0, 0.0], salt=salt, wait_s=0.0, patient=False) >= 1


def test_who_waits_is_served():
    tags, counter = Memory(), [0]

    def work() -> None:
        for _ in range(5):
            with held(tags, "count", ttl_s=60, wait_s=600, sleep=lambda seconds: time.sleep(seconds / 20)):
                seen = counter[0]
                time.sleep(0.001)
                counter[0] = seen + 1

    workers = [threading.Thread(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert counter[0] == 25
    assert tags.tags == {}


@pytest.mark.parametrize("version", [None, "2"])
def test_a_lease_on_a_model_or_a_version_is_a_tag_that_goes_with_it(bare_model, version):
    tags = RegistryTags(name=bare_model.name, version=version)
    with held(tags, "alias.champion", ttl_s=60, owner="me") as lease:
        ((key, text),) = bare_model.tags(version).items()
        assert key == lease.key
        assert key.startswith("amici_eval.lease.alias.champion.")
        value = json.loads(text)
        assert (value["owner"], value["holds"]) == ("me", True)
        assert 0 < value["expires"] - time.time() <= 60
        assert lease.still_mine()
        with (
            pytest.raises(
                LeaseHeldError, match=rf"alias.champion of {tags.where} is held by me until 20\d\d-.*\+00:00"
            ),
            held(tags, "alias.champion", ttl_s=60),
        ):
            pass
        # other names, other things
        with held(tags, "alias.best", ttl_s=60), held(tags, "alias", ttl_s=60):
            assert len(markers(bare_model.tags(version))) == 3
    assert bare_model.tags(version) == {}
    assert not lease.still_mine()


def test_a_body_that_raises_gives_the_lease_back(bare_model):
    tags = RegistryTags(name=bare_model.name)
    with pytest.raises(ZeroDivisionError), held(tags, "x", ttl_s=60):
        _ = 1 / 0
    assert bare_model.tags() == {}


def test_what_ran_out_or_is_no_marker_is_removed_and_does_not_block():
    tags = Memory()
    old = json.dumps({"owner": "dead", "expires": time.time() - 1, "holds": True})
    tags.tags = {f"{LEASE_TAG}.x.00": old, f"{LEASE_TAG}.x.01": "no json", f"{LEASE_TAG}.y.00": old, "z": "1"}
    with held(tags, "x", ttl_s=60) as lease:
        assert set(tags.tags) == {lease.key, f"{LEASE_TAG}.y.00", "z"}


def test_a_holder_stays_one_for_longer_than_the_time_to_live():
    tags = Memory()
    with held(tags, "x", ttl_s=3) as lease:
        before, until = tags.n_writes, time.monotonic() + 30
        while tags.n_writes < before + 4 and time.monotonic() < until:
            time.sleep(0.05)
        assert lease.still_mine()
        with pytest.raises(LeaseHeldError), held(tags, "x", ttl_s=3):
            pass
    assert tags.tags == {}


def test_a_holder_that_cannot_renew_knows_that_it_lost_the_lease(caplog):
    tags = Memory()
    with held(tags, "x", ttl_s=0.3, owner="me") as lease:
        tags.fails = True
        until = time.monotonic() + 30
        while lease.still_mine() and time.monotonic() < until:
            time.sleep(0.02)
        assert not lease.still_mine()
        time.sleep(0.1)
        tags.fails = False
        with held(tags, "x", ttl_s=60) as other:
            time.sleep(0.3)
            # the first does not come back to life when the registry answers again
            assert other.still_mine()
            assert not lease.still_mine()
    assert "could not be renewed" in caplog.text
    assert tags.tags == {}


def test_a_marker_that_somebody_deleted_is_lost():
    tags = Memory()
    with held(tags, "x", ttl_s=60) as lease:
        tags.remove(lease.key)
        assert not lease.still_mine()
    asked = Lease(tags, what="x", owner="me", ttl_s=60, clock=time.time)
    assert asked.mark(holds=False)
    assert asked.others() == []
    tags.remove(asked.key)
    assert asked.others() is None


def test_a_failed_write_leaves_no_marker():
    class Slow(Memory):
        def write(self, key: str, value: str) -> None:
            super().write(key, value)
            raise TrackingError(value="time-out", rule="it must answer", fix="start it")

    tags = Slow()
    with pytest.raises(TrackingError), held(tags, "x", ttl_s=60):
        pass
    assert (tags.n_writes, tags.tags) == (1, {})


def test_a_marker_renewed_between_a_read_and_the_next_look_at_the_clock_has_not_run_out():
    now = [0.0]

    class Renewed(Memory):
        def read(self) -> dict[str, str]:
            seen = super().read()
            assert holder.mark(holds=True)
            now[0] = 10.5
            return seen

    tags = Renewed()
    holder, other = (Lease(tags, what="x", owner=owner, ttl_s=10, clock=lambda: now[0]) for owner in "ab")
    assert holder.mark(holds=True)
    now[0] = 7.0
    assert other.mark(holds=False)
    assert [marker.key for marker in other.others()] == [holder.key]
    assert set(tags.tags) == {holder.key, other.key}


def test_a_first_write_that_takes_too_long_is_no_lease():
    now = [0.0]

    class Slow(Memory):
        def write(self, key: str, value: str) -> None:
            super().write(key, value)
            now[0] += 9

    lease = Lease(Slow(), what="x", owner="me", ttl_s=10, clock=lambda: now[0])
    assert not lease.mark(holds=True)
    assert lease.held_until == float("-inf")


def test_what_cannot_be_leased_is_told(bare_model):
    with pytest.raises(InvalidSpecError, match="a lease of 0 s"), held(Memory(), "x", ttl_s=0):
        pass
    for tags in (RegistryTags(name="no such"), RegistryTags(name=bare_model.name, version="9")):
        with pytest.raises(ModelNotFoundError, match=f"{tags.where}: .*not found"), held(tags, "x", ttl_s=1):
            pass

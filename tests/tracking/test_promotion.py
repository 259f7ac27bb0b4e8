from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from amici_eval.common.errors import DataError, LeaseHeldError, ModelNotFoundError, TrackingError
from amici_eval.tracking.jobs import promotion
from amici_eval.tracking.jobs.promotion import promote, promotions, rollback
from amici_eval.tracking.registry_tags import RegistryTags, held

RECORD = "amici_eval.promotions.champion"


def test_a_promotion_moves_the_alias_and_notes_what_it_replaced(bare_model):
    first = promote(bare_model.name, "1", alias="champion", expected=None)
    assert (first.moved, first.version, first.replaced) == (True, "1", None)
    assert first.reason == "champion from no version to version 1"
    second = promote(bare_model.name, "3", alias="champion", expected="1", run_id="abc")
    assert (second.moved, second.version, second.replaced) == (True, "3", "1")
    assert bare_model.aliases() == {"champion": "3"}
    assert set(bare_model.tags()) == {RECORD}, "the lease is given back"
    record = promotions(bare_model.name, "champion")
    assert [(one["version"], one["replaced"], one["run_id"]) for one in record] == [
        ("1", None, None),
        ("3", "1", "abc"),
    ]
    assert datetime.fromisoformat(record[1]["time"]).utcoffset() == timedelta(0)
    assert promotions(bare_model.name, "other") == []


@pytest.mark.parametrize(
    ("now", "expected", "reason"),
    [
        ("3", "1", "champion is now version 3, this version was judged against 1: judge it again"),
        (None, "1", "champion is now not set, this version was judged against 1: judge it again"),
        ("3", None, "champion is now version 3, this version was judged against no version: judge it again"),
        ("2", "1", "champion is version 2 already"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_alias_that_moved_meanwhile_stays_where_it_is(bare_model, now, expected, reason, dry_run):
    if now is not None:
        bare_model.client.set_registered_model_alias(bare_model.name, "champion", now)
    done = promote(bare_model.name, "2", alias="champion", expected=expected, dry_run=dry_run)
    assert (done.moved, done.reason, done.replaced) == (False, reason, now)
    assert bare_model.aliases() == ({} if now is None else {"champion": now})
    assert bare_model.tags() == {}


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(bare_model, monkeypatch):
    promote(bare_model.name, "1", alias="champion", expected=None)
    before = (bare_model.aliases(), bare_model.tags())
    monkeypatch.setattr(RegistryTags, "write", lambda *_: pytest.fail("written"))
    done = promote(bare_model.name, "2", alias="champion", expected="1", dry_run=True)
    assert (done.moved, done.reason) == (False, "dry run: champion from version 1 to version 2 would be done")
    back = rollback(bare_model.name, "champion", dry_run=True)
    assert (back.moved, back.reason) == (False, "dry run: champion from version 1 to no version would be done")
    assert (bare_model.aliases(), bare_model.tags()) == before


def test_rollback_goes_back_one_by_one_and_at_last_takes_the_alias_away(bare_model):
    for version, expected in (("1", None), ("2", "1"), ("3", "2")):
        promote(bare_model.name, version, alias="champion", expected=expected)
    seen = []
    for _ in range(3):
        done = rollback(bare_model.name, "champion")
        assert done.moved
        seen.append((done.replaced, done.version, bare_model.aliases()))
    assert seen == [("3", "2", {"champion": "2"}), ("2", "1", {"champion": "1"}), ("1", None, {})]
    with pytest.raises(DataError, match=r"no promotion of .* to champion is on record"):
        rollback(bare_model.name, "champion")
    # and forward again
    assert promote(bare_model.name, "2", alias="champion", expected=None).moved


def test_rollback_leaves_an_alias_that_was_set_by_hand(bare_model):
    promote(bare_model.name, "1", alias="champion", expected=None)
    promote(bare_model.name, "2", alias="champion", expected="1")
    bare_model.client.set_registered_model_alias(bare_model.name, "champion", "3")
    before = bare_model.tags()
    with pytest.raises(DataError, match="is version 3, the last promotion set it to version 2") as caught:
        rollback(bare_model.name, "champion")
    assert "set champion to version 2 first" in caught.value.fix
    assert (bare_model.aliases(), bare_model.tags()) == ({"champion": "3"}, before)
    bare_model.client.delete_registered_model_alias(bare_model.name, "champion")
    with pytest.raises(DataError, match="is not set, the last promotion set it to version 2"):
        rollback(bare_model.name, "champion")


def test_rollback_to_a_version_that_was_deleted_is_refused(bare_model):
    promote(bare_model.name, "1", alias="champion", expected=None)
    promote(bare_model.name, "2", alias="champion", expected="1")
    bare_model.client.delete_model_version(bare_model.name, "1")
    for dry_run in (True, False):
        with pytest.raises(ModelNotFoundError, match="no version 1: champion pointed to it before version 2"):
            rollback(bare_model.name, "champion", dry_run=dry_run)
    assert bare_model.aliases() == {"champion": "2"}


def test_what_is_not_there_cannot_be_promoted(bare_model):
    with pytest.raises(ModelNotFoundError, match="has no version 9: an alias points to a version that is there"):
        promote(bare_model.name, "9", alias="champion", expected=None)
    with pytest.raises(ModelNotFoundError, match="no such"):
        rollback("no such", "champion")
    assert bare_model.tags() == {}


def test_a_promotion_that_was_never_carried_out_is_dropped_by_the_next(bare_model, monkeypatch):
    promote(bare_model.name, "1", alias="champion", expected=None)

    def dies(*_):
        raise KeyboardInterrupt

    real = promotion._moved
    monkeypatch.setattr(promotion, "_moved", dies)
    with pytest.raises(KeyboardInterrupt):
        promote(bare_model.name, "2", alias="champion", expected="1")
    monkeypatch.setattr(promotion, "_moved", real)
    assert [one["version"] for one in promotions(bare_model.name, "champion")] == ["1", "2"]
    assert bare_model.aliases() == {"champion": "1"}
    with pytest.raises(DataError, match=r"is version 1, which the last promotion, to version 2, replaced"):
        rollback(bare_model.name, "champion")
    promote(bare_model.name, "3", alias="champion", expected="1")
    assert [one["version"] for one in promotions(bare_model.name, "champion")] == ["1", "3"]
    for _ in range(2):
        rollback(bare_model.name, "champion")
    assert bare_model.aliases() == {}


def test_an_alias_that_somebody_moves_without_asking_is_told(bare_model, monkeypatch):
    promote(bare_model.name, "1", alias="champion", expected=None)
    client = type(bare_model.client)
    real = client.set_registered_model_alias

    def set_and_be_overtaken(self, name, alias, version):
        real(self, name, alias, version)
        real(self, name, alias, "3")

    monkeypatch.setattr(client, "set_registered_model_alias", set_and_be_overtaken)
    done = promote(bare_model.name, "2", alias="champion", expected="1")
    assert not done.moved
    assert done.reason == "champion is version 3, though it was just set to version 2: somebody else moves it, too"
    assert [one["version"] for one in promotions(bare_model.name, "champion")] == ["1"]


def test_a_lease_that_ran_out_moves_nothing(bare_model, monkeypatch):
    monkeypatch.setattr("amici_eval.tracking.registry_tags.Lease.still_mine", lambda _: False)
    with pytest.raises(TrackingError, match="ran out before the alias was moved"):
        promote(bare_model.name, "1", alias="champion", expected=None)
    assert (bare_model.aliases(), bare_model.tags()) == ({}, {})


def test_who_holds_the_alias_keeps_others_away(bare_model):
    with held(RegistryTags(name=bare_model.name), "alias.champion", ttl_s=60, owner="another"):
        with pytest.raises(LeaseHeldError, match=r"alias.champion of .* is held by another until"):
            promote(bare_model.name, "1", alias="champion", expected=None, wait_s=0)
        assert promote(bare_model.name, "1", alias="best", expected=None, wait_s=0).moved


def test_the_record_keeps_the_newest_that_fit(bare_model):
    expected = None
    for number in range(15):
        version = "12"[number % 2]
        promote(bare_model.name, version, alias="champion", expected=expected, run_id=f"{number:0400d}")
        expected = version
    text = bare_model.tags()[RECORD]
    record = json.loads(text)
    assert 4400 < len(text) <= 5000
    assert [int(one["run_id"]) for one in record] == list(range(15 - len(record), 15))


def test_a_record_that_is_none_is_told(bare_model):
    bare_model.client.set_registered_model_tag(bare_model.name, RECORD, "[3]")
    with pytest.raises(DataError, match=f"tag {RECORD} of .* is no record of promotions"):
        promote(bare_model.name, "1", alias="champion", expected=None)
    assert bare_model.aliases() == {}

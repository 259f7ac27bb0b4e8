"""Every malformed model and file is refused in words of ours, at once, in little memory, without AMICI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.run_cases import CASES, LIMIT_BYTES, LIMIT_S

pytestmark = [pytest.mark.amici, pytest.mark.slow]


def test_names_are_distinct_and_cases_many():
    assert len({case.name for case in CASES}) == len(CASES) >= 120


@pytest.mark.parametrize("name", ["model", "saved", "tissue.h5ad", "tissue.zarr", "moments.npz"])
def test_what_is_sound_is_read(outcomes, name):
    assert outcomes[f"sound {name}"]["error"] is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_input_is_refused_by_name(outcomes, case):
    found = outcomes[case.name]
    assert found["error"] == "refused", found["error"]
    assert all(found[part].strip() for part in ("value", "rule", "fix"))
    assert Path(found["target"]).name in found["value"], found["value"]
    # what a terminal would obey is written out
    assert not any(sign in found["text"] for sign in "\x1b\x9b\0\n\u202e\u2066\u2028")


def test_no_case_takes_long_or_much_memory_or_imports_amici(outcomes):
    assert {name for name, found in outcomes.items() if found["seconds"] > LIMIT_S} == set()
    assert {name for name, found in outcomes.items() if found["grown_kb"] * 1024 > LIMIT_BYTES} == set()
    assert {name for name, found in outcomes.items() if found["amici"]} == set()

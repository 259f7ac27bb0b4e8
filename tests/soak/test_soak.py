"""A few of the faults of `make soak`, one of each of nine kinds."""

from __future__ import annotations

import os
import re

import pytest

from tests.conftest import ROOT, run_python

pytestmark = [pytest.mark.amici, pytest.mark.server, pytest.mark.slow]

KINDS = "between types|server gone$|answers|disk full|two at once$|damaged|clock"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forked")
def test_faults_lose_nothing(tmp_path):
    options = ("--faults", "9", "--jobs", "1", "--seed", "7", "--only", KINDS, "--keep", str(tmp_path))
    done = run_python("-m", "tests.soak", *options, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = re.search(r"9 faults of 9 kinds in \d+ s: 0 bad; (\d+) parts were finished .*, (\d+) were", done.stdout)
    assert said is not None, done.stdout
    # faults that hit nothing would show nothing
    assert int(said[1]) >= int(said[2]) > 0

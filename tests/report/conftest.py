from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from amici_eval.settings.evaluation import MODES
from tests.builders import AWKWARD_TYPES, make_evaluation


@pytest.fixture
def ax():
    return Figure(figsize=(12, 6)).add_subplot()


@pytest.fixture(scope="session")
def everything():
    """An evaluation with all that figures can show."""
    return make_evaluation(inferred="lag", modes=MODES, senders=AWKWARD_TYPES)

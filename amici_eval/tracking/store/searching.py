"""Searches of the tracking store: page by page, and in requests that stores with many experiments accept."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EXPERIMENTS_AT_A_TIME = 100


def all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of one of MLflow's searches, page after page."""
    page = search()
    while page.token:
        yield from page
        page = search(page_token=page.token)
    yield from page


def version_numbers(client: Any, name: str) -> list[int]:
    """Return the numbers of a registered model's versions, oldest first."""
    return sorted(int(one.version) for one in all_pages(partial(client.search_model_versions, f"name='{name}'")))


def runs_anywhere(client: Any, condition: str, *, seconds: float = math.inf) -> Iterator[Any]:
    """Yield runs that match, newest first: those of the current experiment, then of all others, for some seconds."""
    until = time.monotonic() + seconds

    def search(experiments: list[str]) -> Iterator[Any]:
        newest = ["attributes.start_time DESC"]
        return all_pages(partial(client.search_runs, experiments, condition, order_by=newest))

    own = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if own:
        yield from search([own])
    ids = [one.experiment_id for one in all_pages(client.search_experiments) if one.experiment_id != own]
    for start in range(0, len(ids), _EXPERIMENTS_AT_A_TIME):
        if time.monotonic() > until:
            return
        yield from search(ids[start : start + _EXPERIMENTS_AT_A_TIME])

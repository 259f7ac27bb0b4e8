"""Small tasks several at a time: the same results, progress in the calling thread, an end when one is asked for."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from amici_eval.common.threads import run_side_by_side
from amici_eval.evaluation.protocols import Meter


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def squares(number):
    def task(count):
        for _ in range(number):
            count(1)
        return number**2, torch.get_num_threads(), threading.current_thread()

    return task


def test_results_and_progress_are_those_of_one_after_another(n_threads):
    told = dict.fromkeys("abcde", 0)
    here = threading.current_thread()

    def counter(name):
        def count(more):
            assert threading.current_thread() is here
            told[name] += more

        return count

    tasks = {name: squares(i + 1) for i, name in enumerate("abcde")}
    found = dict(run_side_by_side(tasks, {name: counter(name) for name in tasks}))
    assert {name: result[0] for name, result in found.items()} == {"a": 1, "b": 4, "c": 9, "d": 16, "e": 25}
    assert {result[1] for result in found.values()} == {1}, "torch computes on one thread in each"
    assert (here in {result[2] for result in found.values()}) == (n_threads == 1)
    assert told == {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}
    assert torch.get_num_threads() == n_threads


def test_an_error_of_a_task_comes_out(n_threads):
    def fails(count):
        raise ValueError("task")

    tasks = {"good": squares(2), "bad": fails, "other": squares(1)}
    with pytest.raises(ValueError, match="task"):
        dict(run_side_by_side(tasks, dict.fromkeys(tasks, lambda more: None)))
    assert torch.get_num_threads() == n_threads


def test_what_progress_raises_ends_all_tasks(n_threads):
    ended = []

    def endless(count):
        try:
            while True:
                count(1)
                time.sleep(0.001)
        finally:
            ended.append(True)

    def stop(more):
        raise KeyboardInterrupt

    tasks = {"one": endless, "two": endless, "three": endless, "four": endless}
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        dict(run_side_by_side(tasks, dict.fromkeys(tasks, stop)))
    assert ended
    assert threading.active_count() == before
    assert torch.get_num_threads() == n_threads


def test_nothing_to_do_is_nothing():
    assert list(run_side_by_side({}, {})) == []


def test_work_of_different_kinds_adds_up():
    seen = []
    meter = Meter(lambda *step: seen.append(step), total=30)
    advance = meter.cells("attention", 10)
    advance(4)
    advance(6)
    count = meter.permutations("Tumor", work=20, pieces=8)
    count(6)
    count(100)
    count.finish()
    assert [done for done, _, _ in seen] == [4, 10, 25, 30, 30]
    assert {total for _, total, _ in seen} == {30}
    assert seen[1][2] == "attention: 10 of 10 cells"
    assert seen[2][2] == "Tumor: 75 % of permutations"
    early = meter.permutations("B", work=5, pieces=7)
    early.finish()
    early.finish()
    assert seen[-1][0] == 30, "never beyond the total"

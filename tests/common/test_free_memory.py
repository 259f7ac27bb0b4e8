"""What the system tells of memory that is left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from amici_eval.common import memory as module
from amici_eval.common.memory import available_memory, free_bytes


def test_some_memory_is_available():
    assert 2**20 < available_memory() < 2**50


def limit_group(folder, limit, used, cached, *, names=("memory.max", "memory.current", "inactive_file")):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nactive_file 7\n{names[2]} {cached}\n")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of a made-up machine: the folders of both kinds, and the file that names the process's own."""
    new, old, own = tmp_path / "new", tmp_path / "old", tmp_path / "own"
    monkeypatch.setattr(module, "_OWN_GROUPS", own)
    monkeypatch.setattr(
        module,
        "_CONTAINERS",
        tuple((kind[0], folder, *kind[2:]) for kind, folder in zip(module._CONTAINERS, (new, old), strict=True)),
    )
    return new, old, own


def test_a_container_limits_the_memory(groups):
    limit_group(groups[0], 3_000_000, 2_500_000, 500_000)
    assert available_memory() == 1_000_000, "no file tells the own group"
    for own in ("0::/\n", "0::/../elsewhere\n", "0::/not/here\n", "nonsense\n", ""):
        groups[2].write_text(own)
        assert available_memory() == 1_000_000
    limit_group(groups[0], 3_000_000, 3_500_000, 0)
    assert available_memory() == 0
    (groups[0] / "memory.max").write_text("max\n")
    assert available_memory() > 2**20


@pytest.mark.parametrize(
    ("own_limit", "parent_limit"), [(5_000_000, "max"), ("max", 5_000_000), (5_000_000, 7_000_000)]
)
def test_the_own_group_and_those_around_it_limit_the_memory(groups, own_limit, parent_limit):
    groups[2].write_text("1:cpu:/else\n0::/user.slice/session:1.scope\n")
    limit_group(groups[0] / "user.slice" / "session:1.scope", own_limit, 1_000_000, 0)
    limit_group(groups[0] / "user.slice", parent_limit, 1_000_000, 0)
    limit_group(groups[0] / "another.slice", 10, 0, 0)
    assert available_memory() == 4_000_000


def test_groups_of_older_kernels_limit_the_memory(groups):
    groups[2].write_text("5:cpuacct,memory:/box\n1:cpu:/else\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit_group(groups[1] / "box", 5_000_000, 2_000_000, 1_000_000, names=names)
    limit_group(groups[1] / "else", 10, 0, 0, names=names)
    assert available_memory() == 4_000_000


@pytest.mark.parametrize("missing", ["function", "name", "value"])
def test_a_system_that_tells_nothing_gets_a_cautious_number(groups, monkeypatch, missing):
    def unknown(name):
        if missing == "name":
            msg = "unrecognized configuration name"
            raise ValueError(msg)
        return -1 if name == "SC_PHYS_PAGES" else 4096

    def absent(self, *args, **kwargs):
        raise FileNotFoundError(self)

    # as on Windows: neither /proc nor os.sysconf
    monkeypatch.setattr(module.Path, "read_text", absent)
    if missing == "function":
        monkeypatch.delattr(module.os, "sysconf", raising=False)
    else:
        monkeypatch.setattr(module.os, "sysconf", unknown, raising=False)
    assert available_memory() == 2**31


def test_without_a_count_of_what_is_left_half_of_the_memory_is_taken(groups, monkeypatch):
    def absent(self, *args, **kwargs):
        raise FileNotFoundError(self)

    monkeypatch.setattr(module.Path, "read_text", absent)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(module.os, "sysconf", pages.__getitem__, raising=False)
    assert available_memory() == 2_048_000


def test_a_limit_on_addresses_counts():
    # in a process of its own: a limit cannot be raised again
    code = """
import resource
from pathlib import Path
from amici_eval.common.memory import available_memory
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, taken + 2**26))
before = available_memory()
held = bytearray(2**25)
print(before, available_memory())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert 0 < before <= 2**26
    assert before - after >= 2**25


def test_free_memory_of_a_device(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(module, "available_memory", lambda: 17)
    assert free_bytes("cpu") == 17
    assert free_bytes("mps") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert free_bytes("cuda:0") == 5

    def broken(device):
        msg = "CUDA error: out of memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert free_bytes("cuda") is None

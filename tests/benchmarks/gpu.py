"""The tensor kernels of the factored engine on CUDA: `python -m tests.benchmarks.gpu`; needs torch and numpy only.

First every kernel's numbers on the card are compared with the CPU's on a small case. Then each is timed up to a million
cells, and set beside what the card itself reaches at matrix products and at copying memory. Without CUDA the comparison
runs on the CPU alone, between the forms of each kernel, and nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from amici_eval.model.engines.attention import Receivers, attend, attend_by_torch
from amici_eval.model.engines.encoder import SenderTables, embed_senders
from amici_eval.model.engines.folding import fold_encoder
from amici_eval.stats.permutation import statistics
from amici_eval.stats.permutation.nulls import factor_exceedances
from amici_eval.stats.permutation.permutations import PermutationStream
from amici_eval.stats.type_sums import TypeSums, factors_of, gather_sums
from tests.benchmarks.common import say, write_table
from tests.builders import heads_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from amici_eval.model.engines.encoder import EncoderWeights
    from tests.benchmarks.common import Row

_CHUNK = 16_384
_BLOCK = 8_192
_REACH = 200
_NEEDED = 0.4
_PERMUTATIONS = 256
_TABLE_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model; by default those of amici-st with the heads of the million-cell case."""

    genes: int = 300
    types: int = 16
    heads: int = 8
    head_size: int = 16
    neighbours: int = 20
    embed: int = 256
    embed_hidden: int = 1024
    kv: int = 256
    pos_hidden: int = 512
    label: int = 32
    query: int = 64
    query_hidden: int = 512


SMALL = Sizes(genes=24, types=3, neighbours=6, heads=4, head_size=8, embed=32, embed_hidden=48, kv=32, pos_hidden=40)


def random_weights(size: Sizes, device: str) -> EncoderWeights:
    """Return folded weights of a model with random numbers in it."""
    state = random_state(size)
    norms = {name.removesuffix(".weight") for name in state if ".nn.1." in name or ".nn.4." in name}
    norms |= {name.removesuffix(".weight") for name in state if name.endswith("project_nn.1.weight")}
    module = SimpleNamespace(
        n_heads=size.heads,
        attention_layer=SimpleNamespace(dummy_attn_score=3.0),
        pos_coef_offset=-2.0,
        distance_kernel_unit_scale=10.0,
        state_dict=lambda: state,
        named_modules=lambda: [(name, torch.nn.LayerNorm(1)) for name in (*norms, "attention_layer.norm_o")],
    )
    return fold_encoder(module, device=device)


def random_state(size: Sizes) -> dict[str, torch.Tensor]:
    """Return a state dict as that of an AMICI module, by name and shape."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def draw(*shape: int, bound: float) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * bound

    def linear(name: str, n_in: int, n_out: int) -> None:
        state[f"{name}.weight"] = draw(n_out, n_in, bound=n_in**-0.5)
        state[f"{name}.bias"] = draw(n_out, bound=n_in**-0.5)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1.0 + draw(width, bound=0.2)
        state[f"{name}.bias"] = draw(width, bound=0.2)

    def block(name: str, n_in: int, n_hidden: int, n_out: int, *, final_norm: bool = True) -> None:
        linear(f"{name}.nn.0", n_in, n_hidden)
        norm(f"{name}.nn.1", n_hidden)
        linear(f"{name}.nn.3", n_hidden, n_in)
        norm(f"{name}.nn.4", n_in)
        if n_out != n_in:
            linear(f"{name}.project_nn.0", n_in, n_out)
            if final_norm:
                norm(f"{name}.project_nn.1", n_out)

    state["ct_profiles"] = draw(size.types, size.genes, bound=1.0).abs()
    state["ct_embed.weight"] = torch.randn(size.types, size.label, generator=generator)
    block("query_embed", size.label, size.query_hidden, size.heads * size.query)
    block("nn_embed", size.genes, size.embed_hidden, size.embed)
    block("pos_coef_mlp", size.embed + size.label, size.pos_hidden, size.heads, final_norm=False)
    block("kv_embed", size.embed, size.kv, size.heads * size.kv)
    for letter, width in (("Q", size.query), ("K", size.kv), ("V", size.kv)):
        state[f"attention_layer.W_{letter}"] = draw(size.head_size, size.heads, width, bound=width**-0.5)
        state[f"attention_layer.b_{letter}"] = draw(size.heads, size.head_size, bound=0.2)
    width = size.heads * size.head_size
    state["attention_layer.W_O"] = draw(width, size.heads, size.head_size, bound=size.head_size**-0.5)
    norm("attention_layer.norm_o", width)
    state["linear_head.weight"] = draw(size.genes, width, bound=width**-0.5)
    return state


@dataclass(frozen=True)
class Block:
    """Expression of some cells, as ``gather_sums`` takes it."""

    positions: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Cells:
    """Random cells along a line, with neighbours close by."""

    size: Sizes
    n_cells: int
    expression: np.ndarray
    """One block that stands for all: a million rows of their own would only measure the host's memory."""
    slots: np.ndarray
    distances: np.ndarray
    types: np.ndarray
    needed: np.ndarray

    @classmethod
    def random(cls, size: Sizes, n_cells: int, seed: int = 0) -> Cells:
        rng = np.random.default_rng(seed)
        shape = (n_cells, size.neighbours)
        reach = min(_REACH, n_cells // 2)
        slots = (np.arange(n_cells)[:, None] + rng.integers(-reach, reach, shape)) % n_cells
        block = rng.standard_exponential((min(_CHUNK, n_cells), size.genes), dtype=np.float32)
        return cls(
            size=size,
            n_cells=n_cells,
            expression=block * (rng.random(block.shape, dtype=np.float32) < 0.2),
            slots=slots.astype(np.int32),
            distances=rng.uniform(5, 40, shape).astype(np.float32),
            types=rng.integers(0, size.types, n_cells),
            needed=rng.random((n_cells, size.types)) < _NEEDED,
        )

    def embed(self, weights: EncoderWeights, tables: SenderTables, device: str) -> None:
        """Embed all cells, expression already on the device."""
        expression = torch.from_numpy(self.expression).to(device)
        needed = torch.from_numpy(self.needed).to(device)
        places = torch.arange(self.n_cells, device=device)
        for start in range(0, self.n_cells, _CHUNK):
            rows = slice(start, min(start + _CHUNK, self.n_cells))
            embed_senders(weights, expression[: rows.stop - start], needed[rows], places[rows], tables)

    def blocks(self) -> Iterator[Block]:
        """Yield expression block by block, from the host's memory as in a real run."""
        for start in range(0, self.n_cells, _BLOCK):
            positions = np.arange(start, min(start + _BLOCK, self.n_cells))
            yield Block(positions, self.expression[positions % len(self.expression)])


def run_small(size: Sizes, device: str, *, gram: bool, use_compiled: bool | None = None) -> dict[str, np.ndarray]:
    """Return what every kernel gives on a small case: values, and counts of permutations."""
    cells = Cells.random(size, 600)
    weights = random_weights(size, device)
    tables = SenderTables.empty(weights, cells.n_cells, device=device)
    cells.embed(weights, tables, device)
    compute = attend_by_torch if use_compiled is False else attend
    outputs = compute(tables, Receivers(cells.slots, cells.distances, cells.types))
    readout = weights.readout(0)
    tiles = np.arange(cells.n_cells) * 4 // cells.n_cells
    moments = gather_sums(outputs, readout, cells.blocks(), tiles=tiles, device=device)
    # the test gets the same numbers on every device: those of fixed outputs, so that counts must be equal
    fixed = np.random.default_rng(1).standard_normal(outputs.shape).astype(np.float32)
    factors, images = factors_of(fixed, _fixed_moments(cells, fixed, readout, tiles), readout)
    stream = PermutationStream(seed=0, cell_type="check", n_cells=cells.n_cells)
    cells_per_permutation = np.inf if gram else 0
    with patch.multiple(
        statistics,
        _GRAM_CELLS_PER_PERMUTATION=cells_per_permutation,
        _TORCH_GRAM_CELLS_PER_PERMUTATION=cells_per_permutation,
    ):
        counts = {
            sampling: factor_exceedances(
                heads_of(factors, images), stream=stream, n_permutations=200, sampling=sampling, device=device
            ).exceedances
            for sampling in ("independent", "cyclic")
        }
    return {
        "values of senders": tables.values.cpu().numpy(),
        "pairs of sender and receiver type": tables.pairs.cpu().numpy(),
        "attention outputs": outputs,
        "explained variance per gene": moments.by_tile.explained_variance_gene,
        "explained variance": moments.by_tile.explained_variance,
        "counts, independent": counts["independent"],
        "counts, cyclic": counts["cyclic"],
    }


def _fixed_moments(cells: Cells, outputs: np.ndarray, readout: Any, tiles: np.ndarray) -> TypeSums:
    return gather_sums(outputs, readout, cells.blocks(), tiles=tiles, device="cpu")


def check(device: str) -> list[Row]:
    """Compare a small case on the device with the CPU's; on the CPU, its compiled kernels with plain torch."""
    expected = run_small(SMALL, "cpu", gram=False)
    found = run_small(SMALL, device, gram=True, use_compiled=False)
    rows = []
    for name, value in expected.items():
        difference = float(np.abs(np.asarray(value, dtype=np.float64) - found[name]).max())
        # counts are whole numbers and equal; values agree to float32
        allowed = 0.0 if name.startswith("counts") else 1e-4 * max(1.0, float(np.abs(value).max()))
        holds = difference <= allowed
        rows.append({"check": name, "largest_difference": difference, "holds": holds})
        say(f"{'ok      ' if holds else 'DIFFERS '}{name}: largest difference {difference:.2g}")
    return rows


def card_limits(device: str) -> dict[str, float]:
    """Measure what the card reaches: float32 and float64 products (operations/s), and copying (bytes/s)."""
    side = 8192
    limits = {}
    for name, kind in (("float32", torch.float32), ("float64", torch.float64)):
        a, b = (torch.rand(side, side, device=device, dtype=kind) for _ in range(2))
        limits[name] = 2.0 * side**3 / best_seconds(lambda a=a, b=b: torch.mm(a, b))
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    limits["bandwidth"] = 2.0 * source.nbytes / best_seconds(lambda: target.copy_(source))
    return limits


def best_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Time a function on the card: the best of some runs after a first one."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    best = float("inf")
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        function()
        wait()
        best = min(best, time.perf_counter() - started)
    return best


def time_stages(size: Sizes, n_cells: int, device: str, limits: dict[str, float]) -> Iterator[Row]:
    """Time each kernel; operations and bytes are the least that the stage needs, from its shapes."""
    cells = Cells.random(size, n_cells)
    weights = random_weights(size, device)
    columns = size.heads * size.head_size

    def row(stage: str, seconds: float, *, operations: float = 0.0, kind: str = "float32", moved: float = 0.0) -> Row:
        return {
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "stage": stage,
            "n_cells": n_cells,
            "seconds": seconds,
            "of_products": operations / seconds / limits[kind] if operations else None,
            "of_bandwidth": moved / seconds / limits["bandwidth"] if moved else None,
            "precision": kind,
        }

    # the engine works through tiles so that tables fit; here as many senders as fit stand for all
    in_tables = min(n_cells, _TABLE_BYTES // weights.bytes_per_sender)
    part = cells if in_tables == n_cells else Cells.random(size, in_tables)
    tables = SenderTables.empty(weights, in_tables, device=device)
    seconds = best_seconds(lambda: part.embed(weights, tables, device)) * n_cells / in_tables
    per_sender = size.embed_hidden * 2 * size.genes + size.genes * size.embed + size.embed * size.pos_hidden
    per_sender += 2 * size.embed * size.kv + size.embed * (columns + size.heads * size.types + size.embed)
    per_pair = (size.embed + size.label) * (size.pos_hidden + size.heads)
    operations = 2.0 * n_cells * (per_sender + per_pair * size.types * _NEEDED)
    yield row("encoder", seconds, operations=operations)

    def attention() -> np.ndarray:
        return attend(tables, Receivers(part.slots, part.distances, part.types))

    seconds = best_seconds(attention) * n_cells / in_tables
    moved = 4.0 * n_cells * (size.neighbours * (columns + 2 * size.heads + 2) + columns)
    yield row("attention, with transfers", seconds, moved=moved)

    outputs = np.random.default_rng(0).standard_normal((n_cells, columns)).astype(np.float32)
    readout = weights.readout(0)
    tiles = np.arange(n_cells) * 64 // n_cells

    def gather() -> TypeSums:
        return gather_sums(outputs, readout, cells.blocks(), tiles=tiles, device=device)

    seconds = best_seconds(gather, repeats=1)
    rank = size.head_size + 1
    operations = 2.0 * n_cells * size.heads * rank * (size.genes + rank)
    yield row("moments, with transfers", seconds, operations=operations, kind="float64")

    factors, images = factors_of(outputs, gather(), readout)
    stream = PermutationStream(seed=0, cell_type="speed", n_cells=n_cells)
    permutations = max(8, min(_PERMUTATIONS, 2**28 // n_cells))
    entries = float(n_cells * size.heads * rank)
    for sampling, moved in (("independent", 8.0 * permutations * entries), ("cyclic", 40.0 * entries)):
        seconds = best_seconds(
            lambda sampling=sampling: factor_exceedances(
                heads_of(factors, images), stream=stream, n_permutations=permutations, sampling=sampling, device=device
            ),
            repeats=1,
        )
        name = f"{permutations} independent permutations" if sampling == "independent" else "cyclic permutations, all"
        yield row(name, seconds, moved=moved)
    started = time.perf_counter()
    stream.batch(0, 8)
    drawing = (time.perf_counter() - started) * permutations / 8
    yield row(f"of which drawing {permutations} on the CPU", drawing)


def main(arguments: list[str] | None = None) -> int:
    """Check, then time if there is a card."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description="Time the kernels on CUDA.")
    parser.add_argument("--results", type=Path, default=Path("benchmark-results"), help="folder of gpu.csv")
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    given = parser.parse_args(arguments)
    has_card = torch.cuda.is_available()
    device = "cuda" if has_card else "cpu"
    checks = check(device)
    write_table(given.results / "gpu_checks.csv", [{"device": device, **row} for row in checks])
    if not all(row["holds"] for row in checks):
        say("the kernels disagree: nothing is timed")
        return 1
    if not has_card:
        say("no CUDA device: the kernels were checked on the CPU only, nothing was timed")
        return 0
    limits = card_limits(device)
    say(
        f"{torch.cuda.get_device_name()}: {limits['float32'] / 1e12:.1f} TFLOP/s float32, "
        f"{limits['float64'] / 1e12:.1f} float64, {limits['bandwidth'] / 1e9:.0f} GB/s"
    )
    rows: list[Row] = []
    for n_cells in given.cells:
        for row in time_stages(Sizes(), n_cells, device, limits):
            rows.append({**row, **{f"card_{name}": value for name, value in limits.items()}})
            shares = [f"{100 * row[name]:.0f} % {of}" for name, of in _SHARES if row[name] is not None]
            say(f"{row['n_cells']:>9,} cells, {row['stage']}: {row['seconds']:.3f} s {', '.join(shares)}")
            write_table(given.results / "gpu.csv", rows)
    return 0


_SHARES = (("of_products", "of the card's matrix products"), ("of_bandwidth", "of its memory bandwidth"))

if __name__ == "__main__":
    sys.exit(main())

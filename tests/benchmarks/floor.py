"""Distance to the floor: the arithmetic that one encoder pass needs, at the speed of this machine's matrix products."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.clock import product_rate
from tests.benchmarks.common import Job, Options, measure, say, write_table
from tests.benchmarks.engines import FEW, settings, time_evaluation, warm_up
from tests.benchmarks.scaling import BASE, QUICK_BASE, QUICK_DIMS
from tests.benchmarks.tissues import TissueSize, random_model, read_tissue

if TYPE_CHECKING:
    from amici_eval.data.tissue import Tissue
    from amici_eval.model.checkpoint import TrainedAMICI
    from tests.benchmarks.common import Emit

_ROWS = 8192


@dataclass(frozen=True)
class Product:
    """A matrix product of a stage: ``rows x inner`` by ``inner x columns``."""

    stage: str
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Work:
    """What the encoder pass of a model on a tissue needs at least."""

    products: tuple[Product, ...]
    attention: float


def needed_work(model: TrainedAMICI, tissue: Tissue) -> Work:
    """Count what one pass needs with all identities used: everything once, and only for cells that are attended to.

    Expression is embedded once per sender. The distance network's first layer is split into a sender part (once per
    sender) and a type part; its second layer and projection are needed once per pair of sender and receiver type. The
    projection of the key and value embedding, its layer norm and W_K, W_V are one map: to values, to scores (queries
    depend on the type alone, so either heads x size or heads x types columns, whichever are fewer) and to what the
    layer norm divides by. Attention: a score and a weighted value per receiver, neighbour and head. Layer norms, other
    elementwise steps, the search of neighbours, expression and explained variance are left out: it is a floor.
    """
    from amici_eval.model.engines.hooked import neighbours

    index, _ = neighbours(tissue, model.card)
    n_types = len(model.card.cell_types)
    receivers = np.flatnonzero(tissue.evaluated)
    pairs = np.unique(index[receivers] * n_types + tissue.label_codes[receivers][:, None])
    n_senders, n_pairs = len(np.unique(pairs // n_types)), len(pairs)

    w = {name: tuple(tensor.shape) for name, tensor in model.weights.items()}
    n_heads, (head_size, _, _) = model.card.n_heads, w["attention_layer.W_V"]
    hidden, n_genes = w["nn_embed.nn.0.weight"]
    embed = w.get("nn_embed.project_nn.0.weight", (n_genes,))[0]
    pos_hidden, pos_in = w["pos_coef_mlp.nn.0.weight"]
    kv_hidden = w["kv_embed.nn.0.weight"][0]
    products = [
        Product("expression embedding", n_senders, n_genes, hidden),
        Product("expression embedding", n_senders, hidden, n_genes),
        Product("expression embedding", n_senders, n_genes, embed),
        Product("distance network, senders", n_senders, embed, pos_hidden),
        Product("distance network, pairs", n_pairs, pos_hidden, pos_in),
        Product("distance network, pairs", n_pairs, pos_in, n_heads),
        Product("key and value embedding", n_senders, embed, kv_hidden),
        Product("key and value embedding", n_senders, kv_hidden, embed),
        Product("key and value embedding", n_senders, embed, n_heads * head_size),
        Product("key and value embedding", n_senders, embed, n_heads * min(head_size, n_types)),
        Product("key and value embedding", n_senders, embed, embed),
    ]
    attention = 4.0 * len(receivers) * index.shape[1] * n_heads * head_size
    return Work(products=tuple(products), attention=attention)


def run(options: Options) -> None:
    """Measure two sizes and write ``floor.csv`` and ``floor_stages.csv``."""
    base, sizes = (QUICK_BASE, [300]) if options.quick else (BASE, [10_000, 100_000])
    job = Job(
        function=f"{__name__}:measure_floor",
        arguments={
            "base": asdict(base),
            "sizes": sizes,
            "engine": options.engine or "factored",
            "repeats": options.repeats,
            "dims": QUICK_DIMS if options.quick else {},
        },
    )
    rows, stages = [], []
    for row in measure(job, options):
        (stages if row.pop("table") == "stages" else rows).append(row)
        write_table(options.results / "floor.csv", rows)
        write_table(options.results / "floor_stages.csv", stages)
    for row in rows:
        say(f"floor, {row['n_cells']} cells: {row['wall_s']:.2f} s against {row['floor_s']:.2f} s")


def measure_floor(
    emit: Emit, *, base: dict[str, Any], sizes: list[int], engine: str, repeats: int, dims: dict[str, int]
) -> None:
    """Time evaluations with one permutation and with all, and the matrix products that a pass needs."""
    from amici_eval.data.tissue import prepare
    from amici_eval.settings.evaluation import DataSpec

    small = read_tissue(TissueSize(n_cells=200 + 60 * base["types"], n_genes=base["genes"], n_types=base["types"]))
    model = random_model(
        small, n_heads=base["heads"], head_size=base["head_size"], n_neighbors=base["neighbours"], **dims
    )
    warm_up(model, small, "hooked" if engine == "hooked" else "everything")
    rates: dict[tuple[int, int], float] = {}
    for n_cells in sizes:
        tissue = prepare(
            read_tissue(TissueSize(n_cells=n_cells, n_genes=base["genes"], n_types=base["types"])),
            model.card,
            DataSpec(),
        )
        work = needed_work(model, tissue)
        for product in work.products:
            shape = (product.inner, product.columns)
            if shape not in rates:
                rates[shape] = product_rate(_ROWS, *shape)
        floor_s = sum(product.operations / rates[product.inner, product.columns] for product in work.products)
        floor_s += work.attention / max(rates.values())
        for stage in dict.fromkeys(product.stage for product in work.products):
            own = [product for product in work.products if product.stage == stage]
            operations = sum(product.operations for product in own)
            seconds = sum(product.operations / rates[product.inner, product.columns] for product in own)
            row = {"n_cells": n_cells, "stage": stage, "gflop": operations / 1e9, "floor_s": seconds}
            emit({"table": "stages", **row, "gflop_per_s": operations / 1e9 / seconds})
        emit(
            {
                "table": "stages",
                "n_cells": n_cells,
                "stage": "attention",
                "gflop": work.attention / 1e9,
                "floor_s": work.attention / max(rates.values()),
                "gflop_per_s": max(rates.values()) / 1e9,
            }
        )
        runs = {
            "rest": (engine, 1, "independent"),
            "independent": (engine, base["permutations"], "independent"),
            "cyclic": (engine, FEW, "cyclic"),
            **{side: (side, 1, "independent") for side in ("catalogue", "inference", "everything")},
        }
        if engine == "hooked":
            runs = {name: run for name, run in runs.items() if run[0] == "hooked"}
        timed = {
            name: time_evaluation(model, tissue, settings(side, n_permutations=m, sampling=sampling), repeats=repeats)
            for name, (side, m, sampling) in runs.items()
        }
        rest = timed.pop("rest")
        row = {"n_cells": n_cells, "engine": engine, "wall_s": rest.wall_s, "attention_s": rest.attention_s}
        row |= {"floor_s": floor_s, "ratio": rest.wall_s / floor_s, "n_permutations": base["permutations"]}
        row |= {f"{name}_s": max(0.0, timing.wall_s - rest.wall_s) for name, timing in timed.items()}
        emit({"table": "floor", **row})

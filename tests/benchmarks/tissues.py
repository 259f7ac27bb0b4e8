"""Simulated tissue of any size, written without ever being dense, and models with random weights for it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anndata import AnnData

    from amici_eval.model.checkpoint import TrainedAMICI

_SPACING_UM = 10.0
_NICHE_UM = 120.0
_NICHE_CONTRAST = 1.5
_N_WAVES = 24
_FIELD_SITES = 40
_BLOCK = 20_000
_FEWEST = 4


@dataclass(frozen=True, kw_only=True)
class TissueSize:
    """What a tissue for time measurements looks like; there is no signal in it.

    Parameters
    ----------
    n_cells, n_genes, n_types
        Size. Types are uneven: the most frequent has several times the cells of the rarest.
    density
        Mean share of genes that a cell expresses.
    seed
        Determines the whole tissue.
    """

    n_cells: int
    n_genes: int = 300
    n_types: int = 8
    density: float = 0.2
    seed: int = 0

    @property
    def cell_types(self) -> list[str]:
        return [f"type_{index:02d}" for index in range(self.n_types)]

    @property
    def genes(self) -> list[str]:
        return [f"gene_{index:04d}" for index in range(self.n_genes)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_tissue(path: Path, size: TissueSize) -> None:
    """Write a tissue as .h5ad with log-normalised expression in CSR, some thousand cells at a time.

    Cells lie on a jittered grid, in the file by field of view (40 x 40 sites in scan order, any order within), as
    imaging instruments write them. The log density of each type is a smooth random field. The draw of a block depends
    on the seed and the number of the block only.
    """
    import h5py
    from anndata.io import write_elem

    rng = np.random.default_rng([size.seed, 0])
    coordinates = _positions(size.n_cells, rng)
    types = _types(coordinates, size, rng)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(types, size.cell_types)},
        index=pd.Index([f"cell_{row:07d}" for row in range(size.n_cells)]),
    )
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", obs)
        write_elem(file, "var", pd.DataFrame(index=pd.Index(size.genes)))
        write_elem(file, "obsm", {"spatial": coordinates})
        for name in ("varm", "obsp", "varp", "layers", "uns"):
            write_elem(file, name, {})
        x = file.create_group("X")
        x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        x.attrs["shape"] = np.array([size.n_cells, size.n_genes], dtype=np.int64)
        stored = {
            name: x.create_dataset(name, shape=(0,), maxshape=(None,), chunks=(2**18,), dtype=kind)
            for name, kind in (("data", np.float32), ("indices", np.int32))
        }
        ends = [np.zeros(1, dtype=np.int64)]
        for block in _expression_blocks(types, size):
            start = int(ends[-1][-1])
            for name, values in (("data", block.data), ("indices", block.columns)):
                stored[name].resize((start + len(values),))
                stored[name][start:] = values
            ends.append(start + np.cumsum(block.per_cell))
        # SciPy wants one type for both, and columns were written in 32 bits
        indptr = np.concatenate(ends)
        x.create_dataset("indptr", data=indptr.astype(np.int32 if indptr[-1] < 2**31 else np.int64))


def read_tissue(size: TissueSize, *, dense: bool = False) -> AnnData:
    """Return a tissue in memory, sparse unless asked otherwise."""
    import anndata

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tissue.h5ad"
        write_tissue(path, size)
        adata = anndata.read_h5ad(path)
    if dense:
        adata.X = adata.X.toarray()
    return adata


@dataclass(frozen=True)
class _Block:
    data: np.ndarray
    columns: np.ndarray
    per_cell: np.ndarray


def _expression_blocks(types: np.ndarray, size: TissueSize) -> Iterator[_Block]:
    rng = np.random.default_rng([size.seed, 1])
    # shares between 0 and 1 with the wanted mean, different from type to type
    logit = rng.normal(0, 1, (size.n_types, size.n_genes)) + rng.normal(0, 1, size.n_genes)
    share = 1 / (1 + np.exp(-logit))
    share = np.clip(share * size.density / share.mean(), 0.005, 0.95).astype(np.float32)
    typical = 2.0 * size.density * size.n_genes
    for number, start in enumerate(range(0, len(types), _BLOCK)):
        rng = np.random.default_rng([size.seed, 2, number])
        own = types[start : start + _BLOCK]
        expressed = rng.random((len(own), size.n_genes), dtype=np.float32) < share[own]
        rows, columns = np.nonzero(expressed)
        counts = 1 + np.floor(rng.standard_exponential(len(rows), dtype=np.float32) * 1.5)
        total = np.maximum(np.bincount(rows, weights=counts, minlength=len(own)), 1).astype(np.float32)
        yield _Block(
            data=np.log1p(counts / total[rows] * np.float32(typical)).astype(np.float32),
            columns=columns.astype(np.int32),
            per_cell=expressed.sum(axis=1, dtype=np.int64),
        )


def _positions(n_cells: int, rng: np.random.Generator) -> np.ndarray:
    n_columns = int(np.ceil(np.sqrt(n_cells)))
    row, column = np.divmod(np.arange(n_cells), n_columns)
    field = row // _FIELD_SITES * (n_columns // _FIELD_SITES + 1) + column // _FIELD_SITES
    order = np.lexsort((rng.random(n_cells), field))
    sites = np.stack([column[order], row[order]], axis=1) + 0.5
    return (sites + rng.uniform(-0.4, 0.4, sites.shape)) * _SPACING_UM


def _types(coordinates: np.ndarray, size: TissueSize, rng: np.random.Generator) -> np.ndarray:
    waves = rng.normal(0, 1 / _NICHE_UM, (size.n_types, 2, _N_WAVES)).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, (size.n_types, 1, _N_WAVES)).astype(np.float32)
    frequency = np.log(1 / (1 + 0.5 * np.arange(size.n_types)))
    types = np.empty(len(coordinates), dtype=np.int64)
    for start in range(0, len(coordinates), _BLOCK):
        own = coordinates[start : start + _BLOCK].astype(np.float32)
        field = np.sqrt(2 / _N_WAVES) * np.cos(own @ waves + phases).sum(axis=2).T
        # the largest of log density plus Gumbel noise is a draw in proportion to the densities
        score = frequency + _NICHE_CONTRAST * field + rng.gumbel(size=field.shape)
        types[start : start + _BLOCK] = score.argmax(axis=1)
    # a type too rare to be tested would change the number of tests with the size
    few = rng.choice(len(types), size=_FEWEST * size.n_types, replace=False)
    types[few] = np.tile(np.arange(size.n_types), _FEWEST)
    return types


def random_model(
    adata: AnnData, *, n_heads: int, head_size: int, n_neighbors: int, seed: int = 0, **dims: int
) -> TrainedAMICI:
    """Return an AMICI of amici-st's default sizes with random weights for a tissue's genes and types.

    How long an evaluation takes does not depend on the weights. Only a small tissue is needed; the model can then be
    evaluated on any other with the same genes and types.
    """
    import torch
    from amici import AMICI

    from amici_eval.model.checkpoint import TrainedAMICI
    from amici_eval.model.training import data_loader_restored

    own = adata.copy()
    if not isinstance(own.X, np.ndarray):
        own.X = own.X.toarray()
    with data_loader_restored(), torch.random.fork_rng():
        torch.manual_seed(seed)
        AMICI.setup_anndata(own, labels_key="cell_type", coord_obsm_key="spatial", n_neighbors=n_neighbors)
        model = AMICI(own, n_heads=n_heads, n_head_size=head_size, distance_kernel_unit_scale=10.0, **dims)
    model.module.eval()
    model.is_trained_ = True
    return TrainedAMICI.from_amici(model)


def few_of_each(adata: AnnData, per_type: int, *, labels_key: str = "cell_type") -> AnnData:
    """Return the first cells of each type: a small tissue with all genes and types."""
    rank = adata.obs.groupby(labels_key, observed=True).cumcount().to_numpy()
    return adata[np.flatnonzero(rank < per_type)].copy()

"""Sound files, made once; every case spoils a copy of one."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.conftest import ROOT, run_python
from tests.hostile.cases import Base

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData


@pytest.fixture(scope="session")
def base(amici_dir: Path, _tissue: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Base:
    import warnings

    import amici_eval
    from amici_eval.model.checkpoint import read_amici_directory
    from tests.builders import make_moments

    folder = tmp_path_factory.mktemp("sound")
    trained = read_amici_directory(amici_dir, adata=_tissue.copy(), trust=False)
    amici_eval.save_model(trained, folder / "model", adata=_tissue.copy())
    shutil.copytree(amici_dir, folder / "saved")
    tissue = _tissue.copy()
    tissue.uns["note"] = np.array(["kept"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tissue.write_h5ad(folder / "tissue.h5ad")
        tissue.write_zarr(folder / "tissue.zarr")
    make_moments().save(folder / "moments.npz")
    return Base(folder)


@pytest.fixture(scope="session")
def outcomes(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every case, all read in one process of bounded memory."""
    scratch = tmp_path_factory.mktemp("cases")
    told = scratch / "outcomes.jsonl"
    command = ("-m", "tests.hostile.run_cases", str(base.folder), str(scratch), str(told))
    done = run_python(*command, cwd=ROOT, OMP_NUM_THREADS="1")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    assert done.returncode == 0, f"after {len(lines)} cases: {done.stderr[-2000:]}"
    return {one["name"]: one for one in map(json.loads, lines)}

"""Train AMICI on a tissue and write what ``AMICI.save`` writes; put your own training in its place.

python train.py --data tissue.h5ad --output model --epochs 100 --seed 0 --held-out region=left_strip
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from amici_eval import from_anndata

LABELS_KEY = "cell_type"  # column of obs
COORD_OBSM_KEY = "spatial"  # key of obsm, micrometres
SETTINGS: dict[str, Any] = {
    "n_neighbors": 14,
    "batch_size": 128,
    "learning_rate": 3e-3,
    # a small model; leave out what shall have AMICI's own default
    "model_params": {
        "n_heads": 4,
        "n_head_size": 8,
        "n_query_dim": 64,
        "n_kv_dim": 64,
        "n_nn_embed": 64,
        "n_nn_embed_hidden": 64,
        "n_query_embed_hidden": 64,
        "n_pos_coef_mlp_hidden": 64,
        "distance_kernel_unit_scale": 10.0,
    },
}


def main() -> None:
    """Read the arguments, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="path or URI of a .h5ad or .zarr, log-normalised")
    parser.add_argument("--output", required=True, help="folder that is written, or overwritten")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", metavar="COLUMN=VALUE", help="cells that are not fitted on, such as a region")
    given = parser.parse_args()

    adata = from_anndata(given.data, backed=False).adata
    rows = None
    if given.held_out:
        column, _, value = given.held_out.partition("=")
        if column not in adata.obs:
            parser.error(f"--held-out: the data has no obs column {column!r}; it has {', '.join(adata.obs)}")
        held_out = (adata.obs[column].astype(str) == value).to_numpy()
        if not held_out.any() or held_out.all():
            parser.error(f"--held-out: {int(held_out.sum())} of {adata.n_obs} cells have {column}={value}")
        rows = np.flatnonzero(~held_out)
    # takes many seconds to import
    from amici_eval.model.training import train_amici

    # all cells stay neighbours; without --held-out a random tenth is held out
    model = train_amici(
        adata,
        labels_key=LABELS_KEY,
        coord_obsm_key=COORD_OBSM_KEY,
        seed=given.seed,
        max_epochs=given.epochs,
        train_indices=rows,
        **SETTINGS,
    )
    model.save(given.output, overwrite=True)
    fitted = adata.n_obs - len(model.validation_indices)
    print(f"{given.output}: trained for {given.epochs} epochs on {fitted} of {adata.n_obs} cells")  # noqa: T201, RUF100


if __name__ == "__main__":
    main()

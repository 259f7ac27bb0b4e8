"""The tables of a comparison, as files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amici_eval.report.csv_files import write_csv
from amici_eval.report.sentences import made_folder, unwritable

if TYPE_CHECKING:
    from pathlib import Path

    from amici_eval.results.comparison import HeadComparison

__all__ = ["write_comparison_tables"]


def write_comparison_tables(comparison: HeadComparison, directory: str | Path) -> tuple[Path, ...]:
    """Write ``tables/head_matches.csv``, ``head_differences.csv``, ``sender_differences.csv``, ``versions.csv`` and, of
    genes, a ``.parquet``.
    """
    folder = made_folder(made_folder(directory) / "tables")
    written = []
    for name, frame in (
        ("head_matches.csv", comparison.matches_frame()),
        ("head_differences.csv", comparison.differences_frame()),
        ("sender_differences.csv", comparison.senders_frame()),
        ("versions.csv", comparison.versions_frame()),
        ("gene_differences.parquet", comparison.gene_differences_frame()),
    ):
        path = folder / name
        try:
            if path.suffix == ".csv":
                write_csv(frame, path)
            else:
                frame.to_parquet(path, index=False)
        except OSError as error:
            raise unwritable(path, error) from error
        written.append(path)
    return tuple(written)

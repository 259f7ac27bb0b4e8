"""Settings of a comparison of heads across versions."""

from __future__ import annotations

from dataclasses import dataclass

from amici_eval.common.errors import InvalidSpecError

_CELLS = ("auto", "held_out", "all")


@dataclass(frozen=True, kw_only=True)
class ComparisonSpec:
    """How heads of two versions are matched, and when a difference counts.

    Parameters
    ----------
    cells
        ``held_out``: the cells that no compared version was fitted on; ``all``: all cells; ``auto``: the first where
        there are enough of them, else the second, said so.
    unmatched
        Heads that are not more alike than this are not the same head (similarity, 0 to 1).
    margin
        Differences of explained variance below this are too small to matter.
    n_permutations
        Of cells, and flips of tiles, behind the p of a match.
    n_flips
        Flips of tiles behind the p of a difference.
    n_bootstrap
        Resamples of tiles behind the intervals of differences.
    confidence
        Coverage of these intervals.
    alpha
        Level of significance.
    adjustment
        ``bh``, ``by`` or ``holm``: over all matched heads x types, and over all matched heads x types x genes.
    genes
        Also test differences gene by gene.
    floor
        Also match two untrained models of the architecture, to see how alike these are.
    seed
        What permutations, flips and resamples depend on.

    Raises
    ------
    InvalidSpecError
        If a value is not allowed.
    """

    cells: str = "auto"
    unmatched: float = 0.2
    margin: float = 0.01
    n_permutations: int = 999
    n_flips: int = 9999
    n_bootstrap: int = 1000
    confidence: float = 0.95
    alpha: float = 0.05
    adjustment: str = "bh"
    genes: bool = True
    floor: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("cells", _CELLS), ("adjustment", ("bh", "by", "holm"))):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidSpecError(
                    value=f"compare.{name}={value!r}",
                    rule=f"it must be one of {', '.join(allowed)}",
                    fix=f"choose one of these, or leave compare.{name} out",
                )
        for name, least, below in (
            ("unmatched", 0.0, 1.0),
            ("margin", 0.0, 1.0),
            ("confidence", 0.0, 1.0),
            ("alpha", 0.0, 1.0),
        ):
            value = getattr(self, name)
            inside = least <= value < below if name == "unmatched" else least < value < below
            if isinstance(value, bool) or not inside:
                raise InvalidSpecError(
                    value=f"compare.{name}={value!r}",
                    rule=f"it must lie between {least:g} and {below:g}",
                    fix=f"leave compare.{name} out for the default, {getattr(type(self), name)}",
                )
        for name, least_count in (("n_permutations", 19), ("n_flips", 19), ("n_bootstrap", 50), ("seed", 0)):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < least_count:
                raise InvalidSpecError(
                    value=f"compare.{name}={count!r}",
                    rule=f"it must be a whole number of at least {least_count}",
                    fix=f"leave compare.{name} out for the default, {getattr(type(self), name)}",
                )

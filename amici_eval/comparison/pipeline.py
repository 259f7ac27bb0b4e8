"""Compare the heads of several versions on the same cells: matches, new heads, and changes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.errors import DataError
from amici_eval.comparison.version_pairs import (
    differences_between,
    matches_between,
    similarity_of,
    unpaired_differences,
)
from amici_eval.evaluation.senders import sender_differences_between, unpaired_sender_differences
from amici_eval.results.comparison import (
    ComparedVersion,
    HeadComparison,
    HeadDifferences,
    HeadMatches,
    Lineage,
    Overall,
)
from amici_eval.results.evaluation import HeadEvaluation
from amici_eval.settings.comparison import ComparisonSpec
from amici_eval.stats.matching import assign_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float64

    from amici_eval.results.comparison import FailedVersion, SenderDifferences
    from amici_eval.results.moments import Moments


def compare(
    evaluations: Sequence[HeadEvaluation | str | Path],
    spec: ComparisonSpec | None = None,
    *,
    labels: Sequence[str] | None = None,
    run_ids: Sequence[str | None] | None = None,
    reused: Sequence[bool] | None = None,
    failed: Sequence[FailedVersion] = (),
    floor: Float64[np.ndarray, " heads"] | None = None,
    cells: str | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> HeadComparison:
    """Learn which heads of one version are those of the next, which are new or gone, and what got better or worse.

    Parameters
    ----------
    evaluations
        Of the versions, oldest first, on the same cells, by the factored engine; or folders that hold one each, which
        are read two at a time, so that memory does not grow with their number. All of one model on different data:
        the data sets are compared.
    spec
        Settings.
    labels
        Names of the columns; by default model name and version, or the name of the data.
    run_ids, reused, failed, cells, notes
        To be shown with the result: where the evaluations are, whether they were there before, what could not be
        evaluated, which cells these are, and remarks.
    floor
        Matched similarities of untrained models (:func:`matched_similarity`).
    progress
        Told how many pairs of versions are done, of how many, and which is next.

    Returns
    -------
    HeadComparison
        Matches and differences of consecutive versions, and heads through all of them.

    Raises
    ------
    DataError
        If there are fewer than two, they are of different cells, or no moments were kept of one.

    Notes
    -----
    Heads are matched by the correlation of their contributions, each kept alone, over cells and genes, both centred
    within cell types: the assignment with the largest sum of similarities above ``spec.unmatched``. Lineages follow
    these matches from version to version.
    The arguments are public and most are only shown with the result: they stay apart.
    """
    spec = spec or ComparisonSpec()
    n_versions = len(evaluations)
    if n_versions < 2:
        raise DataError(
            value=f"{n_versions} evaluation{'s' * (n_versions != 1)}",
            rule="a comparison needs at least two",
            fix="give two versions or more",
        )
    found = _PairByPair(spec=spec, notes=list(notes))
    first = previous = None
    kind = "versions"
    for position, given in enumerate(evaluations):
        evaluation = given if isinstance(given, HeadEvaluation) else HeadEvaluation.load(given)
        if first is None:
            first = evaluation
        elif position == 1:
            kind = _kind(first, evaluation)
        label = labels[position] if labels is not None else _label(evaluation, position)
        if progress is not None:
            progress(position, n_versions, label)
        run_id = None if run_ids is None else run_ids[position]
        was_there = False if reused is None else reused[position]
        found.versions.append(_compared(evaluation, label=label, run_id=run_id, reused=was_there))
        if kind == "versions":
            found.add_version(previous, evaluation)
        elif previous is not None:
            found.add_data_set(previous, evaluation)
        previous = evaluation
    if progress is not None:
        progress(n_versions, n_versions, "done")
    versions = found.versions
    if kind == "datasets" and labels is None:
        versions = [
            replace(version, label=str(version.data.get("name") or f"data {position + 1}"))
            for position, version in enumerate(versions)
        ]
    known = [flag for version in versions for flag in version.held_out]
    return HeadComparison(
        kind=kind,
        versions=_named_apart(versions),
        failed=tuple(failed),
        matches=tuple(found.matches),
        differences=tuple(found.differences),
        overall=tuple(found.overall),
        senders=tuple(found.senders),
        lineages=_lineages(versions, found.matches, found.similarity, kind),
        similarity=found.similarity,
        floor=floor,
        reseeded=found.reseeded() if kind == "versions" else np.zeros(0),
        unmatched=spec.unmatched,
        margin=spec.margin,
        alpha=spec.alpha,
        confidence=spec.confidence,
        seed=spec.seed,
        cells=cells or "all evaluated cells",
        in_sample=True if False in known else None if None in known else False,
        notes=tuple(found.notes),
    )


@dataclass(kw_only=True, eq=False, repr=False)
class _PairByPair:
    """What is found about consecutive evaluations; of earlier ones only the sampled cells are kept."""

    spec: ComparisonSpec
    notes: list[str]
    versions: list[ComparedVersion] = field(default_factory=list)
    matches: list[HeadMatches] = field(default_factory=list)
    differences: list[HeadDifferences] = field(default_factory=list)
    overall: list[Overall] = field(default_factory=list)
    senders: list[SenderDifferences] = field(default_factory=list)
    similarity: dict[tuple[int, int], Float64[np.ndarray, "before after"]] = field(default_factory=dict)
    samples: list[Moments] = field(default_factory=list)

    def add_version(self, previous: HeadEvaluation | None, evaluation: HeadEvaluation) -> None:
        """Compare the last version with the one before it, and the similarity of its heads with all before it."""
        position, label = len(self.versions) - 1, self.versions[-1].label
        moments = _moments_of(evaluation, label)
        if previous is not None:
            before = self.versions[-2]
            _check_same_cells(previous, evaluation, before.label, label)
            same_setup = _same_setup(before, self.versions[-1])
            pair = (position - 1, position)
            match = matches_between(previous, evaluation, pair, self.spec, reseeded=same_setup)
            self.matches.append(match)
            self._add(*differences_between(previous, evaluation, match, self.spec))
            self._add_senders(sender_differences_between(previous, evaluation, match, self.spec))
            self.notes += _what_differs(previous, evaluation, before.label, label)
        self.samples.append(moments.without_tiles())
        for earlier in range(position - 1):
            self.similarity[earlier, position] = similarity_of(self.samples[earlier], self.samples[-1])
        if previous is not None:
            self.similarity[position - 1, position] = self.matches[-1].similarity

    def add_data_set(self, previous: HeadEvaluation, evaluation: HeadEvaluation) -> None:
        """Compare the model on the last data set with the same model on the one before it."""
        position = len(self.versions) - 1
        before, after = self.versions[-2:]
        self._add(*unpaired_differences(before, after, position, self.spec))
        self._add_senders(unpaired_sender_differences(previous, evaluation, position, self.spec))

    def reseeded(self) -> Float64[np.ndarray, " matches"]:
        """Return matched similarities of all pairs of versions that were trained alike."""
        found = [
            matched_similarity(self.similarity[before, after])
            for before, after in combinations(range(len(self.versions)), 2)
            if _same_setup(self.versions[before], self.versions[after])
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def _add(self, differences: HeadDifferences, overall: Overall) -> None:
        self.differences.append(differences)
        self.overall.append(overall)

    def _add_senders(self, found: SenderDifferences | None) -> None:
        if found is not None:
            self.senders.append(found)


def matched_similarity(similarity: Float64[np.ndarray, "before after"]) -> Float64[np.ndarray, " matches"]:
    """Return the similarities of heads when all possible are matched, in descending order."""
    partner = assign_heads(similarity, unmatched=-1.0)
    has = np.flatnonzero(partner >= 0)
    return np.sort(similarity[has, partner[has]])[::-1]


def _kind(first: HeadEvaluation, second: HeadEvaluation) -> str:
    """Return whether two evaluations are of versions on the same cells or of one model on two data sets."""
    same_data = first.data.get("digest") == second.data.get("digest")
    names = [[one.model.get(key) for key in ("model_id", "name", "version")] for one in (first, second)]
    return "datasets" if names[0] == names[1] and any(names[0]) and not same_data else "versions"


def _label(evaluation: HeadEvaluation, position: int) -> str:
    model = evaluation.model
    if model.get("name"):
        return f"{model['name']} {model.get('version')}"
    return str(model.get("model_id") or f"model {position + 1}")


def _compared(evaluation: HeadEvaluation, *, label: str, run_id: str | None, reused: bool) -> ComparedVersion:
    found = evaluation.intervals
    nothing = np.full(evaluation.expl_var.shape, np.nan)
    return ComparedVersion(
        label=label,
        model=dict(evaluation.model),
        data=dict(evaluation.data),
        run_id=run_id,
        reused=reused,
        setup=evaluation.model.get("setup"),
        n_heads=evaluation.n_heads,
        cell_types=evaluation.cell_types,
        held_out=evaluation.held_out,
        n_cells=evaluation.n_cells,
        expl_var=evaluation.expl_var,
        low=nothing if found is None else found.low,
        high=nothing if found is None else found.high,
        p_value_adj=evaluation.adjusted,
        full=evaluation.expl_var_full,
        full_low=nothing[0] if found is None else found.full_low,
        full_high=nothing[0] if found is None else found.full_high,
        alpha=evaluation.spec.permutation.alpha,
        decided_by=evaluation.decided_by,
    )


def _named_apart(versions: Sequence[ComparedVersion]) -> tuple[ComparedVersion, ...]:
    """Number versions with the same label."""
    labels = [version.label for version in versions]
    return tuple(
        replace(version, label=f"{version.label} ({labels[:position].count(version.label) + 1})")
        if labels.count(version.label) > 1
        else version
        for position, version in enumerate(versions)
    )


def _same_setup(one: ComparedVersion, other: ComparedVersion) -> bool:
    return one.setup is not None and one.setup == other.setup


def _moments_of(evaluation: HeadEvaluation, label: str) -> Moments:
    if evaluation.moments is None:
        raise DataError(
            value=f"{label}: no moments were kept ({evaluation.engine} engine)",
            rule="heads are matched by what the factored engine keeps of its pass over the cells",
            fix="evaluate it with ablation.engine=factored, on data with coordinates",
        )
    return evaluation.moments


def _check_same_cells(before: HeadEvaluation, after: HeadEvaluation, *labels: str) -> None:
    digests = [one.data.get("digest") for one in (before, after)]
    if None not in digests and digests[0] != digests[1]:
        raise DataError(
            value=f"{labels[0]} was evaluated on data {digests[0]}, {labels[1]} on {digests[1]}",
            rule="versions are compared on the same cells",
            fix="evaluate both on the same data; several data sets are compared for one and the same model",
        )
    one, other = before.moments, after.moments
    if one is not None and other is not None:
        same = one.tile_center.shape == other.tile_center.shape
        if not same or not np.allclose(one.tile_center, other.tile_center):
            raise DataError(
                value=f"{labels[0]} and {labels[1]} were cut into other tiles of tissue",
                rule="differences are told tile by tile; tiles follow from the cells and the number of cell types",
                fix="evaluate both on the same cells, of types that both models know",
            )
        for cell_type in set(before.cell_types) & set(after.cell_types):
            if not np.array_equal(_cells_by_tile(one, cell_type), _cells_by_tile(other, cell_type)):
                raise DataError(
                    value=f"cells of {cell_type} in {labels[0]} and in {labels[1]} lie in other tiles of tissue",
                    rule="versions are compared on the same cells, of the same types",
                    fix="evaluate both with the same data.labels_key",
                )
    there = dict(zip(after.cell_types, after.n_cells.tolist(), strict=True))
    for cell_type, n_cells in zip(before.cell_types, before.n_cells.tolist(), strict=True):
        if there.get(cell_type, n_cells) != n_cells:
            raise DataError(
                value=f"{n_cells} cells of {cell_type} in {labels[0]}, {there[cell_type]} in {labels[1]}",
                rule="versions are compared on the same cells",
                fix="evaluate both with the same data.subset",
            )


def _cells_by_tile(moments: Moments, cell_type: str) -> Float64[np.ndarray, " tiles"]:
    own = moments.row_type == moments.cell_types.index(cell_type)
    return np.bincount(moments.row_tile[own], weights=moments.n_cells[own], minlength=len(moments.tile_center))


def _what_differs(before: HeadEvaluation, after: HeadEvaluation, *labels: str) -> list[str]:
    """Return notes on genes and types that only one has, which are not compared, and on numbers of heads."""
    said = []
    for what, one, other in (
        ("genes", before.genes, after.genes),
        ("cell types", before.cell_types, after.cell_types),
    ):
        only = [[name for name in own if name not in set(others)] for own, others in ((one, other), (other, one))]
        said += [
            f"{len(names)} {what} of {label} are not in {unlike} and were left out of their comparison: {_some(names)}"
            for names, label, unlike in zip(only, labels, reversed(labels), strict=True)
            if names
        ]
    if before.n_heads != after.n_heads:
        said.append(f"{labels[0]} has {before.n_heads} heads, {labels[1]} has {after.n_heads}")
    return said


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _lineages(
    versions: Sequence[ComparedVersion],
    matches: Sequence[HeadMatches],
    similarity: Mapping[tuple[int, int], Float64[np.ndarray, "before after"]],
    kind: str,
) -> tuple[Lineage, ...]:
    """Return the lineage of each head through the versions."""
    n_versions = len(versions)
    if kind == "datasets":
        return tuple(Lineage(heads=(head,) * n_versions, stability=1.0) for head in range(versions[0].n_heads))
    chains: list[dict[int, int]] = [{0: head} for head in range(versions[0].n_heads)]
    alive = dict(enumerate(chains))
    for match in matches:
        after = {}
        for head, partner in enumerate(match.partner.tolist()):
            if partner >= 0:
                after[partner] = alive[head]
                alive[head][match.after] = partner
        for head in match.new:
            after[head] = {match.after: head}
            chains.append(after[head])
        alive = after
    pairs = list(combinations(range(n_versions), 2))

    def stability(chain: Mapping[int, int]) -> float:
        values = [
            float(similarity[one, other][chain[one], chain[other]]) if one in chain and other in chain else 0.0
            for one, other in pairs
        ]
        return float(np.mean(np.nan_to_num(values))) if values else math.nan

    return tuple(
        Lineage(heads=tuple(chain.get(position) for position in range(n_versions)), stability=stability(chain))
        for chain in chains
    )

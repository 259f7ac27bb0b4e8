"""The section of the page on senders: the links from senders to receivers whose loss costs a head most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amici_eval.common.text import printable
from amici_eval.report.markup import cell, row, section, table
from amici_eval.report.sentences import adjustment_text, effect, in_sample_text, interval, p_text, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int64

    from amici_eval.results.evaluation import HeadEvaluation

_MOST_ROWS = 30


def senders_section(evaluation: HeadEvaluation) -> str:
    """Return the links with an interval above 0, the largest losses first; nothing if senders were not computed."""
    found = evaluation.senders
    if found is None:
        return ""
    links = sure_links(evaluation, range(len(evaluation.cell_types)))
    n_tests = int(np.count_nonzero(~np.isnan(found.p_value)))
    if not len(links):
        why = (
            "no link could be tested"
            if not n_tests
            else f"of {n_tests:,} links none has an interval above 0 and a head that explains something"
        )
        return section("senders", "Who talks to whom", f"<p>No sender stands out: {why}.</p>")
    alpha = evaluation.spec.permutation.alpha
    header = ["Receiver type", "Sender type", "Head", "Attention", "EV, head", "EV lost", "Interval", "Adjusted p"]
    header += ["Gene that loses most", "EV lost, that gene", "Distance to a tenth", "Receivers with such a neighbour"]
    rows = []
    for head, receiver, sender in links[:_MOST_ROWS].tolist():
        at = head, receiver, sender
        best, adjusted = int(found.best_gene[at]), float(found.p_value_adj[at])
        rows.append(
            row(
                evaluation.cell_types[receiver],
                [
                    cell(found.senders[sender], words=True),
                    cell(head),
                    cell(effect(float(found.attention[at]))),
                    cell(effect(float(evaluation.expl_var[head, receiver]))),
                    cell(effect(float(found.effect[at]))),
                    cell(interval(found.low[at], found.high[at])),
                    cell(f"{p_text(adjusted)}{' *' if adjusted <= alpha else ''}"),
                    cell("" if best < 0 else printable(evaluation.genes[best], longest=24), words=True),
                    cell(effect(float(found.effect_best_gene[at]))),
                    cell("–" if np.isnan(found.distance[at]) else rounded(float(found.distance[at]))),
                    cell(f"{found.n_receivers[receiver, sender]:,}"),
                ],
            )
        )
    some = f"The {len(rows)} largest of {len(links):,}" if len(links) > len(rows) else f"All {len(rows)}"
    caption = (
        f"{some} losses with a {100 * found.confidence:g} % interval above 0, of heads that explain something "
        f"there{in_sample_text(evaluation)}. EV, head: of the head kept alone. EV lost: "
        "explained variance, over all genes, of the head kept alone minus the same with all neighbours of the sender "
        "type masked out, so that the other neighbours share the attention; it may exceed the first, for the masked "
        "head can be worse than no head. Attention: its mean over the cells of the "
        f"receiver type. * adjusted p ≤ {alpha:g}: that the head explains as much without them in every tile of tissue "
        f"(signs flipped), one family of {n_tests:,} tests, all heads x receivers x senders "
        f"({adjustment_text(evaluation, null='lag')}). The gene is the winner of many: a lead. Distance to a tenth: "
        "over which attention to such a sender falls to a tenth, in units of the coordinates. It says what the model "
        "reads where, not what causes it. All links are in tables/senders.csv, single genes in "
        "tables/sender_genes.parquet."
    )
    return section("senders", "Who talks to whom", table(header, rows, caption))


def sure_links(evaluation: HeadEvaluation, rows: Sequence[int]) -> Int64[np.ndarray, "links three"]:
    """Return (head, receiver, sender) of losses with an interval above 0, the largest losses first.

    Only of heads that explain something when kept alone: the model was not trained with senders masked out, and a head
    that explains nothing may become worse by the masking itself.
    """
    found = evaluation.senders
    if found is None:
        return np.zeros((0, 3), dtype=np.int64)
    shown = np.zeros(found.effect.shape, dtype=bool)
    shown[:, list(rows)] = True
    places = np.argwhere((found.low > 0.0) & shown & (evaluation.expl_var > 0.0)[:, :, None])
    order = np.argsort(-found.effect[tuple(places.T)], kind="stable")
    links: Int64[np.ndarray, "links three"] = places[order]
    return links

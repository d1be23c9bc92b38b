"""What people ask of a checkpoint: how much can be dropped, where it is dropped, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wina_calib.budgets import Cells
from wina_calib.checkpoint.evaluation_file import read_evaluation
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.reader import Checkpoint
from wina_calib.checkpoint.verdict import A_FIRST_LOOK, ASKED_RISES, HELD_OUT, SHOWN, HeldOut, Verdict
from wina_calib.common.text import percent, rise, share, table, whole
from wina_calib.model.architecture import SITES

_SAME = 0.005  # shares that differ by less are told as one


@dataclass(frozen=True)
class Answer:
    """A question, what is said to it, and the figures."""

    question: str  # in words
    says: str  # the answer in a sentence or two
    headers: tuple[str, ...]  # of the columns of figures
    rows: tuple[tuple[str, ...], ...]  # figures as text

    def text(self) -> str:
        """For a terminal."""
        shown = [table(self.headers, self.rows)] if self.rows else []
        return "\n\n".join([f"{self.question}\n{self.says}", *shown])


def answers(opened: Checkpoint) -> tuple[Answer, ...]:
    """The three answers, from what the checkpoint holds."""
    cells = stored_cells(opened.architecture, opened.settings)
    held = HeldOut.from_dict(opened.settings.provenance.get(HELD_OUT))
    return how_much(opened, cells, held), where(opened, cells), what_it_costs(opened, cells, held)


def how_much(opened: Checkpoint, cells: Cells, held: HeldOut | None) -> Answer:
    """The sparsity for a rise of perplexity, and the rise at the sparsity that the checkpoint has."""
    question = "How much can I drop?"
    verdict = Verdict.from_facts(opened.settings.provenance)
    if held is None or verdict is None:
        says = (
            "The sparse model was not measured on held-out text when this was calibrated. Calibrate again to know it."
        )
        return Answer(question, says, (), ())
    source = "predicted from the loss curves"
    if held.tokens:
        source = f"measured on {held.tokens:,} tokens that nothing was fitted on"
    says = f"At {share(verdict.sparsity)}, which it is set to, perplexity rises by about {percent(verdict.rise)}: {source}."
    if verdict.quantizing:
        says += f" That is over the original model. {verdict.alone}."
    if verdict.warning is not None and verdict.reaches("0.05"):
        says += f" That is much; {share(whole(held.sparsity_for(0.05)))} costs about 5 %."
    if verdict.quick:
        says += f" It is {A_FIRST_LOOK}."
    most = held.rise_at(held.anchors[-1])  # beyond that rise more may be dropped than was fitted
    rows = tuple(
        (f"+{percent(r, 0)}", *_at(opened, cells, whole(held.sparsity_for(r)), more=most < r))
        if held.sparsity_for(r) > 0 or not verdict.quantizing
        else (f"+{percent(r, 0)}", "none", "-", "-")
        for r in ASKED_RISES
    )
    return Answer(question, says, ("perplexity", "dropped", "bytes read", "times as fast by that"), rows)


def where(opened: Checkpoint, cells: Cells) -> Answer:
    """The share that each site drops on average, and the layers that drop least and most."""
    question, sparsity = "Where is it dropped?", opened.settings.sparsity
    shares = np.asarray(opened.sparsities(sparsity))
    layers = np.average(shares, axis=1, weights=cells.weights)
    rows = tuple(
        (
            name,
            percent(float(column.mean())),
            f"{percent(float(column.min()))} in layer {int(column.argmin())}",
            f"{percent(float(column.max()))} in layer {int(column.argmax())}",
        )
        for name, column in zip(SITES, shares.T, strict=True)
    )
    if shares.max() - shares.min() < _SAME:
        says = f"The same share, {percent(float(shares.mean()))}, at every site of every layer."
    else:
        means = shares.mean(axis=0)
        most, least = int(means.argmax()), int(means.argmin())
        says = (
            f"Most at {SITES[most]} ({percent(float(means[most]))} of its inputs), least at {SITES[least]} "
            f"({percent(float(means[least]))}). Of the layers, {int(layers.argmax())} drops most "
            f"({percent(float(layers.max()))} of its weights' inputs) and {int(layers.argmin())} least "
            f"({percent(float(layers.min()))}): dropping there is felt most."
        )
    return Answer(question, says, ("site", "dropped", "least", "most"), rows)


def what_it_costs(opened: Checkpoint, cells: Cells, held: HeldOut | None) -> Answer:
    """The rise of perplexity and the bytes read at several sparsities, and what `evaluate` has measured."""
    measured = read_evaluation(opened.folder)
    if measured is None:
        says = f"`wina-calib evaluate {opened.folder.name} --save` measures it on text of your own."
    else:
        own_weights = opened.settings.weights_name
        over = "" if own_weights is None else f" over its own {own_weights} weights at sparsity 0"
        says = (
            f"Measured by evaluate: {rise(measured['sparse_ppl'], measured['dense_ppl'])}{over} at "
            f"{percent(measured['model_sparsity'])}, {percent(measured['read_fraction'])} of the bytes read, on "
            f"{measured['tokens']:,} tokens of {', '.join(map(str, measured['data']))}."
        )
    own = opened.settings.sparsity
    rows = tuple(
        (*_at(opened, cells, s), "-" if held is None else f"+{percent(held.rise_at(s))}")
        for s in sorted({*SHOWN, own} - {0.0})
    )
    return Answer(
        "What does it cost?", says, ("dropped", "bytes read", "times as fast by that", "perplexity expected"), rows
    )


def _at(opened: Checkpoint, cells: Cells, sparsity: float, *, more: bool = False) -> tuple[str, str, str]:
    """A sparsity, the share of bytes that is read there, and how many times as fast decoding can be by that alone."""
    read = cells.read_fraction_at(opened.dropped(sparsity))
    return share(sparsity) + " or more" * more, percent(read, 0), f"{1 / read:.2f}"

"""Budgets and thresholds of one calibrated model put on another, and what that costs against the other's own calibration.

Layers are matched by relative depth, `(index + 1/2) / layers`. A budget is carried over as site sparsities, which are the
quantiles of scores that thresholds lie at: each model's scores have a scale of their own, so that a threshold's value means
little elsewhere, and its quantile much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.budgets import Budget, BudgetFile, Cells, explicit
from wina_calib.budgets.anchors import spread
from wina_calib.budgets.count import count_cells, model_key
from wina_calib.budgets.model import Floats
from wina_calib.calibration.fit_layer import dense_tables
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.checkpoint.dequantized import open_weights, weights_of
from wina_calib.checkpoint.format import stored_cells
from wina_calib.checkpoint.local_paths import data_here
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.devices import pick_device, pick_dtype
from wina_calib.common.progress import SILENT, Estimate, Part, Progress
from wina_calib.common.text import percent, rise, table
from wina_calib.corpus.blocks import Blocks, load_blocks
from wina_calib.corpus.sources import EVALUATED_TOKENS, Data, data_specs
from wina_calib.errors import UsageError
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.thresholds import threshold_at, threshold_between
from wina_calib.model.architecture import SITES
from wina_calib.model.locate import load_tokenizer, resolve, weights_folder
from wina_calib.runtime.load import set_sparsity, sparse_sites
from wina_calib.studies.defaults import TRANSFER_SAMPLES
from wina_calib.studies.evaluate import Measured, dense_states, evaluation_blocks, load_on, measure, set_budget

WAYS: Mapping[str, tuple[str, str]] = {
    "native": ("its own budget and thresholds", "its own calibration"),
    "uniform": ("the same sparsity everywhere, its own thresholds", "its own score tables"),
    "budget": ("the source's budget, its own thresholds", "its own score tables"),
    "quantile": (
        "the source's budget, thresholds at these quantiles of its dense scores",
        "one dense pass over few blocks",
    ),
    "values": ("the source's thresholds as they are", "nothing"),
}
_SCORES, _MEASURE = "run the dense model", "transfer"


@dataclass(frozen=True)
class Row:
    """The target at one sparsity with what one way gives it."""

    way: str  # one of `WAYS`
    sparsity: float  # model sparsity asked for
    model_sparsity: float  # achieved
    ppl: float  # perplexity
    native_ppl: float  # perplexity of the target's own calibration at this sparsity
    kl: float  # KL divergence from the dense prediction, nats a token
    top1_agreement: float  # share of tokens with the same most likely next token as the dense model


@dataclass(frozen=True)
class Likeness:
    """How alike two budgets are at one sparsity: mean distance of the site sparsities, weighted by size, and correlation."""

    sparsity: float
    distance: float
    correlation: float


@dataclass(frozen=True)
class Transfer:
    """A finished transfer."""

    source: str  # checkpoint that gives
    target: str  # checkpoint that takes
    dense_ppl: float  # the target's perplexity at sparsity 0
    tokens: int  # predicted tokens
    data: tuple[str, ...]  # what text they are of
    samples: int  # blocks of the dense pass
    rows: tuple[Row, ...]  # by sparsity, then way
    budgets: tuple[Likeness, ...]  # likeness of the source's budget and the target's own
    skipped: dict[str, str]  # ways that were not possible, and why

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def transfer(
    source: str | Path,
    target: str | Path,
    *,
    sparsities: Sequence[float] = (),
    heldout: Data = None,
    tokens: int = EVALUATED_TOKENS,
    data: Data = (),
    samples: int = TRANSFER_SAMPLES,
    device: str = "auto",
    dtype: str = "auto",
    progress: Hearing = None,
) -> Transfer:
    """Measure a calibrated model with the budget and thresholds of another one. No folder is changed.

    Args:
        source: calibrated checkpoint that gives its budget and thresholds.
        target: calibrated checkpoint that takes them, and whose own calibration they are measured against.
        sparsities: model sparsities; the target's asked one by default.
        heldout: text to measure on.
        tokens: tokens to measure on.
        data: text of the dense pass; what the target was calibrated on by default.
        samples: blocks of the dense pass.
        device: compute device.
        dtype: compute dtype.
        progress: as `wina_calib.common.bars.hearing` takes it.

    Raises:
        UsageError: an option is out of range.
        WinaError: a checkpoint or text cannot be used.
    """
    giver, taker = (open_checkpoint(resolve(name)[0]) for name in (source, target))
    asked = tuple(sparsities) or (taker.settings.sparsity,)
    if samples < 1 or tokens < 2 or not all(0.0 < s < 1.0 for s in asked):
        raise UsageError(
            f"samples is {samples}, tokens {tokens}, sparsities {', '.join(map(str, asked))}; expected at least 1 and 2, "
            "and sparsities in (0, 1)."
        )
    place = pick_device(device)
    text = _dense_text(taker, data_specs(data), samples)
    blocks = evaluation_blocks(data_specs(heldout), load_tokenizer(taker.opened), tokens, taker.settings.seq_len)
    skipped = _impossible(giver, taker)
    ways = [way for way in WAYS if way not in skipped]
    layers, count = len(taker.architecture.layers), len(blocks.ids) * len(ways) * len(asked)
    fits = [Part(_SCORES, layers, text.tokens)] if "quantile" in ways else []
    with hearing(progress) as report:
        report.planned(Estimate((*fits, Part(_MEASURE, count, blocks.tokens * len(ways) * len(asked)))))
        dense_scores = _dense_scores(taker, text, place, dtype, report) if fits else []
        report.phase(_MEASURE, count)
        cells = stored_cells(taker.architecture, taker.settings)
        model = load_on(taker.opened, place, dtype)
        states = dense_states(model, blocks.ids)
        rows: list[Row] = []
        budgets: list[Likeness] = []
        for sparsity in asked:
            matched = matched_budget(giver, cells, sparsity)
            budgets.append(_likeness(sparsity, cells, matched, taker.sparsities(sparsity)))
            set_sparsity(model, sparsity)
            by_way: dict[str, Measured] = {}
            for way in ways:
                if way == "uniform":
                    set_budget(model, sparsity, np.full_like(matched, sparsity))
                elif way == "budget":
                    set_budget(model, sparsity, matched)
                elif way == "quantile":
                    _set_quantiles(model, matched, dense_scores)
                elif way == "values":
                    _set_values(model, giver, sparsity, matched)
                by_way[way] = measure(model, blocks, report, states)
            rows += [
                Row(way, sparsity, f.model_sparsity, f.ppl, by_way["native"].ppl, f.kl, f.top1_agreement)
                for way, f in by_way.items()
            ]
        return Transfer(
            source=str(source),
            target=str(target),
            dense_ppl=by_way["native"].dense_ppl,
            tokens=by_way["native"].tokens,
            data=blocks.data,
            samples=len(text.ids),
            rows=tuple(rows),
            budgets=tuple(budgets),
            skipped=skipped,
        )


def by_depth(values: Floats, layers: int) -> Floats:
    """Values (source layers, ...) at the relative depths of `layers` layers: linear between layers, the ends' beyond."""
    known, wanted = _depths(len(values)), _depths(layers)
    flat = values.reshape(len(values), -1)
    columns = [np.interp(wanted, known, column) for column in flat.T]
    return np.stack(columns, axis=1).reshape(layers, *values.shape[1:])


def matched_budget(giver: Checkpoint, cells: Cells, sparsity: float) -> Floats:
    """A checkpoint's site sparsities for another model: matched by depth, moved to exactly `sparsity` with its sizes.

    Returns:
        (layers, sites) of the model that takes it.
    """
    matched: Floats = spread([sparsity], cells, by_depth(giver.sparsities(sparsity), cells.layers))[0]
    return matched


def budget_file(source: str | Path, target: str | Path, sparsity: float | None = None) -> BudgetFile:
    """The source's budget as a budget file for the target, which may be a checkpoint or a model that is not calibrated.

    The sparsity is by default the one that the source was calibrated for.

    Raises:
        WinaError: one of both cannot be used.
    """
    giver = open_checkpoint(resolve(source)[0])
    opened = open_weights(weights_folder(resolve(target)[0]))
    asked = giver.settings.sparsity if sparsity is None else sparsity
    cells = count_cells(opened.architecture, "none")
    budget = Budget(matched_budget(giver, cells, asked))
    return explicit(budget, cells, model_key(opened.architecture, cells), asked, giver.settings.score)


def render(made: Transfer) -> str:
    """A transfer as text."""
    headers = [
        "sparsity", "way", "achieved", "perplexity", "over dense", "over native", "KL", "top-1", "needs of the target",
    ]  # fmt: skip
    rows = [
        [
            f"{r.sparsity:g}", r.way, f"{r.model_sparsity:.3f}", f"{r.ppl:.3f}", rise(r.ppl, made.dense_ppl),
            rise(r.ppl, r.native_ppl), f"{r.kl:.3f}", percent(r.top1_agreement), WAYS[r.way][1],
        ]
        for r in made.rows
    ]  # fmt: skip
    about = [f"{way}: {what}" for way, (what, _) in WAYS.items() if way not in made.skipped]
    alike = [
        f"budgets at {b.sparsity:g}: site sparsities differ by {b.distance:.3f} on average, "
        + (
            "no correlation with one that is uniform"
            if math.isnan(b.correlation)
            else f"correlation {b.correlation:+.2f}"
        )
        for b in made.budgets
    ]
    left = [f"{way}: left out. {reason}" for way, reason in made.skipped.items()]
    start = (
        f"{made.source} on {made.target}: dense perplexity {made.dense_ppl:.3f}, {made.tokens:,} tokens of "
        f"{', '.join(made.data)}; dense pass over {made.samples} blocks"
    )
    return "\n\n".join([start, table(headers, rows), "\n".join([*alike, *about, *left])])


def _impossible(giver: Checkpoint, taker: Checkpoint) -> dict[str, str]:
    mine, theirs = taker.settings, giver.settings
    if mine.select == "topk":
        reason = "The target keeps each token's highest scores and has no thresholds."
        return {"quantile": reason, "values": reason}
    asked = {n: (getattr(theirs, n), getattr(mine, n)) for n in ("score", "exponent", "masks", "select")}
    differing = [f"{name} {a} and {b}" for name, (a, b) in asked.items() if a != b]
    names = [[g.name for g in mine.rule.groups(s)] for s in taker.architecture.layers[0].sites]
    others = [[g.name for g in theirs.rule.groups(s)] for s in giver.architecture.layers[0].sites]
    if names != others and not differing:
        differing = ["mask groups"]
    return {"values": f"Thresholds of both are of different kinds: {'; '.join(differing)}."} if differing else {}


def _dense_text(taker: Checkpoint, data: tuple[str, ...], samples: int) -> Blocks:
    facts = taker.settings.provenance
    specs = data or data_here(facts)
    if not specs:
        raise UsageError(f"{taker.folder} does not say what text it was calibrated on. Give text with --data.")
    return load_blocks(
        specs,
        load_tokenizer(taker.folder),
        samples=samples,
        seq_len=taker.settings.seq_len,
        seed=int(facts.get("seed", 0)),
        min_tokens=1,
    )


def _dense_scores(
    taker: Checkpoint, text: Blocks, place: torch.device, dtype: str, progress: Progress
) -> list[dict[str, Tensor]]:
    """Score quantiles of every layer's mask groups, by `MaskGroup.key`, on the dense model's inputs."""
    source = weights_of(taker)
    progress.phase(_SCORES, len(source.architecture.layers))
    stream = LayerStream.of(source, text.ids, place, pick_dtype(dtype, source.dtype, place))
    return dense_scores(stream, taker.settings.rule, progress)


@torch.no_grad()
def dense_scores(stream: LayerStream, rule: MaskRule, progress: Progress = SILENT) -> list[dict[str, Tensor]]:
    """Score quantiles at `LEVELS` of every layer's mask groups, by `MaskGroup.key`, on the dense model's inputs."""
    hidden, quantiles = stream.embed(), []
    for index, module in stream.layers():
        with MaskedLayer(stream.source.architecture.layers[index], module, rule, stream.rotations(index)) as masked:
            sites = dense_tables(stream, masked, hidden)
        quantiles.append({key: table for tables in sites.values() for key, table in tables.items()})
        progress.step(f"layer {index + 1}")
    hidden.clear()
    return quantiles


def _set_quantiles(model: PreTrainedModel, budget: Floats, tables: Sequence[Mapping[str, Tensor]]) -> None:
    for site in sparse_sites(model):
        own = float(budget[site.layer, SITES.index(site.site.name)])
        site.set_thresholds(own, {g.name: threshold_at(tables[site.layer][g.key], own) for g in site.groups})


def _set_values(model: PreTrainedModel, giver: Checkpoint, sparsity: float, budget: Floats) -> None:
    anchors, own = giver.settings.anchors, giver.sparsities(sparsity)
    nearest = np.abs(_depths(len(own))[None] - _depths(len(budget))[:, None]).argmin(axis=1)
    for site in sparse_sites(model):
        at, column = int(nearest[site.layer]), SITES.index(site.site.name)
        layer = giver.architecture.layers[at]
        tables = giver.site(layer, layer.sites[column]).tables
        values = {n: threshold_between(t, anchors, sparsity, float(own[at, column])) for n, t in tables.items()}
        site.set_thresholds(float(budget[site.layer, column]), values)


def _depths(layers: int) -> Floats:
    return (np.arange(layers) + 0.5) / layers


def _likeness(sparsity: float, cells: Cells, one: Floats, other: Floats) -> Likeness:
    share = cells.weights / cells.sparse_total
    flat = bool(np.ptp(one) < 1e-9 or np.ptp(other) < 1e-9)
    correlation = float("nan") if flat else float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
    return Likeness(sparsity, float((share * np.abs(one - other)).sum()), correlation)

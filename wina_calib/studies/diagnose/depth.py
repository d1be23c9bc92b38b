"""How masks' errors grow through depth, and what is left of a model at extreme sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wina_calib.common.progress import SILENT, Progress
from wina_calib.common.text import percent, rise, table
from wina_calib.runtime.load import sparse_sites
from wina_calib.studies.defaults import DIAGNOSE_EXTREMES
from wina_calib.studies.diagnose.subject import Subject, only, thresholds_at, watch

BROKEN = 0.5  # relative error from which a hidden state says little of the dense one


@dataclass(frozen=True)
class LayerGrowth:
    """One layer in the error's growth; errors are relative, `||h - dense h|| / ||dense h||` of hidden states."""

    layer: int  # its index
    alone: float  # error after this layer where only it is sparse
    alone_end: float  # the same error after the last layer
    alone_kl: float  # KL divergence of the prediction where only this layer is sparse, nats a token
    accumulated: float  # error after this layer where all layers are sparse


@dataclass(frozen=True)
class Propagation:
    """Growth of the error through depth."""

    sparsity: float  # model sparsity asked for
    tokens: int  # predicted tokens
    kl: float  # KL divergence where all layers are sparse
    layers: tuple[LayerGrowth, ...]  # one entry a layer

    @property
    def kl_sum(self) -> float:
        """KL divergences of single sparse layers added up: `kl`, if layers did not matter to each other."""
        return sum(layer.alone_kl for layer in self.layers)

    @property
    def error_sum(self) -> float:
        """Errors of single layers at the end, added as independent ones: root of the sum of squares."""
        return float(np.sqrt(sum(layer.alone_end**2 for layer in self.layers)))

    def text(self) -> str:
        """A table for people."""
        rows = [
            [str(g.layer), *(f"{v:.4f}" for v in (g.alone, g.alone_end, g.alone_kl, g.accumulated))]
            for g in self.layers
        ]
        headers = ["layer", "alone, here", "alone, at the end", "alone, KL", "accumulated"]
        return (
            f"propagation at sparsity {self.sparsity:g}, {self.tokens:,} tokens: relative errors of hidden states\n\n"
            f"{table(headers, rows)}\n\n"
            f"at the end: accumulated {self.layers[-1].accumulated:.4f}, single layers as independent errors "
            f"{self.error_sum:.4f}; KL together {self.kl:.4f}, single layers added {self.kl_sum:.4f}"
        )


@dataclass(frozen=True)
class Extreme:
    """A model at one high sparsity."""

    sparsity: float  # model sparsity asked for
    fitted: bool  # whether thresholds were fitted at or above this sparsity; else the tables of the highest one serve
    model_sparsity: float  # achieved
    ppl: float  # perplexity
    dense_ppl: float  # perplexity at sparsity 0
    kl: float  # KL divergence from the dense prediction, nats a token
    top1_agreement: float  # share of tokens with the same most likely next token
    errors: tuple[float, ...]  # relative error of the hidden states after each layer
    breaks_at: int | None  # first layer after which that error is above `BROKEN`, or None
    worst_site: str  # `layer.site` whose achieved sparsity is farthest from the asked one
    worst_drift: float  # by how much, achieved less asked


def propagation(subject: Subject, sparsity: float, progress: Progress = SILENT) -> Propagation:
    """Measure each layer sparse alone, and all together."""
    sites = sparse_sites(subject.model)
    every = thresholds_at(subject.model, sparsity)
    count = len(subject.opened.architecture.layers)
    variants = {"all": every} | {str(layer): only(sites, every, layer) for layer in range(count)}
    progress.phase("propagation", len(subject.blocks.ids))
    watched = watch(subject, variants, progress)
    together = watched["all"]
    layers = tuple(
        LayerGrowth(layer, own.layers[layer], own.layers[-1], own.quality.kl, together.layers[layer])
        for layer, own in ((layer, watched[str(layer)]) for layer in range(count))
    )
    return Propagation(sparsity, together.quality.tokens, together.quality.kl, layers)


def extremes(
    subject: Subject, sparsities: Sequence[float] = DIAGNOSE_EXTREMES, progress: Progress = SILENT
) -> tuple[Extreme, ...]:
    """Measure a model at high sparsities: quality, achieved sparsity, and where hidden states lose the dense ones."""
    settings = {f"{s:g}": thresholds_at(subject.model, s) for s in sparsities}
    progress.phase("extremes", len(subject.blocks.ids))
    watched = watch(subject, settings, progress)
    sites = sparse_sites(subject.model)
    highest = subject.opened.settings.fitted_anchors[-1]
    rows = []
    for sparsity in sparsities:
        own, asked = watched[f"{sparsity:g}"], settings[f"{sparsity:g}"]
        drift = {
            f"{s.layer}.{s.site.name}": own.quality.sites[s.layer, s.site.name] - t.sparsity
            for s, t in zip(sites, asked, strict=True)
        }
        worst = max(drift, key=lambda name: abs(drift[name]))
        rows.append(
            Extreme(
                sparsity=sparsity,
                fitted=sparsity <= highest,
                **own.quality.figures(),
                errors=own.layers,
                breaks_at=next((i for i, error in enumerate(own.layers) if error > BROKEN), None),
                worst_site=worst,
                worst_drift=drift[worst],
            )
        )
    return tuple(rows)


def extremes_text(rows: Sequence[Extreme]) -> str:
    """Extremes as tables for people."""
    quality = [
        [
            f"{r.sparsity:g}", f"{r.model_sparsity:.3f}", "yes" if r.fitted else "no", f"{r.ppl:.2f}",
            rise(r.ppl, r.dense_ppl), f"{r.kl:.3f}", percent(r.top1_agreement),
            "nowhere" if r.breaks_at is None else f"layer {r.breaks_at}", f"{r.worst_site} {r.worst_drift:+.3f}",
        ]
        for r in rows
    ]  # fmt: skip
    headers = ["asked", "achieved", "fitted", "perplexity", "rise", "KL", "top-1", "breaks at", "site farthest off"]
    layers = [[str(i), *(f"{r.errors[i]:.3f}" for r in rows)] for i in range(len(rows[0].errors))]
    left = [f"{r.sparsity:g}" for r in rows if not r.fitted]
    remedy = (
        f"\n\nThresholds were not fitted as high as {', '.join(left)}. For a fair look calibrate with these in --grid."
        if left
        else ""
    )
    return (
        f"extremes\n\n{table(headers, quality)}\n\nrelative error of the hidden states after each layer, by sparsity asked\n\n"
        f"{table(['layer', *(f'{r.sparsity:g}' for r in rows)], layers)}{remedy}"
    )

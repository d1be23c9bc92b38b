"""The greedy search takes the steps of the papers' algorithm, with a small part of its work."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.greedy import HIGHEST, LAST_FRACTION, STEP, greedy
from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.corpus.blocks import load_blocks
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.score import scores
from wina_calib.masks.thresholds import LEVELS, threshold_at
from wina_calib.model.source import open_source

ANCHORS = (0.1, 0.2)


def open_stream(folder: str, ids: torch.Tensor) -> LayerStream:
    return LayerStream(open_source(folder), ids, Compute(torch.device("cpu"), torch.float32, 2))


def some_ids() -> torch.Tensor:
    return torch.randint(4, 300, (3, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def papers_rows(stream: LayerStream, rule: MaskRule) -> np.ndarray:
    """Every candidate of every step by a run of the whole layer on all tokens."""
    arch = stream.source.architecture
    rows = []
    hidden = [stream.embed()[i] for i in range(len(stream.batches))]
    for index, module in stream.layers():
        layer = arch.layers[index]
        histograms = {}
        with MaskedLayer(layer, module, rule, {}) as masked:

            def observe(site, x, masked=masked, histograms=histograms):
                for group in masked.groups[site]:
                    found = histograms.setdefault(group.key, ScoreHistogram())
                    found.update(scores(x[:, 1:], masked.norms[group.key]))

            def outputs(sparsities, masked=masked, histograms=histograms, layer=layer, hidden=tuple(hidden)):
                masked.cuts = {
                    group.key: torch.tensor(threshold_at(histograms[group.key].quantiles(LEVELS).float(), s))
                    for site, s in zip(layer.sites, sparsities, strict=True)
                    for group in masked.groups[site.name]
                    if histograms
                }
                return [masked.run(h, stream.kwargs(layer.index, i)) for i, h in enumerate(hidden)]

            masked.observe = observe
            target = [masked.run(h, stream.kwargs(index, i)) for i, h in enumerate(hidden)]
            masked.observe = None
            first = int(32 * (1 - LAST_FRACTION))

            def error(sparsities, outputs=outputs, target=target, first=first):
                norms = [
                    (out - t)[:, first:].norm(dim=1).flatten()
                    for out, t in zip(outputs(sparsities), target, strict=True)
                ]
                return float(torch.cat(norms).mean())

            sizes = np.array([site.weights for site in layer.sites])
            steps = STEP * arch.hidden_size**2 / sizes
            current, path = np.zeros(4), [np.zeros(5)]
            while path[-1][0] < ANCHORS[-1]:
                tried = {}
                for i in range(4):
                    if current[i] + steps[i] <= HIGHEST:
                        tried[i] = error(current + steps[i] * np.eye(4)[i])
                best = min(tried, key=tried.__getitem__)
                current = current + steps[best] * np.eye(4)[best]
                path.append(np.array([sizes @ current / sizes.sum(), *current]))
            table = np.array(path)
        rows.append([[np.interp(a, table[:, 0], table[:, i]) for i in range(1, 5)] for a in ANCHORS])
        hidden = target
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize(
    ("family", "masks"), [("llama", "shared"), ("llama", "per-projection"), ("gemma2", "shared"), ("phi3", "shared")]
)
def test_search_takes_the_papers_steps(family: str, masks: str, tmp_path: Path) -> None:
    tiny.save(family, tmp_path / "m", num_hidden_layers=2)
    rule = MaskRule(masks=masks)
    found = greedy(open_stream(str(tmp_path / "m"), some_ids()), rule, ANCHORS, lazy=False)
    np.testing.assert_allclose(found.rows, papers_rows(open_stream(str(tmp_path / "m"), some_ids()), rule), atol=1e-9)


def test_lazy_search_is_near(llama: Path) -> None:
    exact = greedy(open_stream(str(llama), some_ids()), MaskRule(), ANCHORS, lazy=False)
    lazy = greedy(open_stream(str(llama), some_ids()), MaskRule(), ANCHORS)
    layer = open_source(str(llama)).architecture.layers[0]
    step = np.array([STEP * 64**2 / site.weights for site in layer.sites])
    assert (np.abs(lazy.rows - exact.rows) <= step + 1e-9).all()
    assert lazy.cost.passes < exact.cost.passes
    assert lazy.cost.reference == 7 * lazy.cost.steps


@pytest.mark.slow
def test_a_tenth_of_the_papers_work_gives_their_result() -> None:
    source = open_source("demo")
    ids = load_blocks(("builtin",), source.tokenizer(), samples=4, seq_len=256, seed=0, min_tokens=1).ids
    exact = greedy(open_stream("demo", ids), MaskRule(), (0.25, 0.5, 0.65), lazy=False)
    lazy = greedy(open_stream("demo", ids), MaskRule(), (0.25, 0.5, 0.65))
    step = np.array([STEP * 256**2 / site.weights for site in source.architecture.layers[0].sites])
    assert (np.abs(lazy.rows - exact.rows) <= step + 1e-9).all()
    assert lazy.cost.passes < lazy.cost.reference / 10


def test_every_layer_ends_at_the_asked_sparsity(llama: Path) -> None:
    found = greedy(open_stream(str(llama), some_ids()), MaskRule(), (0.05, 0.13, 0.2))
    layer = open_source(str(llama)).architecture.layers[0]
    sizes = np.array([site.weights for site in layer.sites])
    for row, anchor in zip(found.rows, (0.05, 0.13, 0.2), strict=True):
        np.testing.assert_allclose(row @ sizes / sizes.sum(), anchor, atol=1e-9)
    assert (np.diff(found.rows, axis=0) >= 0).all()

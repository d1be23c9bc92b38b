"""Curves from the streamed backward pass are those of the full model's own gradients, and predict what is measured."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import SHARED, needs_shared
from stream_cases import open_stream, some_ids

from wina_calib.budgets import Curves
from wina_calib.calibration.dropped_levels import CURVE_LEVELS, dropped_sums, first_dropped
from wina_calib.calibration.layer_stream import Head, LayerStream
from wina_calib.calibration.likelihood import label_generator
from wina_calib.calibration.loss_curves import MAX_TOKENS, REFERENCE, LossCurves, measure_curves, usable_tokens
from wina_calib.calibration.run import calibrate
from wina_calib.common.devices import fixed_order
from wina_calib.errors import NumericError
from wina_calib.masks.histogram import ScoreHistogram
from wina_calib.masks.rule import MaskRule
from wina_calib.masks.score import scores
from wina_calib.model.source import Source


def expected_curves(model: torch.nn.Module, stream: LayerStream, rule: MaskRule, seed: int) -> torch.Tensor:
    """The same by the whole model at once, one product at a time: divergence and first order (2, layers, sites, levels)."""
    ids = torch.cat(stream.batches)
    tapped: dict[tuple[int, str, str], torch.Tensor] = {}
    arch = stream.source.architecture
    handles = []
    for layer in arch.layers:
        for site in layer.sites:
            for group in rule.groups(site):
                key = (layer.index, site.name, group.name)

                def hook(_, args, key=key, first=group.projections[0], group=group):
                    if group.projections.index(first) == 0 and key not in tapped:
                        tapped[key] = args[0].view_as(args[0])
                    return (tapped[key],)

                for projection in group.projections:
                    module = model.get_submodule(layer.prefix + projection.module)
                    handles.append(module.register_forward_pre_hook(hook))
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits.float()
    losses = [torch.zeros(()), torch.zeros(())]
    for block, (row, text) in enumerate(zip(logits, ids, strict=True)):
        generator = label_generator(seed, block, stream.device)
        labels = torch.multinomial(row.detach().softmax(-1), 1, generator=generator)[:, 0]
        losses[0] = losses[0] + torch.nn.functional.cross_entropy(row, labels, reduction="sum")
        losses[1] = losses[1] + torch.nn.functional.cross_entropy(row[:-1], text[1:], reduction="sum")
    gradients = [
        dict(zip(tapped, torch.autograd.grad(loss, list(tapped.values()), retain_graph=True), strict=True))
        for loss in losses
    ]
    for handle in handles:
        handle.remove()
    out = torch.zeros(2, len(arch.layers), 4, len(CURVE_LEVELS), dtype=torch.float64)
    for layer in arch.layers:
        for s, site in enumerate(layer.sites):
            dropped = torch.zeros(2, ids.shape[0], ids.shape[1] - 1, len(CURVE_LEVELS))
            for group in rule.groups(site):
                key = (layer.index, site.name, group.name)
                x = tapped[key].detach()[:, 1:]
                weights = [model.get_submodule(layer.prefix + p.module).weight for p in group.projections]
                score = scores(x, rule.norm(group, weights), rule.score)
                histogram = ScoreHistogram()
                histogram.update(score)
                levels = torch.tensor(CURVE_LEVELS[1:], dtype=torch.float64)
                for i, threshold in enumerate(histogram.quantiles(levels).float(), 1):
                    for part, by_label in zip(dropped, gradients, strict=True):
                        part[..., i] += (by_label[key][:, 1:] * x * (score <= threshold)).sum(-1)
            out[0, layer.index, s] = dropped[0].double().square().sum((0, 1)) / (2 * ids.numel())
            out[1, layer.index, s] = -dropped[1].double().sum((0, 1)) / ids.numel()
    return out


@pytest.mark.parametrize(
    ("family", "masks"),
    [("llama", "shared"), ("llama", "per-projection"), ("gemma2", "shared"), ("phi3", "shared"), ("olmo2", "shared")],
)
def test_streamed_curves_are_the_full_models(family: str, masks: str, tmp_path: Path) -> None:
    # In olmo2 the sites read the raw residual stream, whose shortcut must not count.
    model = tiny.save(family, tmp_path / "m")
    rule = MaskRule(masks=masks)
    stream = open_stream(tmp_path / "m", some_ids())
    curves = measure_curves(stream, rule, seed=3)
    divergence, first = expected_curves(model, stream, rule, seed=3)
    found = torch.from_numpy(curves.divergence.loss.copy())
    torch.testing.assert_close(found, divergence.cummax(-1).values, rtol=2e-3, atol=1e-9)
    first = first[..., CURVE_LEVELS.index(REFERENCE)]
    torch.testing.assert_close(torch.from_numpy(curves.first_order), first, rtol=2e-3, atol=1e-6)
    assert curves.tokens == 60


def test_hidden_states_on_disk_give_the_same_curves(llama: Path, tmp_path: Path) -> None:
    kept = measure_curves(open_stream(llama, some_ids()), MaskRule(), seed=0)
    spilled = measure_curves(open_stream(llama, some_ids(), spill=tmp_path), MaskRule(), seed=0)
    assert (kept.divergence.loss == spilled.divergence.loss).all()
    assert (kept.first_order == spilled.first_order).all()


def test_labels_follow_the_seed(llama: Path) -> None:
    first, again, other = (measure_curves(open_stream(llama, some_ids()), MaskRule(), seed=seed) for seed in (0, 0, 1))
    assert (first.divergence.loss == again.divergence.loss).all()
    assert (first.divergence.loss != other.divergence.loss).any()
    assert (first.first_order == other.first_order).all()  # the text's own labels


def test_the_first_order_part_counts_as_far_as_its_noise_allows() -> None:
    levels = np.array(CURVE_LEVELS)
    divergence = Curves(levels, np.tile(0.01 * levels**2, (1, 4, 1)))
    first = np.array([0.5, -0.5, -5.0, 0.0]) * divergence.loss[..., CURVE_LEVELS.index(REFERENCE)]
    for tokens, trusted in ((10**9, 1.0), (1, 0.0)):
        loss = LossCurves(divergence, first, tokens).loss.loss / np.maximum(divergence.loss, 1e-30)
        expected = 1 + trusted * np.array([0.5, -0.5, -0.75, 0.0])  # a rise is never taken for none at all
        np.testing.assert_allclose(loss[0, :, 1:], np.tile(expected[:, None], len(levels) - 1), atol=2e-3)
    nothing = LossCurves(Curves(levels, np.zeros_like(divergence.loss)), np.zeros_like(first), 100).loss
    assert (nothing.loss == 0).all()


def test_less_than_half_of_the_calibration_tokens() -> None:
    assert usable_tokens(8192) == 3686
    assert usable_tokens(10**6) == MAX_TOKENS


def test_every_layer_is_loaded_once_forward_and_once_backward_and_lm_head_once(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, parts = [], []
    load_layer, heads = Source.load_layer, LayerStream.heads

    def counted(stream: LayerStream) -> Iterator[tuple[int, Head]]:
        for first, head in heads(stream):
            parts.append(first)
            yield first, head

    monkeypatch.setattr(Source, "load_layer", lambda self, index: layers.append(index) or load_layer(self, index))
    monkeypatch.setattr(LayerStream, "heads", counted)
    monkeypatch.setattr("wina_calib.calibration.layer_stream._PART_ROWS", 200)
    stream = open_stream(llama, some_ids())
    measure_curves(stream, MaskRule(), seed=0)
    order = list(range(len(stream.modules)))
    assert layers == order + order[::-1]
    assert parts == list(range(0, stream.source.architecture.vocab_size, 200))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 40), st.integers(1, 6))
def test_dropped_sums(seed: int, rows: int, width: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    score = torch.rand(rows, width, generator=generator).mul(10).round() / 10  # ties with thresholds
    thresholds = (torch.rand(levels, generator=generator).mul(10).round() / 10).sort().values
    expected = torch.stack([torch.where(score <= t, values.double(), 0).sum(1) for t in thresholds], dim=1)
    found = dropped_sums(values, first_dropped(score, thresholds), levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    order = torch.randperm(width, generator=generator)
    assert torch.equal(dropped_sums(values[:, order], first_dropped(score, thresholds)[:, order], levels), found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sums_of_what_is_not_finite_are_not(value: float) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = value
    found = dropped_sums(values, torch.zeros(2, 3, dtype=torch.uint8), 2)
    assert (found[0] == 3).all()
    assert not found[1].isfinite().any()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 38), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_levels_are_those_that_a_search_finds(seed: int, levels: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(7, 50, generator=generator).abs() * scale
    score[:, :9] = score[0, 0]
    score[:2, 40:] = torch.tensor([0.0, torch.inf]).repeat(5)
    places = torch.randint(
        0, 50, (levels,), generator=generator
    )  # many thresholds are equal to scores, and some to each other
    thresholds = score[3, places].mul(1 + 1e-3 * torch.randint(0, 3, (levels,), generator=generator)).sort().values
    expected = torch.bucketize(score, thresholds).to(torch.uint8)
    assert torch.equal(first_dropped(score, thresholds), expected)


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_the_fixed_order_of_a_gpu_ends_with_its_context(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
    with fixed_order(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), fixed_order(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ[name] == (before or ":4096:8")
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ.get(name) == before


def test_overflowing_logits_are_named(tmp_path: Path) -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e20).mul_(2e19)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(NumericError, match="logits"):
        measure_curves(open_stream(tmp_path / "m", some_ids()), MaskRule(), seed=0)


@pytest.mark.slow
def test_divergence_is_predicted_on_the_demo_model(tmp_path: Path) -> None:
    result = calibrate("demo", tmp_path / "out", samples=16, seq_len=1024, grid=(0.3, 0.5), sparsity=0.5)
    facts = result.settings.provenance["prediction"]
    assert facts["passes"] <= 3.0
    for predicted, measured in zip(facts["predicted_kl"], facts["kl"], strict=True):
        assert 1 / 1.25 < predicted / measured < 1.25


@pytest.mark.slow
@needs_shared
def test_loss_is_predicted_on_the_demo_model(tmp_path: Path) -> None:
    # On text like what it was trained on: on other text sparsity may even help it, within the noise of so few tokens.
    data = str(SHARED / "text" / "calibration.jsonl")
    result = calibrate("demo", tmp_path / "out", data=data, samples=48, seq_len=512, grid=(0.3, 0.5), sparsity=0.5)
    facts = result.settings.provenance["prediction"]
    for predicted, measured in zip(facts["predicted"], facts["loss_rise"], strict=True):
        assert 1 / 1.5 < predicted / measured < 1.5

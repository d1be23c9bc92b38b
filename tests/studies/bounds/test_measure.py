"""Bounds beside measured errors on tiny models, with and without transforms, and on a calibrated checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from wina_calib.cli import main
from wina_calib.corpus.blocks import load_blocks
from wina_calib.errors import UsageError
from wina_calib.model.architecture import SITES
from wina_calib.model.source import open_source
from wina_calib.studies.bounds.measure import ModelBounds, model_bounds, render

TOKENS = 512


@pytest.fixture(scope="module")
def data(text: Path) -> list[str]:
    return [str(text)]


def measure(model: Path, data: list[str], **options: object) -> list[ModelBounds]:
    return model_bounds(model, data=data, tokens=TOKENS, **options)


@pytest.fixture(scope="module")
def both(llama: Path, data: list[str]) -> list[ModelBounds]:
    return measure(llama, data)


def test_every_site_under_both_transforms(both: list[ModelBounds]) -> None:
    assert [result.transform for result in both] == ["none", "stacked"]
    for result in both:
        assert [(s.layer, s.site, s.group) for s in result.sites] == [(i, s, "shared") for i in range(3) for s in SITES]
        for site in result.sites:
            assert site.sparsity == pytest.approx(0.5)
            assert 0 < site.measured <= 1 and site.cross == site.measured - site.theory


def test_cross_term_vanishes_where_columns_are_orthogonal(both: list[ModelBounds]) -> None:
    plain, stacked = ({(s.layer, s.site): s for s in result.sites} for result in both)
    for key, site in stacked.items():
        if key[1] in ("attn_in", "mlp_in"):
            assert site.theory == pytest.approx(site.measured, rel=1e-5)
            assert abs(plain[key].cross_share) > 1e-4
            assert site.theory < plain[key].theory  # the best rotation concentrates what is kept
            assert site.holds
        else:
            assert abs(site.cross_share) > 1e-5


def test_the_papers_transform_makes_two_projections_orthogonal(llama: Path, data: list[str]) -> None:
    (result,) = measure(llama, data, transforms=["paper"], masks="per-projection")
    shares = {
        group: max(abs(s.cross_share) for s in result.sites if s.group == group)
        for group in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert max(shares["k_proj"], shares["gate_proj"]) < 1e-5
    assert min(value for group, value in shares.items() if group not in ("k_proj", "gate_proj")) > 1e-4


def test_first_site_against_the_model_itself(llama: Path, data: list[str], both: list[ModelBounds]) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    source = open_source(str(llama))
    ids = load_blocks(tuple(data), source.tokenizer(), samples=2, seq_len=256, seed=0, min_tokens=2).ids
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))[:, 1:].flatten(0, 1).double()
        parts = [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
        weight = torch.cat(parts).double()
        norms = weight.norm(dim=0)
        lost = x.clone()
        lost.scatter_(1, (x.abs() * norms).topk(32, dim=1).indices, 0.0)
        whole = (x @ weight.T).square().sum()
    site = both[0].sites[0]
    assert site.theory == pytest.approx(float((lost * norms).square().sum() / whole), rel=1e-4)
    assert site.measured == pytest.approx(float((lost @ weight.T).square().sum() / whole), rel=1e-4)
    assert site.inherited == 0.0 and site.accumulated == pytest.approx(site.measured)
    assert site.bound == pytest.approx(site.theory)


def test_errors_accumulate_within_the_bound(both: list[ModelBounds]) -> None:
    for site in both[1].sites[1:]:
        assert site.inherited > 0
        whole = site.inherited**0.5 + site.measured**0.5
        assert site.accumulated <= whole**2 * (1 + 1e-5)
        assert site.holds or site.cross > 0  # the bound fails only where columns are not orthogonal


@pytest.mark.parametrize("transform", ["none", "stacked", "global", "global+head"])
def test_nothing_dropped_costs_nothing(llama: Path, data: list[str], transform: str) -> None:
    (result,) = measure(llama, data, transforms=[transform], sparsity=0.0)
    for s in result.sites:
        assert (s.sparsity, s.theory, s.measured, s.inherited, s.accumulated, s.cross_share) == (0.0,) * 6 and s.holds


def test_calibrated_checkpoint_is_measured_with_its_own_masks(calibrated: Path, data: list[str]) -> None:
    (result,) = measure(calibrated, data)
    assert (result.select, result.transform, result.sparsity) == ("thresholds", "none", 0.5)
    mean = sum(s.sparsity for s in result.sites) / len(result.sites)
    assert mean == pytest.approx(0.5, abs=0.03)
    (more,) = measure(calibrated, data, sparsity=0.65)
    assert all(
        b.sparsity > a.sparsity and b.measured > a.measured for a, b in zip(result.sites, more.sites, strict=True)
    )


def test_options_that_do_not_fit(calibrated: Path, llama: Path, data: list[str]) -> None:
    for wrong in ({"transforms": ["none"]}, {"score": "teal"}, {"masks": "shared"}):
        with pytest.raises(UsageError, match="is calibrated"):
            measure(calibrated, data, **wrong)
    with pytest.raises(UsageError):
        measure(llama, data, sparsity=1.0)
    with pytest.raises(UsageError):
        model_bounds(llama, data=data, tokens=1)


def test_progress_counts_the_layers_of_all_transforms(llama: Path, calibrated: Path, data: list[str]) -> None:
    told: list[tuple[int, int]] = []
    measure(llama, data, transforms=("none", "stacked"), progress=lambda done, total: told.append((done, total)))
    assert told == [(i + 1, len(told)) for i in range(len(told))]
    alone: list[tuple[int, int]] = []
    measure(calibrated, data, progress=lambda done, total: alone.append((done, total)))
    assert len(told) == 2 * len(alone)
    assert alone == [(i + 1, len(alone)) for i in range(len(alone))]


def test_text(both: list[ModelBounds]) -> None:
    text = render(both)
    assert "transform none" in text and "transform stacked" in text
    assert "mean size of the cross term: attn_in 0.00%" in text
    assert len(text.splitlines()) == 2 * (2 + 2 + 12 + 3) + 1


def test_command_line(llama: Path, data: list[str]) -> None:
    given = ["bounds", str(llama), "--data", data[0], "--tokens", "256", "--transform", "none", "-s", "0.4"]
    run = CliRunner().invoke(main, [*given, "--json"])
    assert run.exit_code == 0 and run.stderr == ""
    found = json.loads(run.stdout)
    assert found["model"] == str(llama) and [r["transform"] for r in found["results"]] == ["none"]
    assert len(found["results"][0]["sites"]) == 12
    assert {"theory", "measured", "cross", "bound", "accumulated", "holds"} <= set(found["results"][0]["sites"][0])
    assert CliRunner().invoke(main, given).exit_code == 0

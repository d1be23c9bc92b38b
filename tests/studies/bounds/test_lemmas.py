"""Lemma 3.1 and Theorem 3.2 on matrices: identities, optimality over all masks, where it fails, and the synthetic experiment."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.studies.bounds.lemmas import (
    PAPER,
    SPARSITIES,
    Setting,
    accumulated_bound,
    best_mask,
    column_lengths,
    counterexample,
    keep_top,
    measured_error,
    network_error,
    optimality,
    orthogonal_columns,
    render_synthetic,
    synthetic,
    theoretical_error,
    wina_error,
)

SMALL = Setting(width=48, depth=2, inputs=4, seeds=4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_lemma_is_the_measured_error_of_orthogonal_columns(shape: tuple[int, int], seed: int) -> None:
    weight = orthogonal_columns(random(*shape, seed=seed))
    x = random(5, shape[1], seed=seed + 9)
    dropped = x * ~keep_top(x.abs(), 5)
    theory, measured = theoretical_error(column_lengths(weight), dropped), measured_error(weight, dropped)
    assert torch.allclose(theory, measured, rtol=1e-6, atol=1e-12)


def test_cross_term_is_the_off_diagonal_part_of_the_gram_matrix() -> None:
    weight, dropped = random(9, 7), random(7, seed=1) * torch.tensor([1, 0, 1, 1, 0, 1, 0])
    gram = weight.T @ weight
    cross = dropped @ (gram - gram.diag().diag()) @ dropped
    theory = theoretical_error(column_lengths(weight), dropped)
    assert float(measured_error(weight, dropped) - theory) == pytest.approx(float(cross))
    assert abs(float(cross)) > 0.1


def test_rotation_keeps_the_output() -> None:
    weight, x = random(10, 6), random(6, seed=1)
    rotated = orthogonal_columns(weight)
    gram = rotated.T @ rotated
    assert torch.allclose(gram, gram.diag().diag(), atol=1e-10)
    assert torch.allclose(rotated.norm(), weight.norm())
    v = torch.linalg.lstsq(weight, rotated).solution
    assert torch.allclose(rotated @ (v.T @ x), weight @ x)


def test_keep_top() -> None:
    assert keep_top(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), 2).tolist() == [
        [True, False, True],
        [False, True, True],
    ]


@pytest.mark.parametrize("rows", [6, 9])
def test_best_mask_is_found_by_trying_all(rows: int) -> None:
    weight, x = random(rows, 6), random(6, seed=2)
    for keep in range(1, 6):
        kept, error = best_mask(weight, x, keep)
        tried = []
        for chosen in itertools.combinations(range(6), keep):
            rest = [j for j in range(6) if j not in chosen]
            tried.append(float((weight[:, rest] @ x[rest]).square().sum()))
        assert error == pytest.approx(min(tried)) and len(kept) == keep


def test_wina_is_optimal_for_orthogonal_columns_and_not_without() -> None:
    found = optimality(matrices=40)
    assert found.cases == 40 * 6
    assert found.orthogonal == 1.0
    assert 0.3 < found.random < 0.9


def test_counterexample_is_one() -> None:
    found = counterexample()
    weight, x = torch.tensor(found.weight, dtype=torch.float64), torch.tensor(found.x, dtype=torch.float64)
    gram = weight.T @ weight
    assert not torch.equal(gram, gram.diag().diag())
    assert found.kept_by_wina == int((x.abs() * weight.norm(dim=0)).argmax()) != found.best
    for kept, error in ((found.kept_by_wina, found.wina_error), (found.best, found.best_error)):
        rest = [j for j in range(len(x)) if j != kept]
        assert float((weight[:, rest] @ x[rest]).square().sum()) == error
    assert found.wina_error > found.best_error
    # The same matrix with its columns made orthogonal is no counterexample any more.
    rotated = orthogonal_columns(weight)
    assert wina_error(rotated, x, 1) == pytest.approx(best_mask(rotated, x, 1)[1])


@pytest.mark.parametrize("seed", range(5))
def test_theorem_bounds_every_layer_of_a_linear_network(seed: int) -> None:
    layers = [orthogonal_columns(random(16, 16, seed=10 * seed + i)) for i in range(4)]
    dense = sparse = random(16, seed=99 + seed)
    for i, weight in enumerate(layers):
        mask = random(16, seed=1000 + 10 * seed + i) > 0  # any mask
        inherited = float(measured_error(weight, sparse - dense))
        own = float(theoretical_error(column_lengths(weight), sparse * ~mask))
        dense, sparse = weight @ dense, weight @ (sparse * mask)
        assert float((sparse - dense).square().sum()) <= accumulated_bound(inherited, own) * (1 + 1e-9)


def test_theorem_bound_is_the_smallest_of_its_family() -> None:
    u, v = 0.7, 0.2
    family = [(1 + a) * u + (1 + 1 / a) * v for a in torch.linspace(0.01, 5, 2000).tolist()]
    assert accumulated_bound(u, v) == pytest.approx(min(family), rel=1e-4)
    assert accumulated_bound(u, 0.0) == pytest.approx(u)


def test_one_layer_network_error_is_the_lemma() -> None:
    weight, x = orthogonal_columns(random(16, 16)), random(3, 16, seed=1)
    dropped = x * ~keep_top(x.abs() * column_lengths(weight), 10)
    expected = theoretical_error(column_lengths(weight), dropped).sqrt().mean()
    assert network_error([weight], x, "wina", 10) == pytest.approx(float(expected))


def test_synthetic_experiment_small() -> None:
    result = synthetic(SMALL)
    assert result.wina_below_teal
    assert len(result.cells) == 2 * 2 * 4
    assert {(c.theory, c.method) for c in result.cells} == set(PAPER)
    assert [c.paper for c in result.cells if (c.theory, c.method) == ("lemma 3.1", "wina")] == [0.70, 1.73, 2.70, 4.75]
    assert result == synthetic(SMALL)  # the same seeds give the same numbers
    text = render_synthetic(result)
    assert "WINA below TEAL in every cell: yes" in text and "counterexample" in text


def test_synthetic_ratios_are_the_papers() -> None:
    result = synthetic(Setting(width=192, depth=1, inputs=16, seeds=6))
    mean = {(c.method, c.sparsity): c.mean for c in result.cells if c.theory == "lemma 3.1"}
    for i, s in enumerate(SPARSITIES):
        ours = mean["wina", s] / mean["teal", s]
        assert ours == pytest.approx(PAPER["lemma 3.1", "wina"][i] / PAPER["lemma 3.1", "teal"][i], abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"seeds": 0}, {"width": 1}, {"sparsities": ()}, {"sparsities": (1.0,)}, {"width": 0}]
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Setting(**wrong)


def test_command_line() -> None:
    small = ["bounds", "--synthetic", "--seeds", "3", "--width", "32", "--depth", "2"]
    run = CliRunner().invoke(main, [*small, "--json"])
    assert run.exit_code == 0 and run.stderr == ""
    found = json.loads(run.stdout)
    assert found["wina_below_teal"] is True and found["optimality"]["orthogonal"] == 1.0
    assert found["setting"]["width"] == 32 and len(found["cells"]) == 16
    assert "theorem 3.2" in CliRunner().invoke(main, small).stdout
    for wrong in (["bounds"], [*small, "demo"], [*small, "--sparsity", "0.5"], ["bounds", "demo", "--seeds", "3"]):
        assert CliRunner().invoke(main, wrong).exit_code == 2

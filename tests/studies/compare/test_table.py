"""What a comparison says of its methods' budgets."""

import json

import pytest
from click.testing import CliRunner

from wina_calib.cli import main
from wina_calib.errors import UsageError
from wina_calib.studies.compare.methods import METHODS, Method, find_methods
from wina_calib.studies.compare.table import Comparison, Row

PROTOCOL = {"samples": 1, "seq_len": 16, "data": ["a"], "tokens": 9, "heldout": ["b"], "dtype": "float32", "seed": 0}


def compared(*names: str) -> Comparison:
    methods = {m.name: m for m in find_methods(names)}
    rows = tuple(Row(n, 0.5, 0.5, 11.0, 10.0, 0.1, 0.9, 0.6, 0.5, 9, 1.0, 1.0, 8.0, 16.0, 10.0) for n in methods)
    about, budgets = ({n: getattr(m, key) for n, m in methods.items()} for key in ("about", "budget"))
    return Comparison("model", PROTOCOL, about, budgets, rows)


@pytest.mark.parametrize(
    ("name", "budget"),
    [("ours", "global"), ("teal", "greedy"), ("teal-uniform", "uniform"), ("cats", "uniform over layers")],
)
def test_a_method_says_its_budget(name: str, budget: str) -> None:
    assert METHODS[name].budget == budget
    assert f"{name} {budget}" in " ".join(compared(name).text().split())
    assert f"| `{name}` | {budget} |" in compared(name).markdown()


def test_a_budget_file_is_named() -> None:
    assert Method("mine", "from a file", {"budget": "some/where/mine.yaml"}).budget == "mine.yaml"


def test_a_budget_that_a_method_does_not_have_is_named_beside_those_that_there_are() -> None:
    for name, said in (
        ("teal-gredy", "budget: teal has greedy, teal-uniform has uniform"),
        ("ours-uniform", "budget: ours has global"),
        ("greedy", "budget: wina-paper has greedy, teal has greedy, budget-greedy has greedy"),
        ("teal-unifrom", "Did you mean 'teal-uniform'"),
    ):
        with pytest.raises(UsageError, match=f"{name}' is unknown.*{said}.*their budgets"):
            find_methods([name])


def test_a_method_is_checked_when_it_is_made() -> None:
    with pytest.raises(UsageError, match="method 'mine': budget is 'globl'; expected global, greedy, uniform"):
        Method("mine", "misspelt", {"budget": "globl"})
    with pytest.raises(UsageError, match="method 'mine': unknown option budgt"):
        Method("mine", "misspelt", {"budgt": "global"})
    with pytest.raises(UsageError, match="masks the MLP's gate.*no use for budget. Leave it out"):
        Method("mine", "gates", {"budget": "greedy", "seed": 1}, gated=True)


def test_unequal_budgets_are_told() -> None:
    said = "Budgets differ, and are part of what is compared. Greedy: teal; uniform: wina, teal-uniform."
    found = compared("teal", "wina", "teal-uniform")
    assert said in found.text() and said in found.markdown()
    assert "Budgets differ" not in compared("wina", "teal-uniform").text()


def test_the_list_of_methods_has_budgets() -> None:
    found = json.loads(CliRunner().invoke(main, ["compare", "--list", "--json"]).stdout)
    assert found["budgets"] == {name: method.budget for name, method in METHODS.items()}
    shown = CliRunner().invoke(main, ["compare", "--list"]).stdout
    assert " ".join(shown.splitlines()[0].split()) == "method group budget what it is"

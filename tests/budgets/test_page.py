"""The budget page: as text, and driven in a headless Chromium whose downloads land in a folder."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import drive, needs_browser
from budget_cases import SITES, small_cells, smooth_curves

from wina_calib.budgets import (
    Budget,
    Cells,
    Curves,
    ModelKey,
    Target,
    read_budget,
    render_page,
    solve_global,
    totals,
    uniform,
)
from wina_calib.errors import BudgetError

CELLS = small_cells(5, other_decoder=40, lm_head=900, runtime_matrices=120)
CURVES = smooth_curves(5, seed=3)
MODEL = ModelKey.of("llama", 256, CELLS)
LOWER, UPPER = 0.05, 0.9
FIXED = np.full((5, 4), np.nan)
FIXED[1, 2] = 0.3
START = solve_global(CELLS, CURVES, 0.5, lower=LOWER, upper=UPPER, fixed=FIXED)
PAGE = render_page(CELLS, CURVES, START, MODEL, score="wina", lower=LOWER, upper=UPPER, fixed=FIXED)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.found += [value for name, value in attrs if name in ("src", "href", "action", "srcset")]
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]


def test_page_needs_nothing_from_outside():
    links = Links()
    links.feed(PAGE)
    assert links.found == ["data:,"]
    assert links.scripts == 2
    assert "default-src 'none'" in PAGE
    assert "unsafe" not in PAGE
    assert re.findall(r"https?://[^\s\"']+", PAGE) == ["http://www.w3.org/2000/svg"]
    assert "{{" not in re.sub(r"\$\{\{", "", PAGE)


def test_model_text_cannot_end_the_data_block():
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', PAGE, re.DOTALL)[1]
    assert "<" not in text
    data = json.loads(text)
    assert data["model"]["fingerprint"] == MODEL.fingerprint
    assert data["fixed"].count(None) == 19


def test_mismatched_shapes_and_scores_are_refused():
    with pytest.raises(BudgetError, match="differ"):
        render_page(small_cells(2), CURVES, START, MODEL, score="wina")
    with pytest.raises(BudgetError, match="score must be one of"):
        render_page(CELLS, CURVES, START, MODEL, score="</script>")
    with pytest.raises(BudgetError, match="fixed has shape"):
        render_page(CELLS, CURVES, START, MODEL, score="wina", fixed=np.zeros((2, 4)))


@needs_browser
def test_slide_pin_and_download(tmp_path):
    found = drive(
        tmp_path,
        PAGE,
        """
        result.first = shown(); result.firstTiles = tiles();
        result.firstPins = [...$("map").querySelectorAll('[aria-pressed="true"]')].map((made) => made.dataset.cell);
        slide("0.4"); result.slid = shown(); result.slidTiles = tiles();
        cell(3).click(); cell(9).click();
        slide("0.6");
        cell(12).focus(); press("ArrowDown"); result.moved = document.activeElement.dataset.cell;
        press("ArrowRight"); press("ArrowLeft"); press("-");
        cell(9).click();
        result.labels = [3, 6, 9, 16].map((i) => cell(i).getAttribute("aria-label"));
        result.title = $("cell-title").textContent;
        result.stops = $("map").querySelectorAll('button[tabindex="0"]').length;
        result.pins = $("pins").textContent;
        $("download").click();
        await new Promise((done) => setTimeout(done, 300));
        """,
        files=("result.json", "budget-0.600.yaml"),
    )
    bounds = {"lower": LOWER, "upper": UPPER}
    assert found["first"] == [f"{v:.3f}" for v in START.sparsities.reshape(-1)]
    assert found["firstPins"] == ["6"]
    assert found["firstTiles"]["Model sparsity"] == "0.5000"
    slid = solve_global(CELLS, CURVES, 0.4, fixed=FIXED, **bounds)
    assert [float(v) for v in found["slid"]] == pytest.approx(slid.sparsities.reshape(-1), abs=0.000501)
    summary = totals(CELLS, slid, CURVES)
    assert found["slidTiles"] == {
        "Model sparsity": "0.4000",
        "Read fraction": f"{summary.read_fraction:.4f}",
        "Decode speedup limit": f"{summary.speedup_limit:.2f} ×",
        "Predicted loss rise": f"{summary.loss_rise:.4f}",
        "Predicted perplexity": f"+{100 * summary.perplexity_rise:.{2 if summary.perplexity_rise < 0.1 else 1}f} %",
    }
    pins = FIXED.copy()
    pins[0, 3] = slid.sparsities[0, 3]
    with_nine = pins.copy()
    with_nine[2, 1] = slid.sparsities[2, 1]
    before = solve_global(CELLS, CURVES, 0.6, fixed=with_nine, **bounds).sparsities
    pins[4, 0] = round(before[4, 0] - 0.05, 6)
    assert found["moved"] == "16"
    assert found["pins"] == "3 of 20 cells pinned"
    assert found["stops"] == 1
    assert found["title"] == "layers.2.attn_out"
    assert found["labels"][1] == "layers.1.mlp_in, sparsity 0.300, pinned"
    assert [label.endswith(", pinned") for label in found["labels"]] == [True, True, False, True]

    content = read_budget(tmp_path / "budget-0.600.yaml")
    assert (content.model, content.score, content.sparsity) == (MODEL, "wina", 0.6)
    downloaded = content.budget(MODEL, CELLS)
    wanted = solve_global(CELLS, CURVES, 0.6, fixed=pins, **bounds)
    assert downloaded.sparsities == pytest.approx(wanted.sparsities, abs=1e-9)
    assert downloaded.model_sparsity(CELLS) == pytest.approx(0.6, abs=1e-9)


@needs_browser
def test_targets_fields_and_messages(tmp_path):
    found = drive(
        tmp_path,
        PAGE,
        """
        const find = (kind, amount) => {
          $("kind").value = kind; $("amount").value = amount; fire($("find"), "submit");
          return [Number($("slider").value), $("sparsity").value, $("message").textContent];
        };
        result.perplexity = find("perplexity", "10");
        result.read = find("read", "70");
        result.none = find("perplexity", "0");
        $("sparsity").value = "0.97"; fire($("sparsity"), "change");
        result.clamped = [$("message").textContent, $("message").className, tiles()["Model sparsity"]];
        $("sparsity").value = "1.5"; fire($("sparsity"), "change");
        result.wrong = $("message").textContent;
        cell(0).focus(); $("cell-value").value = "0.2"; fire($("cell-value"), "change");
        result.typed = [cell(0).textContent, cell(0).getAttribute("aria-pressed"), $("cell-pin").checked];
        $("cell-pin").click();
        result.unpinned = cell(0).getAttribute("aria-pressed");
        $("unpin").click();
        result.free = [$("pins").textContent, $("unpin").disabled];
        const theme = () => getComputedStyle(document.body).backgroundColor;
        result.themes = [theme()]; $("theme").click(); result.themes.push(theme());
        """,
    )
    options = {"lower": LOWER, "upper": UPPER, "fixed": FIXED}
    best = solve_global(CELLS, CURVES, Target("perplexity_rise", 0.1), **options).model_sparsity(CELLS)
    assert found["perplexity"][1:] == [f"{best:.4f}", f"Highest sparsity within +10.0 %: {best:.4f}."]
    assert found["read"][1] == f"{CELLS.sparsity_at(0.7):.4f}"
    assert "predicted worse" in found["none"][2]
    highest = uniform(CELLS, Target("loss_rise", 1e9), curves=CURVES, **options).model_sparsity(CELLS)
    assert found["clamped"][0].endswith(f"to {highest:.3f}.")
    assert found["clamped"][1:] == ["warn", f"{highest:.4f}"]
    assert "from 0 up to" in found["wrong"]
    assert found["typed"] == ["0.200", "true", True]
    assert found["unpinned"] == "false"
    assert found["free"] == ["No cell is pinned.", True]
    assert found["themes"][0] != found["themes"][1]


def problem(seed, *, convex):
    """Uneven weights, ties, zero slopes; curves that are not convex when asked."""
    rng = np.random.default_rng(seed)
    layers = 3
    stored = {"bits": 4.3125, "head_bits": 8.0} if seed % 3 == 1 else {}
    cells = Cells(SITES, rng.integers(1, 10**9, (layers, 4)), lm_head=10**8, runtime_matrices=10**6, **stored)
    levels = np.concatenate(([0.0], np.sort(rng.uniform(0.05, 0.95, 8)), [0.97]))
    steps = rng.integers(0, 4, (layers, 4, 9)) / 100
    loss = np.cumsum(np.sort(steps, axis=2) * np.diff(levels), axis=2) if convex else rng.uniform(0, 0.1, steps.shape)
    return cells, Curves(levels, np.concatenate((np.zeros((layers, 4, 1)), loss), axis=2))


@needs_browser
def test_page_solver_equals_python(tmp_path):
    pins = np.full((3, 4), np.nan)
    pins[1, 1], pins[2, 3] = 0.98, 0.0
    targets = [0.0, 0.08, 0.25, 0.5, 0.65, 0.77, 0.9, 0.97]
    cases, expected = [], []
    for seed in range(6):
        cells, curves = problem(seed, convex=seed < 4)
        if seed % 2:
            curves = replace(curves, measured=np.array([[0.01, 0.004], [0.05, 0.06], [0.3, 0.25]]))
        flat = Budget(np.zeros((3, 4)))
        text = render_page(cells, curves, flat, ModelKey.of("llama", 8, cells), score="teal", upper=0.96)
        data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
        for fixed in (np.full((3, 4), np.nan), pins):
            cases.append([json.loads(data), [None if np.isnan(v) else v for v in fixed.reshape(-1)]])
            expected.append((cells, curves, {"fixed": fixed, "upper": 0.96}))
    found = drive(
        tmp_path,
        PAGE,
        f"""
        const cases = {json.dumps(cases)};
        result.cases = cases.map(([data, pins]) => {{
          const solver = WinaSolver.prepare(data, pins);
          const inside = {targets}.filter((s) => s >= solver.range[0] && s <= solver.range[1]);
          return {{
            range: solver.range,
            budgets: inside.map((s) => [s, solver.at(s), solver.uniform(s), WinaSolver.totals(data, solver.at(s))]),
            within: solver.within(0.05),
          }};
        }});
        """,
    )
    compared = 0
    for (cells, curves, options), case in zip(expected, found["cases"], strict=True):
        for sparsity, values, flat, summary in case["budgets"]:
            budget = solve_global(cells, curves, sparsity, **options)
            assert np.reshape(values, (3, 4)) == pytest.approx(budget.sparsities, abs=1e-9)
            level = uniform(cells, sparsity, fixed=options["fixed"], upper=0.96)
            assert np.reshape(flat, (3, 4)) == pytest.approx(level.sparsities, abs=1e-9)
            assert summary == pytest.approx(vars(totals(cells, budget, curves)), rel=1e-9, abs=1e-12)
            compared += 1
        least = solve_global(cells, curves, case["range"][0], **options).predicted_loss(curves)
        if least <= 0.05:
            budget = solve_global(cells, curves, Target("loss_rise", 0.05), **options)
            assert case["within"] == pytest.approx(budget.model_sparsity(cells), abs=1e-9)
        else:
            assert case["within"] is None
    assert compared > 60

"""What is expected of a calibration, from what was measured at its anchors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from wina_calib.budgets import Cells
from wina_calib.checkpoint.verdict import A_FIRST_LOOK, HELD_OUT, QUICK, VERDICT, HeldOut, Verdict, smoothed

# Rises of a real model, SmolLM2-135M, of the perplexity at its sparsities.
KNOWN = {0.25: 0.017, 0.4: 0.104, 0.5: 0.28, 0.65: 1.5}


def held(anchors: tuple[float, ...] = (0.25, 0.4, 0.65), tokens: int = 1 << 20, off: float = -0.01) -> HeldOut:
    loss = tuple(math.log1p(KNOWN[a]) for a in anchors)
    return HeldOut(anchors, loss, loss, tuple(a + off for a in anchors), tokens, ("builtin:heldout",))


@pytest.fixture
def cells() -> Cells:
    return Cells(
        sites=("attn_in", "attn_out", "mlp_in", "mlp_out"),
        weights=np.full((2, 4), 100),
        other_decoder=0,
        lm_head=200,
        runtime_matrices=0,
    )


def test_it_goes_through_what_was_measured_and_near_what_was_not() -> None:
    found = held()
    for sparsity in (0.25, 0.4, 0.65):
        assert found.rise_at(sparsity) == pytest.approx(KNOWN[sparsity], rel=0.01)
    assert found.rise_at(0.5) == pytest.approx(KNOWN[0.5], rel=0.2)
    assert found.rise_at(0) == 0
    below = [found.rise_at(s) for s in np.linspace(0.01, 0.99, 99)]
    assert below == sorted(below) and all(map(math.isfinite, below))
    one = held((0.4,))
    assert one.rise_at(0.25) == pytest.approx(KNOWN[0.25], rel=0.3)


def test_the_sparsity_for_a_rise_is_its_inverse_up_to_the_last_anchor() -> None:
    found = held()
    for rise in (0.001, 0.01, 0.05, 0.1, 1.0):
        assert found.rise_at(found.sparsity_for(rise)) == pytest.approx(rise, rel=1e-6)
    assert found.sparsity_for(100.0) == 0.65
    assert found.sparsity_for(0.0) == 0
    chosen = found.choose(0.05)
    assert chosen == round(chosen, 2) and found.rise_at(chosen) <= 0.05 < found.rise_at(chosen + 0.01)


def test_a_noisy_rise_is_drawn_to_the_divergence() -> None:
    """At 1,000 tokens a loss that falls by chance says nothing; at a million it does."""
    kl, loss = (0.01, 0.1, 0.8), (-0.02, 0.11, 0.8)
    few = smoothed(loss, kl, 1000)
    assert few[0] == pytest.approx(0.0095, abs=0.003)
    assert few[2] == pytest.approx(0.8, rel=0.05)
    many = smoothed((0.005, 0.11, 0.8), kl, 1_000_000)
    assert many[0] == pytest.approx(0.005, rel=0.1)
    assert list(few) == sorted(set(few)) and min(few) > 0
    nothing = smoothed((-1e-9, 0.0, 0.0), (0.0, 0.0, 0.0), 1000)
    assert list(nothing) == sorted(set(nothing)) and min(nothing) > 0


def test_quantized_weights_cost_something_at_sparsity_0() -> None:
    """4 bits in groups of 32 and the same at 25, 40, 50 %, as measured on SmolLM2-135M."""
    loss = tuple(math.log1p(rise) for rise in (0.075, 0.093, 0.192, 0.39))
    found = HeldOut((0.25, 0.4, 0.5), loss[1:], loss[1:], (0.25, 0.4, 0.5), 1 << 20, ("x",), (loss[0], loss[0]))
    assert found.rise_at(0) == pytest.approx(0.075, rel=0.01)
    assert found.rise_at(0.1) == pytest.approx(0.075, abs=0.01)
    assert found.rise_at(0.4) == pytest.approx(0.192, rel=0.01)
    assert found.sparsity_for(0.05) == 0
    assert 0.25 < found.choose(0.05) < 0.4  # on top of the 7.5 %
    assert HeldOut.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_verdict_in_words_and_in_numbers(cells: Cells) -> None:
    verdict = Verdict.of(held(off=-0.017), cells, 0.5)
    assert verdict.achieved == pytest.approx(0.483)
    assert verdict.read_fraction == pytest.approx(1 - 0.8 * 0.483)
    assert verdict.speedup == pytest.approx(1 / verdict.read_fraction)
    text = verdict.text()
    assert "at 50 % sparsity" in text and "25 %: +1.7 %, 40 %: +10 %" in text
    assert "+5 %: 33 %" in text
    assert "48.3 % of the inputs there, 50 % asked" in text
    assert "text of another kind than the calibration's may cost more" in text
    assert verdict.warning is not None and "rise by 3" in verdict.warning and "costs about 5 %" in verdict.warning
    mild = Verdict.of(held(off=-0.005), cells, 0.25, 0.05)
    assert mild.warning is None and "dropped" not in mild.text()


def test_a_quantized_models_verdict_says_what_quantizing_costs(cells: Cells) -> None:
    loss = tuple(math.log1p(rise) for rise in (0.033, 0.047, 0.12, 0.3))
    found = HeldOut((0.25, 0.4, 0.5), loss[1:], loss[1:], (0.25, 0.4, 0.5), 1 << 20, ("x",), (loss[0], loss[0]))
    verdict = Verdict.of(found, cells, 0.25)
    assert verdict.quantizing == pytest.approx(0.033, rel=0.01)
    text = verdict.text()
    assert "+1 %: none, +5 %: 2" in text and "+3.3 %; it is in the rises above, which are over the original" in text
    facts = json.loads(json.dumps({VERDICT: verdict.to_dict(), HELD_OUT: found.to_dict(), QUICK: True}))
    again = Verdict.from_facts(facts)
    assert again == replace(verdict, quick=True) and A_FIRST_LOOK in again.text() and A_FIRST_LOOK not in text
    worse = HeldOut((0.4,), (0.3,), (0.3,), (0.4,), 1 << 20, ("x",), (0.2, 0.2))
    warning = Verdict.of(worse, cells, 0.4).warning
    assert warning is not None and "Quantizing alone costs 22 %" in warning and "0 % sparsity costs" not in warning
    chosen = Verdict.of(worse, cells, 0.2, 0.05).warning  # which is within the limit, and not what costs
    hasty = replace(Verdict.of(worse, cells, 0.2, 0.05), quick=True).warning
    assert hasty is not None and "on top. More text (without --quick), groups of 32" in hasty
    assert (
        chosen is not None
        and "on top. Groups of 32" in chosen
        and "quantizing alone costs 22 %, and the 20 % sparsity chosen 0.9 % on top" in chosen
    )
    assert all(
        way in warning and way in chosen
        for way in ("--group-size 32", "--keep-16-bit", "--bits 8", "wina-calib recover")
    )


def test_the_sparsity_told_for_a_rise_is_the_one_that_is_chosen(cells: Cells) -> None:
    """27.7 % where 27 % was chosen would be told as 28 %, and read like a contradiction."""
    found = next(h for h in (held(off=0.0), held((0.25, 0.5)), held((0.4,))) if h.sparsity_for(0.05) % 0.01 > 0.005)
    chosen = found.choose(0.05)
    told = Verdict.of(found, cells, chosen, 0.05).text()
    assert f"at {100 * chosen:.0f} % sparsity" in told and f"+5 %: {100 * chosen:.0f} %," in told
    odd = Verdict.of(found, cells, 0.27881).text()
    assert "at 27.9 % sparsity" in odd


def test_it_comes_back_from_json(cells: Cells) -> None:
    verdict = Verdict.of(held(), cells, 0.33, 0.05)
    facts = json.loads(json.dumps({VERDICT: verdict.to_dict(), HELD_OUT: held().to_dict()}))
    assert Verdict.from_facts(facts) == verdict
    assert HeldOut.from_dict(facts[HELD_OUT]) == held()


@pytest.mark.parametrize(
    "damage",
    [
        {"rise": "much"},
        {"rise": None},
        {"rises": {"0.25": 0.1}},
        {"rises": [1, 2]},
        {"sparsity_for": {"0.01": {}, "0.05": 1, "0.1": 1}},
        {"data": 5},
        {"limit": "x"},
        {"more": 1},
        {"achieved": 1e999},
    ],
)
def test_odd_facts_are_no_verdict(damage: dict[str, object], cells: Cells) -> None:
    whole = Verdict.of(held(), cells, 0.33, 0.05).to_dict()
    assert Verdict.from_facts({VERDICT: whole | damage}) is None
    assert Verdict.from_facts({VERDICT: 3}) is None and Verdict.from_facts({}) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"anchors": [0.4, 0.25, 0.65]},
        {"anchors": [0.4]},
        {"anchors": []},
        {"kl": "abc"},
        {"kl": [1, 2, 1e999]},
        {"tokens": None},
        {"data": 7},
        {"anchors": [0.0, 0.25, 0.65]},
    ],
)
def test_odd_measurements_are_none(damage: dict[str, object]) -> None:
    assert HeldOut.from_dict(held().to_dict() | damage) is None
    assert HeldOut.from_dict([1]) is None


def test_the_standard_error_is_how_far_predictions_lie_from_the_truth() -> None:
    """Models drawn as the prediction supposes them to be, measured with the noise of so many tokens."""
    random, kl, anchors = np.random.default_rng(0), np.array([0.006, 0.03, 0.09, 0.5]), (0.25, 0.4, 0.5, 0.65)
    for tokens in (8192, 32768):
        off = []
        for _ in range(400):
            truth = kl * random.normal(1, 0.15, 4)
            loss = truth + random.normal(size=4) * np.sqrt(4 * kl / tokens)
            found = HeldOut(anchors, tuple(loss), tuple(kl), anchors, tokens, ("x",))
            off.append(
                [(found.rise_at(s) - math.expm1(t)) / found.error_at(s) for s, t in zip(anchors, truth, strict=True)]
            )
        assert np.sqrt(np.square(off).mean(0)) == pytest.approx(np.ones(4), abs=0.25)
    assert found.error_at(0.45) > found.error_at(0.4)
    assert found.error_at(0) == replace(found, tokens=0).error_at(0.4) == 0


def test_what_sequences_differ_by_is_counted() -> None:
    few = held(tokens=8192)
    by_tokens = [2 * math.sqrt(k / 8192) for k in few.kl]
    seen = replace(few, errors=tuple(by_tokens))
    assert [seen.error_at(a) for a in few.anchors] == pytest.approx([few.error_at(a) for a in few.anchors])
    twice = replace(few, errors=tuple(2 * e for e in by_tokens))
    assert all(few.error_at(a) < twice.error_at(a) < 2 * few.error_at(a) for a in few.anchors)
    assert [twice.rise_at(a) for a in few.anchors] == [few.rise_at(a) for a in few.anchors]
    assert HeldOut.from_dict(twice.to_dict()) == twice
    assert HeldOut.from_dict(twice.to_dict() | {"errors": [0.1]}) is None


def test_standard_errors_are_told_and_not_stored(cells: Cells) -> None:
    verdict = Verdict.of(held(tokens=8192), cells, 0.4)
    assert verdict.rows()[0][1].startswith(f"+10 % ± {100 * verdict.error:.1f} at 40 %")
    assert f"25 %: +1.7 % ± {100 * verdict.errors['0.25']:.1f}, 40 %:" in verdict.rows()[1][1]
    assert verdict.to_json()["errors"] == verdict.errors
    again = Verdict.from_facts({VERDICT: verdict.to_dict(), HELD_OUT: held(tokens=8192).to_dict()})
    assert again == verdict
    assert "error" not in verdict.to_dict()

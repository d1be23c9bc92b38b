"""Measured figures in a card's metadata: ours are made anew, those of others stay."""

import copy

from huggingface_hub.repocard_data import model_index_to_eval_results

from wina_calib.checkpoint.card_figures import figures, merged

MEASURED = {
    "data": ("builtin:heldout", "/home/somebody/texts/own.txt"), "model_sparsity": 0.4912, "sparse_ppl": 12.34567,
    "dense_ppl": 11.0,
}  # fmt: skip
THEIRS = {
    "task": {"type": "text-generation"},
    "dataset": {"name": "ARC", "type": "ai2_arc"},
    "metrics": [{"type": "accuracy", "value": 0.7}],
}


def test_the_hub_reads_them() -> None:
    name, found = model_index_to_eval_results(figures("demo-sparse", MEASURED)["model-index"])
    assert name == "demo-sparse"
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in found] == [
        ("perplexity", "Perplexity at sparsity 0.491", 12.3457),
        ("perplexity", "Perplexity at sparsity 0", 11.0),
    ]
    assert {(r.task_type, r.dataset_name, r.source_name) for r in found} == {
        ("text-generation", "builtin:heldout, own.txt", "wina_calib")
    }


def test_new_figures_take_the_place_of_old_ones() -> None:
    old = figures("demo-sparse", MEASURED)
    new = figures("demo-sparse", MEASURED | {"sparse_ppl": 13.0})
    assert merged(old, new) == new
    assert merged(old, {}) == {"metrics": ["perplexity"]}


def test_figures_of_others_stay() -> None:
    ours = figures("demo-sparse", MEASURED)
    card = {
        "metrics": ["accuracy"],
        "model-index": [{"name": "x", "results": [THEIRS, *ours["model-index"][0]["results"]]}],
    }
    before = copy.deepcopy(card)
    found = merged(card, ours)
    assert found["metrics"] == ["perplexity", "accuracy"]
    assert found["model-index"] == [*ours["model-index"], {"name": "x", "results": [THEIRS]}]
    assert merged(found, ours) == found  # brought up to date twice, it is the same
    assert card == before


def test_what_is_no_index_counts_for_nothing() -> None:
    ours = figures("demo-sparse", MEASURED)
    for odd in (5, "text", [5], [{"results": 7}], {"name": "x"}, [{"name": "x", "results": ["y"]}]):
        assert merged({"model-index": odd, "metrics": odd}, ours)["model-index"] == ours["model-index"]

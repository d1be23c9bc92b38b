"""Measured figures as the Hub shows them: the `model-index` and `metrics` of a card's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wina_calib.checkpoint.local_paths import published

SOURCE = "wina_calib"  # by which figures of ours are known among those that people wrote
METRICS = ["perplexity"]


def figures(name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for an evaluation of the checkpoint."""
    data = ", ".join(published(str(spec)) for spec in measured["data"])
    ppl_by_title = {
        f"Perplexity at sparsity {measured['model_sparsity']:.3f}": measured["sparse_ppl"],
        "Perplexity at sparsity 0": measured["dense_ppl"],
    }
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": data, "type": data.partition(":")[0]},
        "metrics": [
            {"type": "perplexity", "name": title, "value": round(float(v), 4)} for title, v in ppl_by_title.items()
        ],
        "source": {"name": SOURCE, "url": "https://arxiv.org/abs/2505.19427"},
    }
    return {"metrics": METRICS, "model-index": [{"name": name, "results": [result]}]}


def merged(metadata: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The two keys of a card that is brought up to date: figures of ours are made anew, those of others stay.

    `made` is what `figures` gives, or nothing where nothing is measured.
    """
    theirs = [entry for entry in map(_theirs, _dicts(metadata.get("model-index"))) if entry is not None]
    index = [*made.get("model-index", ()), *theirs]
    named = metadata.get("metrics")
    own = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    names = list(dict.fromkeys([*made.get("metrics", ()), *own]))
    return {key: value for key, value in (("metrics", names), ("model-index", index)) if value}


def _theirs(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """An entry of a model-index without results of ours; None where it had no others."""
    results = [result for result in _dicts(entry.get("results")) if _source(result) != SOURCE]
    return {**entry, "results": results} if results else None


def _source(result: Mapping[str, Any]) -> Any:
    source = result.get("source")
    return source.get("name") if isinstance(source, dict) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

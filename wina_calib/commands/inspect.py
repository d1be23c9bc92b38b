"""`wina-calib inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import json_option, revision_option, trust_option
from wina_calib.commands.output import emit
from wina_calib.common.text import percent, table

if TYPE_CHECKING:
    from wina_calib.checkpoint.reader import Checkpoint


@click.command("inspect")
@click.argument("checkpoint", metavar="DIR")
@click.option("--weights/--no-weights", default=True, show_default=True, help="Read all weights to verify them.")
@revision_option
@trust_option
@json_option
def command(checkpoint: str, weights: bool, revision: str | None, as_json: bool) -> None:
    """Say what is in a calibrated checkpoint, verified.

    \b
    Example:
      wina-calib inspect demo-sparse --json
    """
    load_libraries()
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.model.locate import resolve

    folder, _ = resolve(checkpoint, revision=revision)
    opened = open_checkpoint(Path(folder))
    if weights:
        opened.verify_weights()
    facts = describe(opened, verified=weights)
    emit(facts, render(facts), as_json=as_json)


def describe(opened: Checkpoint, *, verified: bool) -> dict[str, Any]:
    """The facts of a checkpoint."""
    from wina_calib.budgets.count import count_cells
    from wina_calib.masks.thresholds import site_sparsity

    settings, arch = opened.settings, opened.architecture
    cells = count_cells(arch, settings.transform)
    sites = []
    for layer, site in arch.sites:
        stored = opened.site(layer, site)
        sites.append(
            {
                "layer": layer.index,
                "site": site.name,
                "sparsity": site_sparsity(settings.anchors, stored.budget.numpy(), settings.sparsity),
                "thresholds": {name: float(value) for name, value in stored.thresholds.items()},
                "error": [round(float(e), 6) for e in stored.error],
            }
        )
    return {
        "folder": str(opened.folder),
        "model_type": arch.model_type,
        "layers": len(arch.layers),
        "weights_verified": verified,
        "bytes": sum(info.nbytes for info in opened.shards.values()),
        "read_fraction": cells.read_fraction_at(settings.sparsity),
        "read_fraction_decoder": cells.read_fraction_at(settings.sparsity, lm_head=False),
        "runtime_matrices": cells.runtime_matrices,
        "fitted_anchors": list(settings.fitted_anchors),
        "settings": settings.to_dict(),
        "sites": sites,
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as text."""
    settings = facts["settings"]
    rows = [
        ["base model", str(settings["provenance"].get("base_model"))],
        ["structure", f"{facts['model_type']}, {facts['layers']} layers"],
        ["sparsity", f"{percent(settings['sparsity'])} (fitted at {', '.join(map(percent, facts['fitted_anchors']))})"],
        ["score, masks, selection", ", ".join(settings[key] for key in ("score", "masks", "select"))],
        ["transform", f"{settings['transform']} ({facts['runtime_matrices']:,} run-time weights)"],
        ["budget", settings["budget"]],
        ["read fraction", f"{percent(facts['read_fraction'])}, decoder {percent(facts['read_fraction_decoder'])}"],
        [
            "data",
            f"{', '.join(settings['provenance'].get('data', []))} ({settings['provenance'].get('blocks')} blocks)",
        ],
        ["weights", "verified" if facts["weights_verified"] else "not read"],
    ]
    sites = [
        [f"{s['layer']}", s["site"], f"{s['sparsity']:.3f}", " ".join(f"{t:.4g}" for t in s["thresholds"].values())]
        for s in facts["sites"]
    ]
    return table(["", ""], rows) + "\n\n" + table(["layer", "site", "sparsity", "threshold"], sites)

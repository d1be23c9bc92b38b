"""`wina-calib inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import json_option, revision_option, trust_option
from wina_calib.commands.output import emit, note
from wina_calib.common.text import percent, table

if TYPE_CHECKING:
    from wina_calib.checkpoint.reader import Checkpoint


@click.command("inspect")
@click.argument("checkpoint", metavar="DIR")
@click.option("--full", is_flag=True, help="List every site of every layer.")
@click.option("--weights/--no-weights", default=True, show_default=True, help="Read all weights to verify them.")
@revision_option
@trust_option
@json_option
def command(checkpoint: str, full: bool, weights: bool, revision: str | None, as_json: bool) -> None:
    """Say what is in a calibrated checkpoint, verified.

    \b
    Examples:
      wina-calib inspect demo-sparse
      wina-calib inspect demo-sparse --full
    """
    load_libraries()
    from wina_calib.checkpoint.reader import open_checkpoint
    from wina_calib.model.locate import resolve

    folder, _ = resolve(checkpoint, revision=revision)
    opened = open_checkpoint(Path(folder))
    if weights:
        opened.verify_weights()
    facts = describe(opened, verified=weights)
    if facts["warning"] is not None:
        note(f"warning: {facts['warning']}.")
    emit(facts, render(facts, full=full), as_json=as_json)


def describe(opened: Checkpoint, *, verified: bool) -> dict[str, Any]:
    """The facts of a checkpoint."""
    from wina_calib.checkpoint.format import stored_cells
    from wina_calib.checkpoint.verdict import Verdict
    from wina_calib.masks.thresholds import site_sparsity

    settings, arch = opened.settings, opened.architecture
    cells = stored_cells(arch, settings)
    at = opened.dropped(settings.sparsity)
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
    verdict = Verdict.from_facts(settings.provenance)
    return {
        "folder": str(opened.folder),
        "base_model": settings.base_model,
        "data": list(settings.data),
        "anchors": list(settings.anchors),
        "model_type": arch.model_type,
        "layers": len(arch.layers),
        "weights_verified": verified,
        "bytes": sum(info.nbytes for info in opened.shards.values()),
        "read_fraction": cells.read_fraction_at(at),
        "read_fraction_decoder": cells.read_fraction_at(at, lm_head=False),
        "bits_read": cells.bits_read_at(at),
        "runtime_matrices": cells.runtime_matrices,
        "fitted_anchors": list(settings.fitted_anchors),
        "verdict": None if verdict is None else verdict.to_json(),
        "warning": None if verdict is None else verdict.warning,
        "settings": settings.to_dict(),
        "sites": sites,
    }


def render(facts: dict[str, Any], *, full: bool = False) -> str:
    """The facts as text: what fits a screen, or every site too."""
    from wina_calib.checkpoint.verdict import Verdict

    settings = facts["settings"]
    rows = [
        ["base model", f"{facts['base_model']} ({facts['model_type']}, {facts['layers']} layers)"],
        ["sparsity", f"{percent(settings['sparsity'])} (fitted at {', '.join(map(percent, facts['fitted_anchors']))})"],
        ["score, masks, selection", ", ".join(settings[key] for key in ("score", "masks", "select"))],
        [
            "transform, budget",
            f"{settings['transform']} ({facts['runtime_matrices']:,} run-time weights), {settings['budget']}",
        ],
        ["read fraction", f"{percent(facts['read_fraction'])}, decoder {percent(facts['read_fraction_decoder'])}"],
        ["bits read", f"{facts['bits_read']:.2f} a decoder weight"],
        ["data", f"{', '.join(facts['data']) or 'unknown'} ({settings['provenance'].get('blocks', '?')} blocks)"],
        ["weights", "verified" if facts["weights_verified"] else "not read"],
    ]
    verdict = Verdict.from_facts(settings["provenance"])
    told = [] if verdict is None else [verdict.text()]
    return "\n\n".join([table(["", ""], rows), *told, _every_site(facts) if full else _by_site(facts)])


def _by_site(facts: dict[str, Any]) -> str:
    """A line a site: what is dropped there on average, in which layers least and most, and what that does to its output."""
    at = min(range(len(facts["anchors"])), key=lambda i: abs(facts["anchors"][i] - facts["settings"]["sparsity"]))
    rows = []
    for name in dict.fromkeys(site["site"] for site in facts["sites"]):
        own = [site for site in facts["sites"] if site["site"] == name]
        least, most = (choice(own, key=lambda site: site["sparsity"]) for choice in (min, max))
        error = sum(site["error"][at] for site in own) / len(own)
        rows.append(
            [
                name,
                percent(sum(site["sparsity"] for site in own) / len(own)),
                f"{percent(least['sparsity'])} in layer {least['layer']}",
                f"{percent(most['sparsity'])} in layer {most['layer']}",
                percent(error),
            ]
        )
    return (
        table(["site", "dropped", "least", "most", "output error"], rows)
        + f"\n\noutput error: of that site's output alone at {percent(facts['anchors'][at])}, not the model's. "
        "--full lists every site."
    )


def _every_site(facts: dict[str, Any]) -> str:
    sites = [
        [f"{s['layer']}", s["site"], f"{s['sparsity']:.3f}", " ".join(f"{t:.4g}" for t in s["thresholds"].values())]
        for s in facts["sites"]
    ]
    return table(["layer", "site", "sparsity", "threshold"], sites)

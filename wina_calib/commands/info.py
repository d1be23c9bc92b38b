"""`wina-calib info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wina_calib.commands.logs import load_libraries
from wina_calib.commands.options import json_option, revision_option
from wina_calib.commands.output import emit
from wina_calib.common.text import human_bytes, percent, table
from wina_calib.errors import UsageError

if TYPE_CHECKING:
    from wina_calib.checkpoint.hub import RemoteFacts


@click.command("info")
@click.argument("repo", metavar="USER/REPO")
@revision_option
@json_option
def command(repo: str, revision: str | None, as_json: bool) -> None:
    """Say what the checkpoint USER/REPO on the Hugging Face Hub is, without downloading weights.

    \b
    Example:
      wina-calib info USER/demo-sparse
    """
    if Path(repo).is_dir():
        raise UsageError(f"{repo} is a folder here; `wina-calib inspect {repo}` says what is in it.")
    load_libraries()
    from wina_calib.checkpoint.hub import remote_facts

    facts = remote_facts(repo, revision=revision)
    emit(to_dict(facts), render(facts), as_json=as_json)


def to_dict(facts: RemoteFacts) -> dict[str, Any]:
    """The facts for JSON."""
    return {
        "repo": facts.repo,
        "commit": facts.commit,
        "base_model": facts.base_model,
        "weights_by_reference": facts.by_reference,
        "parameters": facts.parameters,
        "runtime_matrices": facts.runtime_elements,
        "bytes": facts.total_bytes,
        "settings": facts.settings.to_dict(),
    }


def render(facts: RemoteFacts) -> str:
    """The facts as text."""
    settings = facts.settings
    weights = ", ".join(f"{count:,} {dtype}" for dtype, count in facts.parameters.items())
    rows = [
        ["checkpoint", f"{facts.repo} at {facts.commit[:12]}"],
        ["base model", facts.base_model],
        ["weights", "the base model's, by reference" if facts.by_reference else weights],
        ["size", human_bytes(facts.total_bytes)],
        ["sparsity", f"{percent(settings.sparsity)} (fitted at {', '.join(map(percent, settings.fitted_anchors))})"],
        ["score, masks, selection", f"{settings.score}, {settings.masks}, {settings.select}"],
        ["transform", f"{settings.transform} ({facts.runtime_elements:,} run-time weights)"],
        ["budget", settings.budget],
        ["data", ", ".join(settings.data) or "unknown"],
        ["format", settings.format_version],
    ]
    return table(["", ""], rows)

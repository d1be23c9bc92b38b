"""What is known of a checkpoint's base model without asking the network, for its card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wina_calib.checkpoint.card_metadata import facts_of_base
from wina_calib.checkpoint.local_paths import base_model_here, published
from wina_calib.checkpoint.settings import Settings
from wina_calib.errors import HubError
from wina_calib.model.locate import DEMO, demo_folder
from wina_calib.storage.hub_client import fetch, is_repo_name

_COMMIT = re.compile(r"[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Base:
    """The base model: its Hub id where it has one, the name to show, and the metadata of its own card."""

    repo: str | None
    commit: str | None
    shown: str
    metadata: dict[str, Any]


def find_base(settings: Settings, metadata: Mapping[str, Any] | None = None) -> Base:
    """What is known of the base model without asking the network, by the calibration or by the card that people filled."""
    name, commit = settings.provenance.get("base_model"), settings.provenance.get("base_commit")
    name = name if isinstance(name, str) else "unknown"
    told = (metadata or {}).get("base_model")
    told = told[0] if isinstance(told, list) and told else told  # of a merge the Hub takes several
    if isinstance(told, str) and "/" in told and is_repo_name(told) and told != name:
        return Base(told, None, told, _cached_facts(told, None))
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not is_repo_name(name):
        local = demo_folder() if name == DEMO else base_model_here(settings.weights, name)
        shown = published(name) if local is None else local.name
        return Base(None, None, shown, facts_of_base(local) if local is not None else {})
    return Base(name, commit, name, _cached_facts(name, commit))


def _cached_facts(repo: str, commit: str | None) -> dict[str, Any]:
    """Facts from the card of a model of the Hub that is in the cache; none where it is not."""
    try:
        return dict(facts_of_base(fetch(repo, revision=commit, local_files_only=True)[0]))
    except HubError:
        return {}

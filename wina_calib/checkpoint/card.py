"""The model card of a checkpoint, made from its facts.

What stands between two marks is made anew; the rest of an existing README.md, and metadata that people set, stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wina_calib.checkpoint.base_model import Base, find_base
from wina_calib.checkpoint.card_figures import figures
from wina_calib.checkpoint.card_figures import merged as merged_figures
from wina_calib.checkpoint.card_metadata import CARD, head, split_card
from wina_calib.checkpoint.card_text import made_text
from wina_calib.checkpoint.evaluation_file import read_evaluation
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.checkpoint.settings import Settings
from wina_calib.common.atomic import write_file
from wina_calib.corpus.sources import catalogue
from wina_calib.model.folder import is_reference
from wina_calib.storage.hub_client import is_repo_name

TAGS = ("wina", "activation-sparsity", "arxiv:2505.19427")
BEGIN = "<!-- wina_calib: made from the checkpoint's facts up to the end mark; write your own text outside -->"
END = "<!-- wina_calib: end -->"
_LICENCE = ("license", "license_name", "license_link")
_UNKNOWN_LICENCE = "licence-of-the-base-model"


def write_card(
    folder: Path, *, repo: str | None = None, name: str | None = None, base_model: str | None = None
) -> None:
    """Write README.md into a checkpoint's folder, or bring it up to date; nothing is asked of the network.

    Args:
        folder: the checkpoint.
        repo: its repository on the Hub, which the examples then name; else they name the folder.
        name: the folder's name once it is published, where it has another one yet.
        base_model: the base model's id on the Hub, in place of what is known of it.

    Raises:
        CheckpointError: the checkpoint is damaged, or README.md begins with metadata that is no YAML.
    """
    opened = open_checkpoint(folder)
    path = folder / CARD
    metadata, text = split_card(path) if path.is_file() else ({}, "")
    if base_model is not None:
        metadata = metadata | {"base_model": base_model}
    if metadata.get("license_name") == _UNKNOWN_LICENCE:  # made by us when nothing was known of it
        metadata = {key: value for key, value in metadata.items() if key not in _LICENCE}
    base = find_base(opened.settings, metadata)
    name = repo or name or Path(folder).name.removeprefix(".").removesuffix(".partial")
    measured = read_evaluation(folder)
    shown = {} if measured is None else figures(name.rpartition("/")[2], measured)
    merged = complete(metadata, made_metadata(folder, opened.settings, base), shown)
    block = f"{BEGIN}\n{made_text(opened, base, name)}\n{END}"
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + block + rest.partition(END)[2]
    else:
        text = f"{text.rstrip()}\n\n{block}\n" if text.strip() else f"# {name.rpartition('/')[2]}\n\n{block}\n"
    write_file(path, f"---\n{head(merged)}---\n{text}".encode("utf-8", "backslashreplace"))


def complete(metadata: dict[str, Any], made: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """Metadata that people set, with what is missing; tags of both, and the figures `shown` beside those of others."""
    tags = metadata.get("tags")
    own = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    theirs = {k: v for k, v in metadata.items() if v is not None and k not in ("metrics", "model-index")}
    merged = made | theirs | merged_figures(metadata, shown)
    return merged | {"tags": list(dict.fromkeys([*made["tags"], *own]))}


def made_metadata(folder: Path, settings: Settings, base: Base) -> dict[str, Any]:
    """Metadata that follows from the facts; the Hub's keys."""
    metadata: dict[str, Any] = {}
    if base.repo is not None:
        metadata |= {"base_model": base.repo, "base_model_relation": "quantized"}
    metadata |= licence(folder, base)
    reference = is_reference(folder)
    metadata |= {"library_name": "wina-calib" if reference else "transformers", "pipeline_tag": "text-generation"}
    language = base.metadata.get("language")
    if isinstance(language, str | list):
        metadata["language"] = language
    datasets = hub_datasets(settings.data)
    if datasets:
        metadata["datasets"] = datasets
    return metadata | {"tags": list(TAGS)}


def licence(folder: Path, base: Base) -> dict[str, str]:
    """The base model's licence: as its card has it, or the licence file that came with it."""
    found = {key: str(base.metadata[key]) for key in _LICENCE if isinstance(base.metadata.get(key), str)}
    files = sorted(path.name for path in folder.iterdir() if path.name.upper().startswith("LICENSE"))
    if not found and files:
        found = {"license": "other", "license_name": _UNKNOWN_LICENCE}
    if found.get("license") == "other" and "license_link" not in found and files:
        found["license_link"] = files[0]
    link = found.get("license_link")
    if link and base.repo and "://" not in link and link not in files:
        found["license_link"] = f"https://huggingface.co/{base.repo}/blob/{base.commit or 'main'}/{link}"
    return found


def hub_datasets(specs: Sequence[str]) -> list[str]:
    """Hub datasets among data specs."""
    known = catalogue()
    names = []
    for spec in specs:
        name, _, rest = str(spec).partition(":")
        if name == "hub":
            names.append(rest.partition(":")[0])
        elif name in known:
            names.append(str(known[name]["path"]))
    return list(dict.fromkeys(name for name in names if is_repo_name(name)))

"""Pushing checkpoints to the Hugging Face Hub, and finding them there. Tokens only pass through to huggingface_hub."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from wina_calib.checkpoint.base_model import find_base
from wina_calib.checkpoint.card import TAGS, write_card
from wina_calib.checkpoint.card_metadata import CARD, split_card
from wina_calib.checkpoint.format import HEAT_MAP, WINA_FILE
from wina_calib.checkpoint.local_paths import published_facts
from wina_calib.checkpoint.reader import Checkpoint, open_checkpoint, read_settings
from wina_calib.checkpoint.settings import Settings
from wina_calib.checkpoint.writer import json_bytes
from wina_calib.common import plots
from wina_calib.common.atomic import write_file
from wina_calib.common.bars import Hearing, hearing
from wina_calib.common.progress import Estimate, Part
from wina_calib.common.text import human_bytes
from wina_calib.errors import CheckpointError, HubError, UsageError
from wina_calib.model.architecture import SITES
from wina_calib.model.folder import REFERENCE_FILE, is_reference, read_config
from wina_calib.model.locate import given_name
from wina_calib.model.tensor_names import is_added, is_rotation
from wina_calib.storage.hub_client import CONFLICT, check_reachable, is_repo_name, readable_errors, status_of

_LEFT_OUT = [".*", "*.partial", "*.lock", "__pycache__/*"]
# Files of an earlier push that this folder lacks would be read beside its own, or in their place.
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "config.json", "wina_*"]
_VERIFY, _UPLOAD = "verify", "upload"
_READ_RATE, _SEND_RATE = 1e9, 2e7  # bytes a second, at a guess
_ATTEMPTS = 5


class Pushed(str):
    """The address of what was pushed, the commit, and whether anything was uploaded."""

    commit: str
    changed: bool


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
    progress: Hearing = None,
) -> Pushed:
    """Verify a checkpoint, complete its model card and upload the folder as it is.

    Args:
        folder: a checkpoint made by `calibrate`.
        repo: USER/NAME; made if it does not exist.
        private: whether a new repository is private; None is the account's default.
        revision: branch to push to; made if it does not exist.
        create_pr: open a pull request instead of committing.
        message: the commit's message.
        base_model: id of the base model on the Hub, for the card; needed where it was calibrated from a local folder.
        token: as huggingface_hub takes it; None is the one of `hf auth login` or HF_TOKEN.
        progress: as `wina_calib.common.bars.hearing` takes it: True for a bar.

    Returns:
        The repository's address, or the pull request's: a text, with `commit` and `changed` beside it.

    Raises:
        UsageError: `repo` lacks the user, or `base_model` is no id.
        CheckpointError: the folder is damaged; nothing was uploaded.
        HubError: the Hub refused, or cannot be reached. What was uploaded of large files is not sent again.

    Example:
        ```python
        wina_calib.push_to_hub("demo-sparse", "USER/demo-sparse", private=True)
        ```
    """
    check_names(repo, base_model)
    folder, api = Path(given_name(folder)), HfApi(token=token)
    with hearing(progress) as report:
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0
        upload = f"{_UPLOAD} {human_bytes(size)}"
        report.planned(Estimate((Part(_VERIFY, 1, size / _READ_RATE), Part(upload, 1, size / _SEND_RATE))))
        report.phase(_VERIFY, 1)
        prepare(folder, repo, base_model=base_model, api=api)
        report.step("weights and card")
        # How fast the disk was says nothing of the network: no time is told.
        report.planned(Estimate((Part(upload, 1),)))
        report.phase(upload, 1)
        with readable_errors(repo, revision, kept=", and nothing was sent"):
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        with readable_errors(repo, revision, kept="; what was sent of large files is not sent again"):
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            for attempt in range(_ATTEMPTS):
                before = api.model_info(name, revision=revision).sha
                try:
                    done = api.upload_folder(
                        repo_id=name,
                        folder_path=folder,
                        revision=revision,
                        create_pr=create_pr,
                        parent_commit=before,
                        commit_message=message or "Upload activation sparsity calibrated by wina_calib",
                        ignore_patterns=_LEFT_OUT,
                        delete_patterns=_REPLACED,
                    )
                    break
                except HfHubHTTPError as error:
                    # Two pushes at a time must not leave a mixture of their files: the later one starts over.
                    if status_of(error) != CONFLICT or attempt == _ATTEMPTS - 1:
                        raise
        report.step(name)
    url = done.pr_url if create_pr and done.pr_url else f"{api.endpoint}/{name}"
    if revision is not None and not create_pr:
        url += f"/tree/{revision}"
    pushed = Pushed(url)
    pushed.commit, pushed.changed = done.oid, done.oid != before
    return pushed


def check_names(repo: str, base_model: str | None = None) -> None:
    """Refuse names that no push can be meant by.

    Raises:
        UsageError: `repo` lacks the user, or `base_model` is no id.
    """
    if not all(repo.partition("/")):
        raise UsageError(
            f"{repo!r} does not say whose repository it is; expected USER/REPO, such as USER/{repo.strip('/')}."
        )
    if base_model is not None and ("/" not in base_model or not is_repo_name(base_model)):
        raise UsageError(f"--base-model is {base_model!r}; expected the id of a model on the Hub, USER/NAME.")


def _publish_facts(opened: Checkpoint) -> None:
    """Take paths of this machine out of a config that an earlier version wrote them into."""
    facts = published_facts(opened.settings.provenance)
    if facts != opened.settings.provenance and not is_reference(opened.folder):
        raw = read_config(opened.folder)
        raw["quantization_config"]["provenance"] |= facts
        write_file(opened.folder / "config.json", json_bytes(raw))


def known_base(folder: Path) -> str | None:
    """The id of a checkpoint's base model on the Hub, by its calibration or its card; None where neither has one."""
    opened = open_checkpoint(folder)
    path = folder / CARD
    return find_base(opened.settings, split_card(path)[0] if path.is_file() else None).repo


def prepare(folder: Path, repo: str, *, base_model: str | None = None, api: HfApi | None = None) -> None:
    """Verify a checkpoint with all its weights, draw its budget where that is possible, and complete its card.

    The card of a base model that the user names is fetched for its licence and languages, where the Hub gives it.

    Raises:
        CheckpointError: it is damaged.
        UsageError: it refers to weights that are on no Hub.
    """
    opened = open_checkpoint(folder)
    opened.verify_weights()
    _publish_facts(opened)
    if is_reference(folder) and opened.settings.provenance.get("base_commit") is None:
        raise UsageError(
            f"{folder} refers to weights in a local folder, which nobody else has. Calibrate the base model by its Hub "
            "id, or without --weights reference."
        )
    if plots.available():
        sparsity = opened.settings.sparsity
        picture = plots.heat_map(opened.sparsities(sparsity), SITES, f"site sparsity at model sparsity {sparsity:g}")
        write_file(folder / HEAT_MAP, picture)
    if base_model is not None and api is not None:
        with suppress(HubError), readable_errors(base_model):
            api.hf_hub_download(base_model, CARD)
    write_card(folder, repo=repo, base_model=base_model)


@dataclass(frozen=True)
class Listed:
    """A checkpoint on the Hub, as far as a search tells."""

    repo: str
    base_model: str | None
    private: bool
    downloads: int
    modified: str


def list_checkpoints(user: str | None = None, *, limit: int = 100, token: str | bool | None = None) -> list[Listed]:
    """Checkpoints on the Hub that carry the tag `wina`, the latest first.

    Args:
        user: only those of this user or organisation.
        limit: at most so many.
        token: as huggingface_hub takes it; with it, private ones are listed too.

    Raises:
        HubError: the Hub cannot be reached or refuses.
    """
    with readable_errors(user or "the Hub"):
        check_reachable()
        models = HfApi(token=token).list_models(
            author=user, filter=TAGS[0], sort="last_modified", limit=limit, cardData=True, full=True
        )
        return [
            Listed(
                repo=model.id,
                base_model=_base_of(model.card_data),
                private=bool(model.private),
                downloads=int(model.downloads or 0),
                modified=model.last_modified.date().isoformat() if model.last_modified else "",
            )
            for model in models
        ]


@dataclass(frozen=True)
class RemoteFacts:
    """What a remote checkpoint is, learned without its weights."""

    repo: str  # its name
    commit: str  # the commit looked at
    base_model: str  # as its card names it, or as its calibration does
    settings: Settings  # its calibration
    by_reference: bool  # whether the weights are the base model's
    parameters: dict[str, int]  # elements of the weights, run-time matrices left out, by dtype
    runtime_elements: int  # elements of run-time matrices
    total_bytes: int  # bytes of all tensors


def remote_facts(repo: str, *, revision: str | None = None, token: str | bool | None = None) -> RemoteFacts:
    """Facts of a checkpoint on the Hub from its config and the headers of its safetensors files.

    Raises:
        HubError: it cannot be had.
        CheckpointError: it is not a calibrated checkpoint.
    """
    api = HfApi(token=token)
    with readable_errors(repo, revision):
        about = api.model_info(repo, revision=revision)
        commit = str(about.sha)
        names = {file.rfilename for file in about.siblings or ()}
        if WINA_FILE not in names:
            raise CheckpointError(f"{repo} is not calibrated: it has no {WINA_FILE}.")
        config = REFERENCE_FILE if REFERENCE_FILE in names else "config.json"
        folder = Path(api.hf_hub_download(repo, config, revision=commit)).parent
        headers = [
            api.parse_safetensors_file_metadata(repo, name, revision=commit)
            for name in sorted(names)
            if name.endswith(".safetensors") and "/" not in name
        ]
    parameters: Counter[str] = Counter()
    runtime = total = 0
    for header in headers:
        for name, tensor in header.tensors.items():
            total += tensor.data_offsets[1] - tensor.data_offsets[0]
            if is_rotation(name):
                runtime += tensor.parameter_count
            elif not is_added(name):
                parameters[tensor.dtype] += tensor.parameter_count
    settings = read_settings(folder)
    base = _base_of(about.card_data) or settings.base_model
    return RemoteFacts(repo, commit, base, settings, config == REFERENCE_FILE, dict(parameters), runtime, total)


def _base_of(card: object) -> str | None:
    base = getattr(card, "base_model", None)
    return base[0] if isinstance(base, list) and base else base if isinstance(base, str) else None

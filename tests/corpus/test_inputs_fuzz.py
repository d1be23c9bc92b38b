"""Hostile data specs, text files and configs: whatever comes in, only our errors come out, soon and in little memory."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from hostile import ODD, only_our_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wina_calib.checkpoint.settings import Settings
from wina_calib.corpus.sources import check_spec, documents, is_local
from wina_calib.errors import WinaError
from wina_calib.model.folder import load_config
from wina_calib.model.loading import describe_config

FUNCTION_SCOPED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
PARTS = [
    "builtin", "heldout", "calibration", "prose", "hub", "wikitext", "c4", ":", "::", "/", "..", "~", "\0", ".txt",
    "a.txt", "a.jsonl", "a.parquet", "/dev/zero", "/proc/self/mem", "*", "%s", "{}", "é", "\ud800", " ", "x" * 300,
]  # fmt: skip
SPECS = st.lists(st.sampled_from(PARTS) | st.text(max_size=6), max_size=6).map("".join)
VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(ODD)
    | st.lists(st.integers(-2, 2**40) | st.text(max_size=3), max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), st.integers() | st.text(max_size=3))
)


def printable(action: Any) -> None:
    """Run `action`; a message of ours must be fit for a terminal."""
    try:
        action()
    except WinaError as error:
        str(error).encode("utf-8")
        assert len(str(error)) < 2000
        raise


@settings(max_examples=2000, deadline=None)
@given(spec=SPECS)
def test_data_specs(spec: str) -> None:
    refused = only_our_errors(lambda: printable(lambda: check_spec(spec)))
    assert not (refused and is_local(spec))


@settings(max_examples=1000, deadline=None, suppress_health_check=FUNCTION_SCOPED)
@given(
    kind=st.sampled_from(["txt", "jsonl", "parquet"]),
    field=st.sampled_from(["", ":text", ":messages", ":x"]),
    lines=st.lists(
        st.binary(max_size=30)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "role"]), VALUES | st.just([{"role": 1}]), max_size=3
        ).map(lambda row: json.dumps(row).encode()),
        max_size=4,
    ),
)
def test_text_files(tmp_path: Path, kind: str, field: str, lines: list[bytes]) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(b"\n".join(lines))

    def read() -> None:
        for text in documents(f"{file}{field}"):
            text.encode("utf-8")

    only_our_errors(lambda: printable(read))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The config.json of one tiny model a family."""
    folder = tmp_path_factory.mktemp("configs")
    found = {}
    for family in tiny.FAMILIES:
        tiny.make(family, num_hidden_layers=1).config.save_pretrained(folder)
        found[family] = json.loads((folder / "config.json").read_text())
    return found


@settings(max_examples=600, deadline=None, suppress_health_check=FUNCTION_SCOPED)
@given(family=st.sampled_from(tiny.FAMILIES), changes=st.data())
def test_model_configs(tmp_path: Path, configs: dict[str, dict[str, Any]], family: str, changes: st.DataObject) -> None:
    config = dict(configs[family])
    for key in changes.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = changes.draw(VALUES)
    (tmp_path / "config.json").write_text(json.dumps(config))
    only_our_errors(lambda: printable(lambda: describe_config(load_config(tmp_path))))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2**31},
        {"hidden_size": 2**40},
        {"head_dim": 2**40},
        {"intermediate_size": 1e30},
        {"vocab_size": 2**62},
        {"max_position_embeddings": 2**62},
        {"layer_types": ["full_attention"] * 200_000},
        {"num_attention_heads": 0},
        {"hidden_size": 0},
        {"rope_parameters": {"rope_type": "yarn", "factor": 1e300}},
        {"model_type": "wina_calib-wina_calib-llama"},
        {"num_hidden_layers": float("nan")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_absurd_model_configs(tmp_path: Path, configs: dict[str, dict[str, Any]], change: dict[str, Any]) -> None:
    for family in ("llama", "gemma3"):
        (tmp_path / "config.json").write_text(json.dumps(configs[family] | change))
        only_our_errors(lambda: printable(lambda: describe_config(load_config(tmp_path))))


@settings(max_examples=1500, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(Settings(0.5, (0.5,)).to_dict())), VALUES, max_size=3))
def test_calibration_settings(changes: dict[str, Any]) -> None:
    raw = Settings(0.5, (0.25, 0.5)).to_dict() | changes

    def read() -> None:
        found = Settings.from_dict(raw)
        assert 0 <= found.sparsity < 1
        with suppress(WinaError):
            Settings.from_dict(found.to_dict())

    only_our_errors(lambda: printable(read))

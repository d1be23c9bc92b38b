"""The format of docs/format.md, byte for byte, and its verifying reader."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import wina_calib
from wina_calib.checkpoint.format import expected_tensors
from wina_calib.checkpoint.reader import open_checkpoint, read_settings
from wina_calib.checkpoint.settings import FORMAT_VERSION, Settings
from wina_calib.checkpoint.writer import write_wina_file
from wina_calib.errors import CheckpointError


@pytest.fixture
def copy(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "copy"))


def edit(folder: Path, change: object) -> None:
    """Change the settings in config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_files(calibrated: Path) -> None:
    names = {p.name for p in calibrated.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "wina.safetensors",
    }


def test_wina_file_is_pinned(calibrated: Path) -> None:
    """Names, dtypes, shapes and metadata of the added tensors, as docs/format.md lists them."""
    with safe_open(calibrated / "wina.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "producer": "wina_calib",
            "producer_version": wina_calib.__version__,
            "wina_format": "1.0",
        }
        slices = {name: file.get_slice(name) for name in list(file.keys())}
        found = {name: tuple(part.get_shape()) for name, part in slices.items()}
        assert {part.get_dtype() for part in slices.values()} == {"F32"}
    sites = {"attn_in": (64, 3), "attn_out": (64, 1), "mlp_in": (64, 2), "mlp_out": (128, 1)}
    expected = {"model.layers.0.wina.ends.sample": (3, 32)}
    for layer in range(3):
        expected[f"model.layers.{layer}.wina.others.sample"] = (2, 32)
        for site, (width, projections) in sites.items():
            path = f"model.layers.{layer}.wina.{site}"
            expected |= {
                f"{path}.budget": (3,),
                f"{path}.error": (3,),
                f"{path}.sample": (projections, 32),
                f"{path}.shared.norm": (width,),
                f"{path}.shared.table": (3, 201),
                f"{path}.shared.threshold": (),
            }
    assert found == expected
    index = json.loads((calibrated / "model.safetensors.index.json").read_text())
    assert {n for n, f in index["weight_map"].items() if f == "wina.safetensors"} == set(expected)


def test_the_order_of_the_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    """What was saved on the way comes back in another order than what was just computed."""
    names = [f"model.layers.{i}.wina.{kind}" for i in (0, 2, 10) for kind in ("a.budget", "a.k.norm", "a.q.norm")]
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    write_wina_file(tmp_path / "a", tensors)
    write_wina_file(tmp_path / "b", {name: tensors[name] for name in reversed(names)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert list(file.offset_keys()) == names  # layer 10 after layer 2


def test_config_is_pinned(calibrated: Path, llama: Path) -> None:
    config = json.loads((calibrated / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert list(section) == [
        "quant_method", "sparsity", "anchors", "score", "masks", "exponent", "transform", "budget", "prefill",
        "select", "first_token", "curve_levels", "weights", "samples", "whole_layers", "vocab",
        "provenance", "format_version",
    ]  # fmt: skip
    assert section["quant_method"] == "wina"
    assert section["format_version"] == FORMAT_VERSION == "1.0"
    assert section["anchors"] == [0.25, 0.5, 0.65]


def test_stored_values_mean_what_they_say(calibrated: Path, llama: Path) -> None:
    opened = open_checkpoint(calibrated)
    weights = load_file(calibrated / "model-00001-of-00001.safetensors")
    stacked = torch.cat([weights[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"])
    tensors = opened.tensors
    path = "model.layers.1.wina.attn_in"
    assert torch.allclose(tensors[f"{path}.shared.norm"], stacked.norm(dim=0), rtol=1e-5)
    table = tensors[f"{path}.shared.table"]
    assert torch.equal(tensors[f"{path}.shared.threshold"], table[1, 100])
    assert (table.diff(dim=1) >= 0).all()
    row, column = 5 * 64 // 32, (5 * 40_503 + 7_919) % 64
    assert tensors[f"{path}.sample"][0, 5] == weights["model.layers.1.self_attn.q_proj.weight"][row, column]
    gain = weights["model.layers.1.post_attention_layernorm.weight"]
    assert tensors["model.layers.1.wina.others.sample"][1, 5] == gain[5 * 64 // 32]
    assert tensors[f"{path}.budget"].tolist() == pytest.approx([0.25, 0.5, 0.65])
    opened.verify_weights()


def test_weights_keep_their_bytes_and_layout(calibrated: Path, llama: Path) -> None:
    before = {k: v for f in sorted(llama.glob("*.safetensors")) for k, v in load_file(f).items()}
    after = load_file(calibrated / "model-00001-of-00001.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


def test_side_files_are_copied_as_they_are(calibrated: Path, llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (calibrated / name).read_bytes() == (llama / name).read_bytes()


def test_tied_embeddings_stay_tied(tmp_path: Path, text: Path) -> None:
    tiny.save("llama", tmp_path / "m", tie_word_embeddings=True)
    tiny.calibrate(tmp_path / "m", tmp_path / "s", text, transform="none")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "s").shards
    model = wina_calib.load(tmp_path / "s")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_missing_tensors_are_noticed(copy: Path) -> None:
    tensors = load_file(copy / "wina.safetensors")
    tensors.pop("model.layers.2.wina.mlp_out.shared.norm")
    save_file(tensors, copy / "wina.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="wina"):
        open_checkpoint(copy)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.2.wina.mlp_out.shared.norm"]
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    for opener in (open_checkpoint, wina_calib.load):
        with pytest.raises(CheckpointError, match=r"1 of 76 .* model\.layers\.2\.wina\.mlp_out\.shared\.norm"):
            opener(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_noticed(copy: Path, value: float) -> None:
    tensors = load_file(copy / "wina.safetensors")
    tensors["model.layers.0.wina.attn_in.shared.norm"][5] = value
    save_file(tensors, copy / "wina.safetensors", {"format": "pt"})
    for opener in (open_checkpoint, wina_calib.load):
        with pytest.raises(CheckpointError, match=r"attn_in\.shared\.norm holds NaN"):
            opener(copy)


def test_wrong_shapes_are_noticed(copy: Path) -> None:
    tensors = load_file(copy / "wina.safetensors")
    tensors["model.layers.0.wina.attn_in.shared.norm"] = torch.ones(63)
    save_file(tensors, copy / "wina.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape \(63,\), expected \(64,\)"):
        open_checkpoint(copy)


def test_foreign_weights_are_noticed(copy: Path) -> None:
    file = copy / "model-00001-of-00001.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.o_proj.weight"] = torch.randn(64, 64)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="not those"):
        open_checkpoint(copy).verify_weights()
    with pytest.raises(wina_calib.WinaError, match="not those"):
        wina_calib.load(copy)


def test_newer_major_formats_are_refused(copy: Path) -> None:
    edit(copy, lambda section: section.update(format_version="1.7", something_new=1))
    assert read_settings(copy).sparsity == 0.5
    edit(copy, lambda section: section.update(format_version="3.0"))
    for opener in (open_checkpoint, wina_calib.load):
        with pytest.raises(CheckpointError, match=r"format 3\.0.*Update"):
            opener(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparsity", 1.5), ("sparsity", 10**400), ("sparsity", "high"), ("anchors", []), ("anchors", [0.5, 0.25]),
     ("score", "wine"), ("masks", 3), ("format_version", None), ("prefill", "no"), ("provenance", [1]), ("exponent", "x")],
)  # fmt: skip
def test_wrong_settings_are_refused(copy: Path, key: str, value: object) -> None:
    edit(copy, lambda section: section.update({key: value}))
    with pytest.raises(CheckpointError, match=key):
        read_settings(copy)


def test_settings_round_trip(calibrated: Path) -> None:
    settings = read_settings(calibrated)
    assert Settings.from_dict(settings.to_dict()) == settings
    assert json.loads(json.dumps(settings.to_dict())) == settings.to_dict()


def test_not_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not calibrated"):
        open_checkpoint(llama)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_saved_and_loaded_again_is_bit_equal(calibrated: Path, tmp_path: Path) -> None:
    model = wina_calib.load(calibrated, sparsity=0.4)
    ids = torch.randint(4, 300, (2, 20))
    model.save_pretrained(tmp_path / "again")
    again = wina_calib.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_expected_tensors_follow_the_masks(calibrated: Path) -> None:
    opened = open_checkpoint(calibrated)
    separate = Settings(sparsity=0.5, anchors=(0.5,), masks="per-projection", curve_levels=(0.0, 0.5))
    names = expected_tensors(opened.architecture, separate)
    assert names["model.layers.0.wina.attn_in.k_proj.table"] == (1, 201)
    assert names["model.layers.0.wina.mlp_in.curve"] == (2,)


def test_a_link_out_of_the_model_folder_is_not_copied(tmp_path: Path, llama: Path, text: Path) -> None:
    """A published checkpoint must not hold a private file that a stranger's model folder linked to."""
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "m" / "notes.txt").symlink_to(tmp_path / "secret")
    heard = Mock()
    with pytest.raises(CheckpointError, match="leaves the folder"):
        wina_calib.calibrate(
            tmp_path / "m",
            tmp_path / "s",
            data=str(text),
            samples=64,
            seq_len=128,
            progress=heard,
            sparsity=0.5,
            grid=(0.25, 0.5, 0.65),
        )
    heard.planned.assert_not_called()  # before any work
    assert not (tmp_path / "s").exists()

"""Calibrations of tiny random models of every family with random options; what must hold of every result.

`WINA_SOAK=300 python -m pytest -m soak` makes more of them.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner

import wina_calib
from wina_calib.checkpoint.reader import open_checkpoint
from wina_calib.choices import TRANSFORMS
from wina_calib.cli import main
from wina_calib.corpus.blocks import load_blocks
from wina_calib.errors import TransformError
from wina_calib.runtime.load import runtime_state

NUMBER = int(os.environ.get("WINA_SOAK", "30"))
pytestmark = pytest.mark.soak


def random_shape(rng: random.Random, family: str) -> dict[str, Any]:
    """Changes to a family's config."""
    heads = rng.choice([2, 4])
    shape = {
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "intermediate_size": rng.choice([96, 128, 200]),
        "tie_word_embeddings": rng.random() < 0.5,
        "seed": rng.randrange(1000),
    }
    if family in ("qwen3", "gemma2", "gemma3"):
        shape["head_dim"] = rng.choice([16, 32])
    if family == "llama":
        shape |= {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3}
    return shape


def random_options(rng: random.Random) -> dict[str, Any]:
    """Options of a calibration."""
    transform = rng.choice(TRANSFORMS)
    options = {
        "sparsity": round(rng.uniform(0.05, 0.85), 3),
        "grid": tuple(sorted(round(rng.uniform(0.05, 0.85), 3) for _ in range(rng.choice([0, 1, 2])))),
        "transform": transform,
        "budget": rng.choice(["uniform", "global"]),
        "score": rng.choice(["wina", "wina", "teal", "weight", "random"]),
        "masks": rng.choice(["shared", "per-projection"]),
        "exponent": rng.choice([1.0, 0.5, 2.0]),
        "select": rng.choice(["threshold", "threshold", "topk"]),
        "loop": rng.choice(["closed", "closed", "open"]),
        "first_token": rng.choice(["dense", "sparse"]),
        "prefill": rng.choice(["sparse", "dense"]),
        "weights": rng.choice(["full", "full", "reference"]) if transform == "none" else "full",
        "micro_batch": rng.choice([0, 1, 7]),
        "seed": rng.randrange(100),
        "samples": 72,
        "seq_len": 128,
    }
    if rng.random() < 0.2:
        options["max"] = ("0.93", "layers.*.mlp_out=0.9")
    return options


def calibrate(model: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Calibrate; where the drawn transform is not exact, it must say so and the automatic one must do."""
    try:
        wina_calib.calibrate(model, out, **options)
    except TransformError as error:
        assert "not exact" in str(error)
        options = options | {"transform": "auto"}
        wina_calib.calibrate(model, out, **options)
    return options


@pytest.mark.parametrize("number", range(NUMBER))
def test_random_calibration(number: int, tmp_path: Path, text: Path) -> None:
    rng = random.Random(number)
    family = tiny.FAMILIES[number % len(tiny.FAMILIES)]
    dense = tiny.save(family, tmp_path / "m", **random_shape(rng, family))
    options = calibrate(tmp_path / "m", tmp_path / "s", random_options(rng) | {"data": str(text)})
    asked, settings = options["sparsity"], open_checkpoint(tmp_path / "s").settings

    # The same again gives the same bytes.
    (tmp_path / "again").mkdir()
    wina_calib.calibrate(tmp_path / "m", tmp_path / "again" / "s", **options)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again" / "s").iterdir())
    for name in names:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "again" / "s" / name).read_bytes(), name

    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "s"), "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert facts["weights_verified"]
    assert facts["settings"]["sparsity"] == asked

    sparse = wina_calib.load(tmp_path / "s")
    ids = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        expected = dense(ids).logits
        assert bool(torch.isfinite(sparse(ids).logits).all())
        for wanted in (0.1, 0.5, 0.8, asked):
            assert wina_calib.set_sparsity(sparse, wanted) == pytest.approx(wanted, abs=0.005)
        assert wina_calib.set_sparsity(sparse, 0.0) == 0.0
        fused = sparse(ids).logits
        runtime_state(sparse).kernels = "reference"
        found = sparse(ids).logits
        runtime_state(sparse).kernels = "auto"
    if settings.transform == "none":
        assert torch.equal(found, expected)
    # A mask group's outputs are views of one product. Torch rounds an activation of such a view otherwise in the columns
    # that are left over by its vectors, so a width of 200 is not equal to the bit.
    assert distance(fused, expected) < (1e-6 if settings.transform == "none" else 1e-4)
    assert distance(found, expected) < 1e-4

    wina_calib.set_sparsity(sparse, asked)
    if options["prefill"] == "sparse" and options["score"] in ("wina", "teal") and options["loop"] == "closed":
        assert achieved(sparse, text, options) == pytest.approx(asked, abs=0.02)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what is expected."""
    return float((found - expected).norm() / expected.norm())


def achieved(model: Any, text: Path, options: dict[str, Any]) -> float:
    """Weight-averaged sparsity on the calibration's text."""
    blocks = load_blocks([str(text)], tiny.tokenizer(), samples=72, seq_len=128, seed=options["seed"])
    with runtime_state(model).counting() as counts, torch.no_grad():
        for ids in blocks.ids.split(8):
            model(ids, use_cache=False)
    rows = 127 if options["first_token"] == "dense" else 128
    weights = {(layer.index, site.name): site.weights for layer, site in model_sites(model)}
    total = sum(weights.values())
    return sum(counts[key].sparsity * 128 / rows * weight for key, weight in weights.items()) / total


def model_sites(model: Any) -> Any:
    """Layers and sites of the model that a checkpoint was made from."""
    from wina_calib.model.folder import load_config
    from wina_calib.model.loading import describe_config

    return describe_config(load_config(Path(model.name_or_path))).sites

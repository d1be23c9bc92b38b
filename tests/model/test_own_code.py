"""Models whose class is Python code in their folder: nothing of it runs unasked, and with trust every step works."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, dynamic_module_utils

import wina_calib
from wina_calib.cli import main
from wina_calib.errors import ModelFolderError, UnsupportedModel, UsageError
from wina_calib.model.folder import code_is_trusted, open_folder, remote_code
from wina_calib.model.locate import load_tokenizer
from wina_calib.model.source import open_source

CODE = {
    "configuration_own.py": """
        from transformers import LlamaConfig

        class OwnConfig(LlamaConfig):
            model_type = "own-llama"
    """,
    "modeling_own.py": """
        from pathlib import Path

        from transformers import LlamaForCausalLM

        from .configuration_own import OwnConfig

        Path("{mark}").touch()

        class OwnForCausalLM(LlamaForCausalLM):
            config_class = OwnConfig

            def forward(self, *args, **kwargs):
                out = super().forward(*args, **kwargs)
                out.logits = 2 * out.logits
                return out
    """,
}
OPTIONS = {"budget": "uniform", "samples": 80, "seq_len": 128, "grid": (0.5,), "sparsity": 0.5}
BENCH = ["--sparsity", "0.5", "--prompt", "4", "--new", "2", "--rounds", "1"]
IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the code leaves its mark, and where transformers keeps what it copies of it."""
    folder = tmp_path_factory.mktemp("own-code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(folder / "modules")
        yield folder
    for name in [m for m in sys.modules if m.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # a worker that comes back to this file has another folder


@pytest.fixture
def mark(place: Path) -> Path:
    """A file that is there once the model's code has run."""
    (place / "ran").unlink(missing_ok=True)
    return place / "ran"


@pytest.fixture(scope="module")
def own(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a model type that only its own code knows."""
    folder = tmp_path_factory.mktemp("own") / "model"
    tiny.save("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own-llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, code in CODE.items():
        text = code.replace("{mark}", str(place / "ran"))
        (folder / name).write_text("\n".join(line[8:] for line in text.splitlines()))
    return folder


@pytest.fixture(scope="module")
def sparse(own: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, calibrated with the transform that changes its weights most."""
    folder = tmp_path_factory.mktemp("sparse") / "sparse"
    wina_calib.calibrate(own, folder, data=str(text), transform="global", trust_remote_code=True, **OPTIONS)
    assert not code_is_trusted()
    return folder


def test_unasked_nothing_of_it_runs(own: Path, sparse: Path, text: Path, tmp_path: Path, mark: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"needs Python code of its own.*--trust-remote-code"):
        wina_calib.calibrate(own, tmp_path / "out", data=str(text), **OPTIONS)
    with pytest.raises(UnsupportedModel, match=r"needs Python code of its own.*trust_remote_code=True"):
        wina_calib.load(sparse)
    for arguments in (
        ["calibrate", own, "-o", tmp_path / "out"],
        ["evaluate", sparse],
        ["inspect", sparse],
        ["diagnose", sparse],
        ["transfer", sparse, sparse],
        ["bench", own],
        ["bench", sparse],
        ["generate", sparse, "a text"],
        ["push", sparse, "me/sparse"],
    ):
        done = CliRunner().invoke(main, [str(a) for a in arguments])
        assert done.exit_code == 1, arguments
        assert "needs Python code of its own" in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_trusted_it_loads_and_computes_what_its_own_class_computes(own: Path, sparse: Path, mark: Path) -> None:
    assert {name: (sparse / name).read_bytes() for name in CODE} == {name: (own / name).read_bytes() for name in CODE}
    model = wina_calib.load(sparse, trust_remote_code=True)
    assert mark.exists()
    assert type(model).__name__ == "OwnForCausalLM"
    logits = model(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(sparse, trust_remote_code=True)
    assert torch.equal(plain(IDS).logits, logits)
    wina_calib.set_sparsity(model, 0.0)
    expected = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "DIR"],
        ["generate", "DIR", "a text", "--new", "2"],
        ["export-dense", "DIR", "-o", "OUT"],
        ["bench", "DIR", *BENCH],
        ["bench", "MODEL", *BENCH],
        ["diagnose", "DIR", "--what", "propagation", "--tokens", "64"],
        ["transfer", "DIR", "DIR", "-o", "BUDGET"],
    ],
)
def test_commands_take_the_flag_for_themselves_alone(
    own: Path, sparse: Path, tmp_path: Path, command: list[str]
) -> None:
    names = {"DIR": sparse, "MODEL": own, "OUT": tmp_path / "dense", "BUDGET": tmp_path / "budget.yaml"}
    done = CliRunner().invoke(main, [*(str(names.get(word, word)) for word in command), "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    assert not code_is_trusted()


def test_methods_are_compared_on_it(own: Path, text: Path, tmp_path: Path) -> None:
    options = {"data": str(text), "heldout": str(text), "samples": 80, "seq_len": 128, "tokens": 256, "draw": False}
    found = wina_calib.compare(
        own, tmp_path / "out", methods=("teal-uniform",), sparsities=(0.5,), trust_remote_code=True, **options
    )
    assert [row.method for row in found.rows] == ["teal-uniform"]


def test_an_exported_model_keeps_its_code(sparse: Path, tmp_path: Path) -> None:
    CliRunner().invoke(main, ["export-dense", str(sparse), "-o", str(tmp_path / "dense"), "--trust-remote-code"])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", trust_remote_code=True)
    assert type(dense).__name__ == "OwnForCausalLM"


def test_the_card_says_how_to_load_it(sparse: Path) -> None:
    assert f'wina_calib.load("{sparse.name}", trust_remote_code=True)' in (sparse / "README.md").read_text()


@pytest.mark.parametrize("options", [{"transform": "paper"}, {"weights": "reference"}])
def test_what_does_not_go_with_it_is_refused_at_once(own: Path, text: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError, match="Python code of its own, which does not go with"):
        wina_calib.calibrate(own, tmp_path / "out", data=str(text), trust_remote_code=True, **OPTIONS, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["[]", "null", '"own-llama"', "3"])
def test_a_config_that_is_no_json_object_is_refused(config: str, own: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "m"))
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelFolderError, match=r"config\.json holds no JSON object"):
        open_folder(folder)


def test_code_beside_a_known_model_type_neither_runs_nor_is_copied(
    llama: Path, text: Path, tmp_path: Path, mark: Path
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "known"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(f"from pathlib import Path; Path({str(mark)!r}).touch()")
    wina_calib.calibrate(folder, tmp_path / "sparse", data=str(text), **OPTIONS)
    assert type(wina_calib.load(tmp_path / "sparse")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "sparse" / "modeling_own.py").exists()
    assert not mark.exists()


def test_a_structure_that_is_not_known_is_refused_by_name(own: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "odd"))
    path = folder / "modeling_own.py"
    path.write_text(
        path.read_text().replace(
            "    config_class = OwnConfig\n",
            "    config_class = OwnConfig\n\n    def __init__(self, config):\n        super().__init__(config)\n"
            "        import torch\n\n        self.model.layers[0].mlp.extra = torch.nn.Linear(8, 8)\n",
        )
    )
    with remote_code(True), pytest.raises(UnsupportedModel, match=r"mlp\.extra"):
        open_source(str(folder))
    assert load_tokenizer(folder)("a text")["input_ids"]  # its tokenizer needs no code

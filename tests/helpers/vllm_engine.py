"""A program that asks vLLM's engines and writes what they answered, or why they did not start.

    python vllm_engine.py REQUESTS.json ANSWERS.pt

Requests by name: `model`, `options` of the engine, `prompts` of token ids, `params` as pairs of temperature and tokens, `groups`,
how many of the prompts are given at once, each; and whether to `record` every mask. Answers by name: an `error`, or `outputs`
as pairs of token and log-probability, `counts` of the engine's, `masks` and `anew` of each prompt.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

Masks = dict[int, torch.Tensor]  # by position


class Recorder:
    """Masks by request, part of a layer and position as a process makes them, by eager steps and by operators of compiled ones;
    requests of which one was made again, another way; parts of which the process has some of the inputs alone.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.masks: dict[str, dict[str, Masks]] = {}
        self.anew: set[str] = set()
        self.names: dict[int, str] = {}
        self.shared: set[str] = set()
        for layer in runner.get_model().modules():
            for i, part in enumerate(getattr(layer, "wina_parts", ())):
                self.names[part.mask[1].data_ptr()] = f"{layer.prefix}.{i}"  # where its threshold is
                if layer.quant_method.width < layer.quant_method.inputs:
                    self.shared.add(f"{layer.prefix}.{i}")

    def start(self) -> None:
        """Note every mask from now on."""
        from wina_calib.serving.product import Prepared

        kind: Any = Prepared
        plain = kind.__call__

        def call(part: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
            self.note(part, x)
            return plain(part, x, bias)

        kind.__call__ = call
        self.stop = lambda: setattr(kind, "__call__", plain)

    def note(self, part: Any, x: torch.Tensor) -> None:
        """The masks of one call: what the kernels keep, by the rule."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        if not metadata:
            return
        known = next(iter(metadata.values()))
        starts, lengths = known.query_start_loc.tolist(), known.seq_lens.tolist()
        norm, threshold = part.mask
        keep = x.float().abs() * norm > threshold
        opened = part.open_rows(len(x))
        if opened is not None:
            keep |= opened[:, None]
        for r, request in enumerate(self.runner.input_batch.req_ids):
            masks = self.masks.setdefault(request, {}).setdefault(self.names[threshold.data_ptr()], {})
            for row in range(starts[r], starts[r + 1]):
                position = lengths[r] - (starts[r + 1] - row)
                if position in masks and not torch.equal(masks[position], keep[row]):
                    self.anew.add(request)
                masks[position] = keep[row].clone()


def start_recording(worker: Any) -> None:
    """In each process of an engine."""
    worker.wina_recorder = Recorder(worker.model_runner)
    worker.wina_recorder.start()


def stop_recording(worker: Any) -> tuple[dict[str, dict[str, Masks]], set[str], set[str]]:
    """Masks, requests with masks made again, and parts whose inputs are shared between the processes."""
    made = worker.wina_recorder
    made.stop()
    return made.masks, made.anew, made.shared


def whole_masks(made: list[tuple[dict[str, dict[str, Masks]], set[str], set[str]]], request: str) -> dict[str, Masks]:
    """The masks of a request over all inputs.

    Raises:
        ValueError: processes that have the same inputs made other masks of them.
    """
    first, _, shared = made[0]
    out: dict[str, Masks] = {}
    for name, masks in first.get(request, {}).items():
        for position in masks:
            each = [by_process[request][name][position] for by_process, _, _ in made]
            if name not in shared and not all(torch.equal(each[0], other) for other in each[1:]):
                raise ValueError(f"processes masked {name} at position {position} in other ways")
            out.setdefault(name, {})[position] = torch.cat(each) if name in shared else each[0]
    return out


def ask(llm: Any, asked: dict[str, Any]) -> list[Any]:
    """What the engine says to the prompts, group by group."""
    from vllm import SamplingParams

    outs, start = [], 0
    for count in asked.get("groups") or [len(asked["prompts"])]:
        part = slice(start, start + count)
        params = [
            SamplingParams(temperature=t, max_tokens=n, ignore_eos=True, logprobs=0) for t, n in asked["params"][part]
        ]
        outs += llm.generate([{"prompt_token_ids": p} for p in asked["prompts"][part]], params, use_tqdm=False)
        start += count
    return outs


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, ask it and end it."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {"enforce_eager": True, "max_model_len": 160, "disable_log_stats": False} | asked["options"]
    llm = None
    try:
        llm = LLM(asked["model"], **options)
        if asked.get("record"):
            llm.collective_rpc(start_recording)
        outs, masks, anew = ask(llm, asked), [], []
        if asked.get("record"):
            made = llm.collective_rpc(stop_recording)
            for out in outs:  # the engine adds to the name of a request
                own = out.request_id
                name = next((r for r in made[0][0] if r == own or r.startswith(f"{own}-")), own)
                masks.append(whole_masks(made, name))
                anew.append(any(name in again for _, again, _ in made))
        said = [o.outputs[0] for o in outs]
        pairs = [[(t, ls[t].logprob) for t, ls in zip(o.token_ids, o.logprobs, strict=True)] for o in said]
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        return {"outputs": pairs, "counts": counts, "masks": masks, "anew": anew}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    torch.save({name: answer(asked) for name, asked in requests.items()}, sys.argv[2])

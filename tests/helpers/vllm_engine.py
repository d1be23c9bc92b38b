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
    """Masks by request, part of a layer and position as they are made, by eager steps and by operators of compiled ones; requests
    of which one was made again, another way.
    """

    def __init__(self, llm: Any) -> None:
        from wina_calib.serving.product import Prepared

        self.runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.masks: dict[str, dict[str, Masks]] = {}
        self.anew: set[str] = set()
        self.kind, self.plain = Prepared, Prepared.__call__
        self.names = {
            part.mask[1].data_ptr(): f"{layer.prefix}.{i}"  # where its threshold is
            for layer in self.runner.get_model().modules()
            for i, part in enumerate(getattr(layer, "wina_parts", ()))
        }

    def __enter__(self) -> "Recorder":
        recorder = self

        def call(self: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
            recorder.note(self, x)
            return recorder.plain(self, x, bias)

        self.kind.__call__ = call
        return self

    def __exit__(self, *_: object) -> None:
        self.kind.__call__ = self.plain

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

    def of(self, request: str) -> str:
        """The name that the engine gave a request."""
        return next((r for r in self.masks if r == request or r.startswith(f"{request}-")), request)


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
        masks: list[Any] = []
        if asked.get("record"):
            with Recorder(llm) as recorder:
                outs = ask(llm, asked)
            names = [recorder.of(out.request_id) for out in outs]
            masks = [recorder.masks.get(name, {}) for name in names]
            anew = [name in recorder.anew for name in names]
        else:
            outs, anew = ask(llm, asked), []
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

"""Compiled decode steps of small quantized models, and the operators that they turn out to have."""

from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from wina_calib.budgets.count import count_cells
from wina_calib.model.architecture import describe
from wina_calib.quantization.formats import WeightFormat
from wina_calib.runtime.patches import compile_guards
from wina_calib.studies.bench.models import Pair, fit

IDS = torch.randint(4, 300, (1, 24), generator=torch.Generator().manual_seed(2))
PROMPT = 10


def sparse(family: str, **changes: Any) -> PreTrainedModel:
    """A model in int8 that drops half of its inputs."""
    dense, model = (tiny.make(family, **changes) for _ in range(2))
    fit(Pair(family, dense, model, count_cells(describe(dense), "none"), False, None), (0.5,), IDS, 1, WeightFormat(8))
    return model


def compiled(model: PreTrainedModel) -> tuple[Any, list[str]]:
    """The compiled step, and the operators that it turns out to have."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: object) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    options = {"guard_filter_fn": compile_guards.needed_ones}
    return torch.compile(model.__call__, fullgraph=True, backend=backend, options=options), names


def count(names: list[str], what: str) -> int:
    """How many of the operators have `what` in their names."""
    return sum(what in name for name in names)

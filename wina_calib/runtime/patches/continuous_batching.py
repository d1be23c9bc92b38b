"""`generate_batch` of a sparse model: with torch's attention, in place of the one that a sparse model prefers.

transformers serves several requests at once with attentions that it knows by name, and refuses all others. The sparse
model's own is torch's with a shorter way for single tokens, of which there are none there.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from wina_calib.errors import UsageError

REASON = "transformers refuses generate_batch for a model whose attention it does not know by name"
VERSIONS = "transformers with ContinuousBatchingManager.switch_to_cb_friendly_attn: 5.17 to 5.24"
ELSEWHERE = "transformers refuses, and names the attentions that it takes"
MARK = "_wina_attention"


def install(name: str, stock: str) -> None:
    """Let models whose attention is `name` batch continuously with `stock`; once, and only where transformers can."""
    try:
        from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
    except ImportError:
        return
    switch: Any = getattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
    if switch is None or hasattr(switch, MARK):
        return

    @wraps(switch)
    def switched(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        state = model.__dict__.get("wina_state")
        if state is not None and state.prefill == "dense":
            raise UsageError(
                "generate_batch computes prompts and what follows them in one pass, which dense prompts rule out. Use "
                'wina_calib.set_prefill(model, "sparse"), or generate.'
            )
        preferred = model.config._attn_implementation == name
        if preferred:
            model.set_attn_implementation(stock)
        switch(self, model, *args, **kwargs)
        if preferred:
            self._original_attn_impl = name  # what it sets again when it stops

    setattr(switched, MARK, True)
    ContinuousBatchingManager.switch_to_cb_friendly_attn = switched

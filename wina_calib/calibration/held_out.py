"""The sparse model at every anchor beside the dense one, on text that nothing is fitted on: layer by layer with the fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wina_calib.calibration.layer_stream import LayerStream
from wina_calib.calibration.likelihood import measured_rises
from wina_calib.calibration.masked_layer import MaskedLayer
from wina_calib.checkpoint.verdict import HeldOut
from wina_calib.common.progress import SILENT, Progress
from wina_calib.corpus.blocks import Blocks, data_for, load_blocks
from wina_calib.corpus.sources import EVALUATED_TOKENS
from wina_calib.masks.mask import keep_mask
from wina_calib.storage.hidden_states import HiddenStates
from wina_calib.storage.resume import Phase

HELD_OUT_TOKENS, QUICK_TOKENS = 12288, 2560  # on a CPU: as much as four tenths of a default calibration's work
HELD_OUT_SEQ_LEN = 2048


def held_out_tokens(device: torch.device, quick: bool) -> int:
    """How many tokens the models are measured on: all that `evaluate` reads where they take seconds."""
    if quick:
        return QUICK_TOKENS
    return HELD_OUT_TOKENS if device.type == "cpu" else EVALUATED_TOKENS


def held_out_blocks(tokenizer: Any, seq_len: int, tokens: int = HELD_OUT_TOKENS) -> Blocks:
    """The text that the original and the sparse model are measured on: about so many tokens of what `evaluate` reads.

    These are its first blocks, which are spread over all of it.
    """
    length, data = min(seq_len, HELD_OUT_SEQ_LEN, tokens), data_for(tokenizer, heldout=True)
    counts = [max(len(data), some // length) for some in (tokens, max(tokens, EVALUATED_TOKENS))]
    return load_blocks(data, tokenizer, samples=counts[1], seq_len=length, seed=0, min_tokens=1).first(counts[0])


class HeldOutRun:
    """Runs every layer densely and with the cuts of each anchor, and counts what these drop."""

    def __init__(self, stream: LayerStream, anchors: tuple[float, ...], data: tuple[str, ...]) -> None:
        self.stream, self.anchors, self.data = stream, anchors, data
        self.dense = stream.embed()
        self.sparse = [stream.store() for _ in anchors]
        for state in self.sparse:
            state.copy_from(self.dense)
        self.unmasked: HiddenStates | None = None
        # Weights times inputs, seen and dropped, at every anchor.
        self.counts = torch.zeros(len(anchors), 2, dtype=torch.int64)

    @property
    def stores(self) -> dict[str, HiddenStates]:
        """What a saved run needs to go on."""
        unmasked = {} if self.unmasked is None else {"heldout-unmasked": self.unmasked}
        return {"heldout": self.dense} | unmasked | {f"heldout{a}": state for a, state in enumerate(self.sparse)}

    def with_unmasked(self) -> None:
        """Run every layer without masks once more, after its weights were quantized (`run_unmasked`)."""
        self.unmasked = self.stream.store()
        self.unmasked.copy_from(self.dense)

    @property
    def values(self) -> dict[str, object]:
        """The same of what is small."""
        return {"counts": self.counts.tolist()}

    def restore(self, phase: Phase) -> None:
        """Go on where a saved run was."""
        for name, store in self.stores.items():
            phase.restore(name, store, self.stream.blocks)
        self.counts = torch.tensor(phase.values["counts"], dtype=torch.int64)

    @torch.no_grad()
    def run_dense(self, masked: MaskedLayer) -> None:
        """Run a layer without masks; its cuts are gone afterwards."""
        masked.cuts = {}
        self.stream.run(masked, self.dense)

    @torch.no_grad()
    def run_unmasked(self, masked: MaskedLayer) -> None:
        """Run a layer whose weights are quantized without masks, if that was asked for; its cuts are gone afterwards."""
        if self.unmasked is not None:
            masked.cuts = {}
            self.stream.run(masked, self.unmasked)

    @torch.no_grad()
    def run_sparse(self, masked: MaskedLayer, anchor: int) -> None:
        """Run a layer with the cuts that are set, those of an anchor."""
        counts = torch.zeros(2, dtype=torch.int64)

        def observe(site: str, x: Tensor) -> None:
            dense_rows = masked.rule.dense_rows(x)
            for group in masked.groups[site]:
                keep = keep_mask(x, masked.norms[group.key], masked.cuts[group.key], masked.rule.score, dense_rows)
                outputs = sum(len(weight) for weight in masked.weights(group))
                counts.add_(torch.tensor([keep.numel(), keep.numel() - int(keep.sum())]) * outputs)

        self.stream.run(masked, self.sparse[anchor], observe)
        self.stream.ranks.add(counts)
        self.counts[anchor] += counts

    def measured(self, progress: Progress = SILENT) -> HeldOut:
        """What came out, once all layers have run; the states are gone afterwards."""
        states = [*self.sparse, *([] if self.unmasked is None else [self.unmasked])]
        rises = measured_rises(self.stream, self.dense, self.stream, states, progress)
        for state in (self.dense, *states):
            state.clear()
        unmasked = (0.0, 0.0) if self.unmasked is None else (rises[-1].loss, rises[-1].kl)
        rises = rises[: len(self.anchors)]
        blocks = sum(map(len, self.stream.batches))
        return HeldOut(
            anchors=self.anchors,
            loss_rise=tuple(rise.loss for rise in rises),
            kl=tuple(rise.kl for rise in rises),
            achieved=tuple((self.counts[:, 1] / self.counts[:, 0]).tolist()),
            tokens=self.stream.tokens - blocks,
            data=self.data,
            unmasked=unmasked,
            errors=tuple(rise.error for rise in rises if rise.error is not None),
        )

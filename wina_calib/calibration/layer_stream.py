"""One decoder layer in memory at a time, bit-equal to the full model's forward.

The model's own forward runs once a micro-batch with recorders in place of the decoder layers; what they are called with is
what each layer is called with here. Blocks have one length and no padding, so these arguments depend on the batch size alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from wina_calib.calibration.compute import Compute
from wina_calib.calibration.masked_layer import MaskedLayer, Observe
from wina_calib.common.devices import default_micro_batch
from wina_calib.common.threads import read_ahead
from wina_calib.errors import ModelFolderError
from wina_calib.model.architecture import Architecture
from wina_calib.model.loading import meta_model
from wina_calib.model.source import Source, load_into
from wina_calib.storage.hidden_states import HiddenStates

Kwargs = dict[str, Any]
_LOAD_ROWS = 4096  # rows of lm_head that are read at a time
_PART_BYTES, _PART_ROWS = 32 << 20, 1 << 16  # of lm_head that may be in memory whatever the size of a layer
_LOGITS, _LOGIT_ROWS = 1 << 21, 256  # of a part that may be in memory whatever the size of a layer, and tokens at most


class LayerStream:
    """Streams the tokens of `ids` through a model whose layers are loaded one at a time.

    Args:
        source: the opened model.
        ids: (blocks, seq_len) int64 tokens without padding.
        compute: where and how; its spill folder is used for every hidden state.

    Attributes:
        batches: the tokens of all micro-batches.
        mine: which of them are this process's.

    Raises:
        ModelFolderError: a token is outside of the model's vocabulary.
    """

    def __init__(self, source: Source, ids: Tensor, compute: Compute) -> None:
        if int(ids.max()) >= source.architecture.vocab_size:
            raise ModelFolderError(
                f"{source.folder}: the tokenizer makes token {int(ids.max())}, the model has {source.architecture.vocab_size}. "
                "Put the tokenizer that belongs to the model into its folder."
            )
        self.source = source
        self.device = device = compute.device
        self.dtype = dtype = compute.dtype
        self.ranks = compute.ranks
        self.spill = compute.spill
        self.tokens = ids.numel()
        self.batches: tuple[Tensor, ...] = ids.split(compute.micro_batch)
        self.mine = self.ranks.share(len(self.batches))
        self.model: PreTrainedModel = meta_model(source.config, dtype)
        self.modules: nn.ModuleList = self.model.get_submodule(source.architecture.layers_path)
        base_path = source.architecture.layers_path.rpartition(".")[0]
        self._base = self.model.get_submodule(base_path) if base_path else self.model
        self._kwargs: dict[int, list[Kwargs]] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for buffer_name, buffer in list(self.model.named_buffers()):
            owner, _, leaf = buffer_name.rpartition(".")
            self.model.get_submodule(owner)._buffers[leaf] = buffer.to(device)

    @classmethod
    def of(cls, source: Source, ids: Tensor, device: torch.device, dtype: torch.dtype) -> LayerStream:
        """A stream of as many blocks at a time as suits the device, of one process, states in memory."""
        together = default_micro_batch(device, ids.shape[1], source.architecture.width)
        return cls(source, ids, Compute(device, dtype, together))

    @property
    def blocks(self) -> dict[int, int]:
        """Number of blocks of each of this process's micro-batches."""
        return {index: len(self.batches[index]) for index in self.mine}

    def store(self) -> HiddenStates:
        """A new empty store of hidden states."""
        return HiddenStates(self.spill, self.device)

    @torch.no_grad()
    def embed(self) -> HiddenStates:
        """Hidden states before the first layer, for every micro-batch of this process."""
        hidden = self.store()
        for index in self.mine:
            hidden[index] = self._record(self.batches[index])
        return hidden

    def kwargs(self, layer: int, batch: int) -> Kwargs:
        """Keyword arguments that the model's own forward gives to a layer."""
        return self._kwargs[len(self.batches[batch])][layer]

    def run(self, masked: MaskedLayer, hidden: HiddenStates, observe: Observe | None = None) -> None:
        """Replace a layer's inputs by its outputs with the masks of its cuts; `observe` sees each site's input."""
        masked.observe = observe
        for batch in self.mine:
            hidden[batch] = masked.run(hidden[batch], self.kwargs(masked.layer.index, batch))
        masked.observe = None

    def rotations(self, layer: int) -> dict[str, Tensor]:
        """A layer's run-time matrices by site name, where and as the stream computes."""
        return {site: q.to(self.device, self.dtype) for site, q in self.source.rotations(layer).items()}

    def layers(
        self, first: int = 0, stop: int | None = None, *, backward: bool = False
    ) -> Iterator[tuple[int, nn.Module]]:
        """Load each layer from `first` to before `stop`; yield its index and its module with weights.

        The next layer is read while the current one is computed; at most two are in memory. `backward` goes from the last
        one down.
        """
        order = range(first, len(self.modules) if stop is None else stop)
        user = None if self._copies is None else torch.cuda.current_stream(self.device)
        for index, tensors in read_ahead(partial(self._fetch, user), order[::-1] if backward else order):
            module = self.modules[index]
            load_into(module, tensors, self.dtype, self.device)
            del tensors  # of another dtype they are a third copy
            try:
                yield index, module
            finally:
                module.to("meta")

    def _fetch(self, user: torch.cuda.Stream | None, index: int) -> dict[str, Tensor]:
        """Read a layer, and copy it to a GPU while that computes for `user`."""
        tensors = self.source.load_layer(index)
        if user is None or self._copies is None:
            return tensors
        with torch.cuda.stream(self._copies):
            there = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self._copies.synchronize()
        for tensor in there.values():
            tensor.record_stream(user)  # its memory is not written again before that stream is done with it
        return there

    def heads(self) -> Iterator[tuple[int, Head]]:
        """The final norm with a part of lm_head's rows, and which row is its first, until all have been loaded once."""
        arch = self.source.architecture
        for part in torch.arange(arch.vocab_size).split(head_rows(arch, self.dtype)):
            with self.head(part) as head:
                yield int(part[0]), head

    @contextmanager
    def head(self, rows: Tensor) -> Iterator[Head]:
        """The final norm with some of lm_head's rows, ascending numbers (n,): it gives the logits of these."""
        arch, source = self.source.architecture, self.source
        norm, lm_head = self.model.get_submodule(arch.final_norm.module), self.model.get_submodule(arch.lm_head)
        weight = source.load(f"{arch.final_norm.module}.weight").flatten()  # (1, hidden) beside run-time matrices
        load_into(norm, {"weight": weight}, self.dtype, self.device)
        whole = dict(lm_head._parameters)  # on meta
        try:
            lm_head._parameters["weight"] = _frozen(
                self._converted(f"{arch.embed if arch.tied else arch.lm_head}.weight", rows)
            )
            if arch.lm_head_bias:
                bias = source.load(f"{arch.lm_head}.bias", rows)
                lm_head._parameters["bias"] = _frozen(bias.to(self.device, self.dtype))
            yield Head(self.model, self._base, norm)
        finally:
            lm_head._parameters.update(whole)
            norm.to("meta")

    def _converted(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a matrix in the compute dtype on the compute device, few at a time, so that none is in memory twice."""
        out = torch.empty(len(rows), self.source.shards[name].shape[1], dtype=self.dtype, device=self.device)
        for into, some in zip(out.split(_LOAD_ROWS), rows.split(_LOAD_ROWS), strict=True):
            into.copy_(self.source.load(name, some))
        return out

    def _record(self, ids: Tensor) -> Tensor:
        """Run the model's forward on one micro-batch with recorders for layers; keep the first layer's input."""
        calls: list[tuple[Tensor, Kwargs]] = []
        base, modules = self._base, self.modules
        norm_name = self.source.architecture.final_norm.module.rpartition(".")[2]
        layers_name = self.source.architecture.layers_path.rpartition(".")[2]
        norm = getattr(base, norm_name)
        setattr(base, layers_name, nn.ModuleList(_Recorder(layer, calls) for layer in modules))
        setattr(base, norm_name, nn.Identity())
        try:
            base(inputs_embeds=self._embeddings(ids), use_cache=False)
        finally:
            setattr(base, layers_name, modules)
            setattr(base, norm_name, norm)
        self._kwargs.setdefault(len(ids), [kwargs for _, kwargs in calls])
        return calls[0][0]

    def _embeddings(self, ids: Tensor) -> Tensor:
        """The embedding module's own output, from only those rows of its weight that occur."""
        arch = self.source.architecture
        module = self.model.get_submodule(arch.embed)
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = self.source.load(f"{arch.embed}.weight", unique)
        saved, padding = module._parameters["weight"], module.padding_idx
        module._parameters["weight"] = _frozen(rows.to(self.device, self.dtype))
        module.padding_idx = None
        try:
            embedded: Tensor = module(inverse.to(self.device))
            return embedded
        finally:
            module._parameters["weight"], module.padding_idx = saved, padding


def head_rows(arch: Architecture, dtype: torch.dtype) -> int:
    """Rows of lm_head that are in memory at a time: as much as the largest layer, or a little."""
    row = arch.hidden_size * dtype.itemsize
    return min(_PART_ROWS, arch.vocab_size, max(1, max(_PART_BYTES, arch.layer_weights * dtype.itemsize) // row))


def head_parts(arch: Architecture, dtype: torch.dtype) -> int:
    """In how many parts lm_head is read."""
    return -(-arch.vocab_size // head_rows(arch, dtype))


def logit_rows(arch: Architecture, dtype: torch.dtype) -> int:
    """Tokens whose logits of a part of lm_head are in memory at a time: those of a tenth of a layer, or a few."""
    return max(1, min(_LOGIT_ROWS, max(_LOGITS, arch.layer_weights // 10) // head_rows(arch, dtype)))


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps what it is called with and returns its input."""

    def __init__(self, layer: nn.Module, calls: list[tuple[Tensor, Kwargs]]) -> None:
        super().__init__()
        self._calls = calls
        self.attention_type = getattr(layer, "attention_type", None)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self._calls.append((hidden_states, kwargs))
        return hidden_states


class _Decoded(BaseModelOutputWithPast):
    """The decoder's output; what else a family's decoder would give is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class Head:
    """Logits from the decoder's output, through the model's own forward around its decoder.

    `norm` is applied to the states first; None where they are the decoder's output already.
    """

    def __init__(self, model: PreTrainedModel, base: nn.Module, norm: nn.Module | None = None) -> None:
        self._model, self._base, self._norm = model, base, norm

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) of hidden states (batch, seq, hidden)."""
        states = hidden if self._norm is None else self._norm(hidden)
        before = self._base.__dict__.get("forward")
        self._base.forward = lambda *args, **kwargs: _Decoded(last_hidden_state=states)
        try:
            logits: Tensor = self._model(inputs_embeds=states, use_cache=False).logits
            return logits
        finally:
            del self._base.forward
            if before is not None:
                self._base.forward = before


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)

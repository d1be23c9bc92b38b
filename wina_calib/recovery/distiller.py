"""The sparse model beside the dense one: from tokens to what a step makes less."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wina_calib.calibration.layer_stream import Head
from wina_calib.recovery.hidden import distance, layer_outputs
from wina_calib.recovery.loss import divergence, rows_of


class Distiller(nn.Module):
    """The sparse model beside the dense one.

    `layers_path` is that of the decoder layers in both, where their outputs are compared, else None; `turn` takes the dense
    model's hidden states to the student's axes, see `hidden.distance`.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers_path: str | None = None,
        turn: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # No children and no buffers: they are not trained, cast or shared.
        self.__dict__ |= {"teacher": teacher, "turn": turn}
        self._layers_path = layers_path

    def forward(self, ids: Tensor) -> Tensor:
        """Tokens (batch, seq) to (2,): mean KL(dense || sparse) a token in nats, and the distance of hidden states or 0."""
        dense, dense_states = self._run(self.__dict__["teacher"], ids, train=False)
        sparse, states = self._run(self.student, ids, train=True)
        heads = [Head(model, model.get_decoder()) for model in (self.student, self.__dict__["teacher"])]
        rows = rows_of(self.student.config.get_text_config().vocab_size)
        kl = divergence(sparse, dense, heads[0], heads[1], rows) / ids.numel()
        apart = distance(states, dense_states, self.__dict__["turn"]) if states else torch.zeros_like(kl)
        return torch.stack([kl, apart])

    def _run(self, model: PreTrainedModel, ids: Tensor, *, train: bool) -> tuple[Tensor, list[Tensor]]:
        path = self._layers_path
        layers = [] if path is None else model.get_submodule(path)
        with torch.set_grad_enabled(train and torch.is_grad_enabled()), layer_outputs(layers) as states:
            return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state, states

"""What the transforms need to know about activations: a bounded sample of every site's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from wina_calib.common.distributed import Ranks
from wina_calib.errors import TransformError
from wina_calib.model.architecture import Architecture
from wina_calib.transforms.plan import INPUT_SITES, plan
from wina_calib.transforms.sinks import massive_directions, massive_state

# Layers whose inputs are sampled for a residual rotation: neighbours are alike, so deep models need not sample all.
MAX_LAYERS = 32
_HEAD_ROWS = 2048
# Tokens a dimension below which a covariance is mostly noise.
MIN_TOKENS_PER_DIMENSION = 4


class Statistics:
    """A sample of the inputs of the sites that a transform rotates, collected by the dense streaming pass.

    Every site has its own random choice of tokens, made before the pass from the seed and the number of tokens, so that
    the sample does not depend on how the pass cuts its micro-batches or on how ranks share them, and so that the sites
    together see many more different tokens than any one of them keeps.
    """

    def __init__(
        self, arch: Architecture, name: str, *, tokens: int, seed: int = 0, per_site: int | None = None
    ) -> None:
        """Plan the sample.

        Args:
            arch: the model's description.
            name: the transform; a site that it does not need is not sampled.
            tokens: rows that the pass will show each site, over all ranks.
            seed: chooses the rows.
            per_site: rows kept for a site; None for `rows_per_site`. Fewer where there are fewer.
        """
        self.tokens, self.seed = tokens, seed
        self.per_site = per_site
        self._arch = arch
        self._sites = needed_sites(name, arch)
        self._keys = {
            (index, site)
            for site in self._sites
            for index in (sampled_layers(arch) if site in INPUT_SITES else range(len(arch.layers)))
        }
        self._samples: dict[tuple[int, str], Tensor] = {}
        self._filled: dict[tuple[int, str], Tensor] = {}
        self._rows: dict[tuple[int, str], Tensor] = {}
        self._massive: dict[int, Tensor] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose inputs `update` wants."""
        return self._sites

    def sample_bytes(self) -> int:
        """Bytes of the finished sample."""
        return sum(self._count(site) * (2 * self._width(site) + 1) for _, site in self._keys)

    def nbytes(self) -> int:
        """Bytes of the finished sample, and of what `fit` holds beside it on its device: it takes the sample over."""
        width = self._arch.hidden_size
        state = sum(4 * width * max(64, width // 8) for _, site in self._keys if site in INPUT_SITES)
        largest = max((self._count(site) * 2 * self._width(site) for _, site in self._keys), default=0)
        return self.sample_bytes() + 3 * largest + state + 24 * 8 * width**2

    def rows(self, layer: int, site: str) -> Tensor:
        """Sorted indices of the tokens that this site keeps."""
        if (layer, site) in self._rows:
            return self._rows[layer, site]
        index = layer * len(INPUT_SITES + ("attn_out",)) + (*INPUT_SITES, "attn_out").index(site)
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        chosen = torch.randperm(self.tokens, generator=generator)[: self._count(site)]
        self._rows[layer, site] = chosen.sort().values
        return self._rows[layer, site]

    def update(self, layer: int, site: str, x: Tensor, first: int) -> None:
        """Take what is wanted of a micro-batch.

        Args:
            layer: index of the decoder layer.
            site: name of the site; one that is not in `sites` is ignored.
            x: (rows, width) inputs of the site, any float dtype, on any device. Rows that run dense, such as the first
                token of a sequence, are left out by the caller and not counted.
            first: index of the first row in the whole pass, 0 to `tokens`.
        """
        key = (layer, site)
        if key not in self._keys:
            return
        wanted = self.rows(layer, site)
        if key not in self._samples:
            self._samples[key] = torch.zeros(len(wanted), x.shape[1], dtype=torch.bfloat16)
            self._filled[key] = torch.zeros(len(wanted), dtype=torch.bool)
        low, high = torch.searchsorted(wanted, torch.tensor([first, first + len(x)])).tolist()
        here = (wanted[low:high] - first).to(x.device)
        self._samples[key][low:high] = x.detach()[here].to("cpu", torch.bfloat16)
        self._filled[key][low:high] = True

    def update_massive(self, layer: int, hidden: Tensor) -> None:
        """Look at the residual stream (seq, hidden) before a layer in the first of all blocks, its first token included."""
        if INPUT_SITES[0] in self._sites:
            self._massive[layer] = massive_state(hidden)

    def massive(self) -> Tensor:
        """Directions (hidden, n) of massive activations, float64."""
        return massive_directions(self._massive[layer] for layer in sorted(self._massive))

    def reduce(self, layer: int, ranks: Ranks) -> None:
        """Give every rank the rows of a layer that any of them has seen."""
        for key in sorted(self._keys):
            if key[0] != layer or ranks.size == 1:
                continue
            if key not in self._samples:
                rows = len(self.rows(*key))
                self._samples[key] = torch.zeros(rows, self._width(key[1]), dtype=torch.bfloat16)
                self._filled[key] = torch.zeros(rows, dtype=torch.bool)
            # A row is zero in all ranks but one, so adding bytes is exact.
            ranks.add(self._samples[key].view(torch.uint8))
            ranks.add(self._filled[key].view(torch.uint8))
        if ranks.size > 1 and INPUT_SITES[0] in self._sites:
            state = self._massive.setdefault(layer, torch.zeros(self._arch.hidden_size))
            ranks.add(state.view(torch.uint8))

    def sample(self, layer: int, site: str) -> Tensor:
        """The sampled inputs (rows, width) of a site in bfloat16, in order of the tokens.

        Raises:
            TransformError: the pass has not shown this site all rows that were planned.
        """
        filled = self._filled.get((layer, site))
        if filled is None or not bool(filled.all()):
            seen = 0 if filled is None else int(filled.sum())
            raise TransformError(
                f"statistics of layer {layer} {site} hold {seen} of {self._count(site)} planned rows: the calibration pass "
                "ended early or counted its tokens differently."
            )
        return self._samples[layer, site]

    def take(self, layer: int, site: str) -> Tensor:
        """`sample`, which is forgotten here, so that its memory ends with the caller's use of it."""
        sample = self.sample(layer, site)
        del self._samples[layer, site], self._filled[layer, site]
        return sample

    def _width(self, site: str) -> int:
        return self._arch.layers[0].site(site).width

    def _count(self, site: str) -> int:
        wanted = rows_per_site(site, self._width(site)) if self.per_site is None else self.per_site
        return min(self.tokens, wanted)

    def state_dict(self, layer: int | None = None) -> dict[str, Tensor]:
        """Samples as tensors, of all layers or one, keyed "{layer}.{site}.sample" and "{layer}.{site}.filled"."""
        massive = {
            f"{index}.hidden.massive": state
            for index, state in self._massive.items()
            if layer is None or index == layer
        }
        return massive | {
            f"{index}.{site}.{kind}": value
            for kind, values in (("sample", self._samples), ("filled", self._filled))
            for (index, site), value in values.items()
            if layer is None or index == layer
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace all samples by those of a `state_dict`."""
        self._samples.clear()
        self._filled.clear()
        self._massive.clear()
        for name, value in state.items():
            layer, site, kind = name.split(".")
            if kind == "massive":
                self._massive[int(layer)] = value.clone()
                continue
            target = self._samples if kind == "sample" else self._filled
            target[int(layer), site] = value.clone()


def check_tokens(tokens: int, dimensions: int) -> None:
    """Raise TransformError where so many sampled tokens are too few for a rotation."""
    needed = MIN_TOKENS_PER_DIMENSION * dimensions
    if tokens < needed:
        raise TransformError(
            f"a rotation of {dimensions} dimensions needs {needed} sampled tokens and got {tokens}: calibrate on more text, or "
            "use --transform none."
        )


def sampled_layers(arch: Architecture) -> tuple[int, ...]:
    """Indices of the layers whose inputs a residual rotation is fitted on: all, or `MAX_LAYERS` evenly spaced."""
    count = len(arch.layers)
    chosen = min(count, MAX_LAYERS)
    return tuple((2 * i + 1) * count // (2 * chosen) for i in range(chosen))


def rows_per_site(site: str, width: int) -> int:
    """Rows to sample at a site: as many as help, fewer for wide models, whose many sites share one rotation."""
    return min(8192, max(2048, (1 << 22) // width)) if site in INPUT_SITES else _HEAD_ROWS


def needed_sites(name: str, arch: Architecture) -> tuple[str, ...]:
    """Sites whose inputs a transform's fit reads; empty for those that look at weights alone."""
    wanted = plan(name, arch)
    return (INPUT_SITES if wanted.residual else ()) + (("attn_out",) if wanted.heads else ())

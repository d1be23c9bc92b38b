"""A transform applied to a whole model in memory, and random rotations to apply."""

import copy

import torch
from torch import nn

from wina_calib import transforms
from wina_calib.transforms import Rotations, apply_layer

IDS = torch.randint(4, 300, (2, 17), generator=torch.Generator().manual_seed(1))
# transformers computes its norms in float32 in float64 models too, which leaves 1e-7.
EXACT = 1e-6


def layer_weights(model, layer):
    """Tensors of one decoder layer by their path inside it."""
    prefix = layer.prefix
    return {name[len(prefix) :]: p.detach() for name, p in model.state_dict().items() if name.startswith(prefix)}


def end_weights(model, arch):
    state = model.state_dict()
    names = [f"{arch.embed}.weight", f"{arch.final_norm.module}.weight"]
    if not arch.tied:
        names += [f"{arch.lm_head}.weight"] + ([f"{arch.lm_head}.bias"] if arch.lm_head_bias else [])
    return {name: state[name].detach() for name in names}


def apply_ends(arch, weights, rotations):
    """Embedding, final norm and lm_head transformed; a tied model gets an lm_head of its own where it cannot stay tied."""
    out = dict(weights)
    if rotations.residual is None:
        return out
    embed, norm, head = f"{arch.embed}.weight", f"{arch.final_norm.module}.weight", f"{arch.lm_head}.weight"
    gain, out[norm] = transforms.fold_final_norm(arch, weights[norm])
    out[embed] = transforms.embedding_rows(weights[embed], rotations)
    if head in weights or gain is not None:
        out[head] = transforms.head_rows(weights.get(head, weights[embed]), gain, rotations)
    return out


def transformed(model, arch, rotations):
    """A copy of the model with all weights transformed and run-time matrices hooked in front of their sites."""
    model = copy.deepcopy(model)
    ends = apply_ends(arch, end_weights(model, arch), rotations)
    if arch.tied and f"{arch.lm_head}.weight" in ends:
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = nn.Parameter(torch.empty_like(ends[f"{arch.lm_head}.weight"]))
    new = dict(ends)
    for layer in arch.layers:
        for name, tensor in apply_layer(arch, layer.index, layer_weights(model, layer), rotations).items():
            if not name.startswith("wina."):
                new[layer.prefix + name] = tensor
                continue
            for projection in layer.site(name.split(".")[1]).projections:
                module = model.get_submodule(layer.prefix + projection.module)
                module.register_forward_pre_hook(lambda _, args, q=tensor: (args[0] @ q,))
    missing, unexpected = model.load_state_dict(new, strict=False)
    assert not unexpected
    assert set(missing) <= {f"{arch.lm_head}.weight"}
    return model


def orthogonal(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]


def random_rotations(arch, wanted):
    """Random matrices of the shapes that a plan fits: exactness must not depend on the fit."""
    d = arch.hidden_size
    heads = tuple(
        torch.stack([orthogonal(layer.head_dim, 100 * layer.index + h) for h in range(layer.kv_heads)])
        for layer in arch.layers
    )
    sites = {(layer.index, site): orthogonal(d, 7 + layer.index) for layer in arch.layers for site in wanted.sites}
    return Rotations(orthogonal(d, 5) if wanted.residual else None, heads if wanted.heads else None, sites)


def relative_difference(a, b):
    return float((a - b).abs().max() / b.abs().max())

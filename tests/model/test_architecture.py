"""Families are found by structure; what has no role is refused by name."""

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from wina_calib.errors import UnsupportedModel
from wina_calib.model.architecture import SITES, describe, mask_groups


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_linear_weight_has_a_site(family: str) -> None:
    model = tiny.make(family)
    arch = describe(model)
    claimed = {layer.prefix + p.module for layer, site in arch.sites for p in site.projections}
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    assert claimed == linears
    assert [site.name for site in arch.layers[0].sites] == list(SITES)
    layer = arch.layers[1]
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (4, 2, 16)
    assert [site.width for site in layer.sites] == [64, 64, 64, 128]


@pytest.mark.parametrize(("family", "gain"), [("llama", "w"), ("gemma2", "1+w"), ("gemma3", "1+w"), ("olmo2", "w")])
def test_gain_of_norms(family: str, gain: str) -> None:
    assert describe(tiny.make(family)).final_norm.gain == gain


def test_norm_roles() -> None:
    llama, gemma, olmo = (describe(tiny.make(f)).layers[0] for f in ("llama", "gemma2", "olmo2"))
    assert (llama.attn_norm.module, llama.mlp_norm.module) == ("input_layernorm", "post_attention_layernorm")
    assert (gemma.attn_norm.module, gemma.mlp_norm.module) == ("input_layernorm", "pre_feedforward_layernorm")
    assert len(gemma.post_norms) == 2
    assert olmo.attn_norm is None
    assert len(olmo.post_norms) == 2


def test_fused_projections_are_one_mask_group() -> None:
    site = describe(tiny.make("phi3")).layers[0].site("mlp_in")
    assert [p.name for p in site.projections] == ["gate_up_proj"]
    assert [g.key for g in mask_groups(site, "per-projection")] == ["mlp_in.gate_up_proj"]
    q, k, v = mask_groups(describe(tiny.make("llama")).layers[0].site("attn_in"), "per-projection")
    assert [g.name for g in (q, k, v)] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (tiny.EXPERTS, "model.layers.0"),
        (Qwen3MoeConfig(**tiny.EXPERT_SIZES, num_experts=2, moe_intermediate_size=16), "model.layers.0"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64), "transformer"),
    ],
    ids=["mixtral", "qwen3-moe", "gpt2"],
)
def test_other_structures_are_refused_by_name(config: object, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        describe(AutoModelForCausalLM.from_config(config))


def test_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        describe(model)


def test_an_extra_linear_is_refused_by_name() -> None:
    model = tiny.make("llama")
    model.model.layers[1].self_attn.gate = torch.nn.Linear(64, 64)
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.self_attn\.gate"):
        describe(model)


def test_layer_norm_is_refused() -> None:
    model = tiny.make("llama")
    model.model.norm = torch.nn.LayerNorm(64, bias=False)
    with pytest.raises(UnsupportedModel, match="not an RMSNorm"):
        describe(model)

"""Every transform is exact where it claims to be, and refuses with a reason elsewhere."""

import pytest
import torch
from tiny import FAMILIES, make
from torch import nn
from transform_cases import (
    EXACT,
    IDS,
    apply_ends,
    end_weights,
    layer_weights,
    random_rotations,
    relative_difference,
    transformed,
)
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wina_calib import transforms
from wina_calib.choices import TRANSFORMS
from wina_calib.errors import TransformError, UnsupportedModel, UsageError
from wina_calib.model.architecture import describe, mask_groups
from wina_calib.transforms import Rotations, apply_layer, plan, reason_not_exact, uses_norm

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("phi3", {"num_key_value_heads": 4}),
    ("phi3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("olmo2", {"attention_bias": True}),
    ("gemma2", {"attention_bias": True, "num_key_value_heads": 1}),
    ("gemma3", {"attention_bias": True}),
    ("mistral", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "auto"])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
@torch.no_grad()
def test_exact_in_float64_or_refused(family, overrides, name):
    model = make(family, dtype=torch.float64, **overrides)
    arch = describe(model)
    if reason_not_exact(name, arch) is not None:
        assert family in ("gemma2", "gemma3", "olmo2")
        assert name in ("global", "global+head")
        with pytest.raises(TransformError, match=r"(?s)not exact.*--transform auto"):
            plan(name, arch)
        return
    rotations = random_rotations(arch, plan(name, arch))
    out = transformed(model, arch, rotations)
    assert relative_difference(out(IDS).logits, model(IDS).logits) < EXACT


def random_model(model_type):
    """A random model of a type that transformers knows, in float64, and its description; None where that is not possible."""
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=3, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    for extra in ({"head_dim": 16}, {}):
        try:
            config = CONFIG_MAPPING[model_type](**sizes, **extra)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config)
            break
        except Exception:  # configs and models refuse sizes with errors of every kind
            empty = None
    if empty is None or sum(p.numel() for p in empty.parameters()) > 5_000_000:
        return None
    try:
        arch = describe(empty)
    except UnsupportedModel:
        return None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(5)
    return model, arch


@pytest.mark.parametrize("model_type", ["bitnet", "diffllama"])
def test_values_that_are_changed_on_their_way_keep_their_basis(model_type):
    _, arch = random_model(model_type)
    assert plan("auto", arch).name == "global"
    with pytest.raises(TransformError, match=r"self_attn\.\w+.* may change values between v_proj and o_proj"):
        plan("head", arch)


def test_a_parameter_on_the_residual_stream_is_no_free_rotation():
    model = make("llama")
    model.model.layers[1].register_parameter("scale", nn.Parameter(torch.ones(64)))
    with pytest.raises(TransformError, match="scale of layer 1 may scale the residual stream"):
        plan("global", describe(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_auto_is_exact_on_every_model_type_that_is_taken():
    found = {}
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES)):
        made = random_model(model_type)
        if made is not None:
            model, arch = made
            out = transformed(model, arch, random_rotations(arch, plan("auto", arch)))
            found[model_type] = relative_difference(out(IDS).logits, model(IDS).logits)
    assert len(found) > 20
    assert {name: error for name, error in found.items() if error > EXACT} == {}


@torch.no_grad()
def test_all_parts_together_are_exact():
    model = make("qwen2", dtype=torch.float64)
    arch = describe(model)
    free, run_time = random_rotations(arch, plan("global+head", arch)), random_rotations(arch, plan("stacked", arch))
    rotations = Rotations(free.residual, free.heads, run_time.sites)
    assert relative_difference(transformed(model, arch, rotations)(IDS).logits, model(IDS).logits) < EXACT


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
@torch.no_grad()
def test_norms_are_folded(family):
    model = make(family)
    arch = describe(model)
    rotations = random_rotations(arch, plan("global", arch))
    weights = apply_layer(arch, 1, layer_weights(model, arch.layers[1]), rotations)
    ends = apply_ends(arch, end_weights(model, arch), rotations)
    for norm in (weights["input_layernorm.weight"], weights["post_attention_layernorm.weight"]):
        assert torch.equal(norm, torch.ones_like(norm))
    assert bool((ends["model.norm.weight"] == 1).all())


@torch.no_grad()
def test_folding_zeroes_the_weight_of_a_gain_of_one_plus_w():
    model = make("gemma2")
    arch = describe(model)
    weights = apply_layer(arch, 0, layer_weights(model, arch.layers[0]), random_rotations(arch, plan("stacked", arch)))
    assert not weights["input_layernorm.weight"].any()
    assert not weights["pre_feedforward_layernorm.weight"].any()
    assert weights["post_attention_layernorm.weight"].any()


@pytest.mark.parametrize("name", ["none", "head"])
def test_untouched_tensors_are_the_same_objects(name):
    model = make("llama", attention_bias=True)
    arch = describe(model)
    before = layer_weights(model, arch.layers[0])
    after = apply_layer(arch, 0, before, random_rotations(arch, plan(name, arch)))
    changed = {key for key in before if after[key] is not before[key]}
    expected = {"self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight"}
    assert changed == (expected if name == "head" else set())
    ends = end_weights(model, arch)
    assert all(value is ends[key] for key, value in apply_ends(arch, ends, Rotations()).items())


def test_inputs_are_never_modified():
    model = make("phi3", attention_bias=True)
    arch = describe(model)
    before = layer_weights(model, arch.layers[0])
    copies = {key: value.clone() for key, value in before.items()}
    free, run_time = random_rotations(arch, plan("global+head", arch)), random_rotations(arch, plan("stacked", arch))
    apply_layer(arch, 0, before, Rotations(free.residual, free.heads, run_time.sites))
    assert all(torch.equal(before[key], copies[key]) for key in before)


@pytest.mark.parametrize("uniform", [True, False])
@torch.no_grad()
def test_tied_embeddings_stay_tied_where_that_is_exact(uniform):
    model = make("llama", dtype=torch.float64, tie_word_embeddings=True)
    if uniform:
        model.model.norm.weight.fill_(1.25)
    arch = describe(model)
    rotations = random_rotations(arch, plan("global", arch))
    ends = apply_ends(arch, end_weights(model, arch), rotations)
    assert ("lm_head.weight" in ends) is not uniform
    assert relative_difference(transformed(model, arch, rotations)(IDS).logits, model(IDS).logits) < EXACT


def test_an_embedding_can_be_transformed_by_slices_of_rows():
    model = make("llama")
    arch = describe(model)
    rotations = random_rotations(arch, plan("global", arch))
    ends = end_weights(model, arch)
    whole = apply_ends(arch, ends, rotations)
    gain, norm = transforms.fold_final_norm(arch, ends["model.norm.weight"])
    embed = [transforms.embedding_rows(part, rotations) for part in ends["model.embed_tokens.weight"].split(100)]
    head = [transforms.head_rows(part, gain, rotations) for part in ends["lm_head.weight"].split(100)]
    torch.testing.assert_close(torch.cat(embed), whole["model.embed_tokens.weight"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(head), whole["lm_head.weight"], rtol=1e-6, atol=1e-7)
    assert torch.equal(norm, whole["model.norm.weight"])


@torch.no_grad()
def test_slicing_of_large_weights_changes_nothing(monkeypatch):
    model = make("qwen2", dtype=torch.float64)
    arch = describe(model)
    rotations = random_rotations(arch, plan("global+head", arch))
    whole = apply_layer(arch, 0, layer_weights(model, arch.layers[0]), rotations)
    monkeypatch.setattr("wina_calib.transforms.apply.CHUNK_ELEMENTS", 64 * 40)
    sliced = apply_layer(arch, 0, layer_weights(model, arch.layers[0]), rotations)
    for key, value in whole.items():
        torch.testing.assert_close(sliced[key], value, rtol=0, atol=1e-13)


@torch.no_grad()
def test_reloading_and_applying_nothing_again_changes_nothing(tmp_path):
    model = make("llama", dtype=torch.float64, tie_word_embeddings=True)
    arch = describe(model)
    first = transformed(model, arch, random_rotations(arch, plan("global+head", arch)))
    first.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(IDS).logits, first(IDS).logits, rtol=0, atol=1e-12)
    again = describe(loaded)
    assert not again.tied
    identity = Rotations(residual=torch.eye(again.hidden_size, dtype=torch.float64))
    for layer in again.layers:
        before = layer_weights(loaded, layer)
        after = apply_layer(again, layer.index, before, identity)
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_names_aliases_and_auto():
    llama, gemma, olmo = (describe(make(family)) for family in ("llama", "gemma3", "olmo2"))
    assert plan("residual", llama) == plan("global", llama)
    assert plan("auto", llama).residual
    assert plan("auto", gemma).name == plan("auto", olmo).name
    assert plan("auto", gemma).name in ("head", "none")
    assert all(
        plan(name, olmo).is_free is (name in ("none", "head", "auto")) for name in ("none", "head", "auto", "paper")
    )
    with pytest.raises(UsageError, match="unknown transform 'svd': choose one of auto, none"):
        plan("svd", llama)
    with pytest.raises(TransformError, match="post_attention_layernorm.*does not commute"):
        plan("global", gemma)


def test_run_time_matrices_are_counted():
    arch = describe(make("llama"))
    assert transforms.run_time_weights("stacked", arch) == 3 * 2 * 64 * 64
    assert transforms.run_time_weights("global+head", arch) == 0


def test_norms_of_the_paper():
    arch = describe(make("llama"))
    groups = [group for site in arch.layers[0].sites for group in mask_groups(site, "per-projection")]
    assert [group.projections[0].name for group in groups if uses_norm("paper", group)] == ["k_proj", "gate_proj"]
    assert all(uses_norm("stacked", group) for group in groups)
    fused = describe(make("phi3")).layers[0].sites
    assert [uses_norm("paper", mask_groups(site, "per-projection")[0]) for site in fused] == [True, False, True, False]
    assert all(
        uses_norm("paper", mask_groups(site, "shared")[0]) for site in arch.layers[0].sites if site.name == "attn_in"
    )

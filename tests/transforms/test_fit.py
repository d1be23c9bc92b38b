"""What the transforms fit: the paper's matrices, learned rotations, and the sample they are learned on."""

import pytest
import torch
from heard import Heard
from tiny import CACHE, make
from transform_cases import EXACT, IDS, layer_weights, orthogonal, relative_difference, transformed
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.transform_timing import seconds
from wina_calib.common.distributed import Ranks
from wina_calib.corpus.blocks import load_blocks
from wina_calib.errors import TransformError
from wina_calib.model.architecture import describe
from wina_calib.model.locate import demo_folder
from wina_calib.transforms import Statistics, fit, needed_sites
from wina_calib.transforms.eigen import eigenvectors
from wina_calib.transforms.learn import (
    _THRESHOLD_SAMPLE,
    Problem,
    _stride,
    held_out_cost,
    learn,
    low_rank,
    orthogonalised,
)
from wina_calib.transforms.residual import default_steps
from wina_calib.transforms.statistics import sampled_layers

TOKENS = 16 * 127


@pytest.fixture(scope="module")
def llama():
    return make("llama", dtype=torch.float64, attention_bias=True)


def collect(model, arch, name="global+head", *, cuts=(4, 4, 4, 4), **options):
    """Statistics of random text, in micro-batches of the given numbers of sequences; the first token is left out."""
    ids = torch.randint(4, 300, (16, 128), generator=torch.Generator().manual_seed(3))
    statistics = Statistics(arch, name, tokens=TOKENS, **options)
    feed(model, arch, statistics, ids, cuts)
    return statistics


@torch.no_grad()
def feed(model, arch, statistics, ids, cuts, first_block=0, width=127):
    start = first_block
    for part in ids.split(cuts):
        handles = []
        for layer in arch.layers:
            for site in layer.sites:

                def hook(_, args, key=(layer.index, site.name), start=start):
                    statistics.update(*key, args[0][:, 1:].flatten(0, 1), start * width)

                module = model.get_submodule(layer.prefix + site.projections[0].module)
                handles.append(module.register_forward_pre_hook(hook))
        model(part)
        for handle in handles:
            handle.remove()
        start += len(part)


def loader(model, arch):
    return lambda index: layer_weights(model, arch.layers[index])


def folded(model, layer, projection, norm):
    weights = layer_weights(model, layer)
    return weights[f"{projection}.weight"] * weights[f"{norm}.weight"]


@torch.no_grad()
def test_paper_and_stacked_make_columns_orthogonal(llama):
    arch = describe(llama)
    for name, projections in (("paper", ["gate_proj"]), ("stacked", ["gate_proj", "up_proj"])):
        turn = fit(name, arch, loader(llama, arch)).sites[1, "mlp_in"]
        stack = torch.cat(
            [folded(llama, arch.layers[1], f"mlp.{p}", "post_attention_layernorm") @ turn for p in projections]
        )
        gram = stack.T @ stack
        assert float((gram - gram.diagonal().diag()).abs().max() / gram.abs().max()) < 1e-12
        singular = torch.linalg.svdvals(stack)
        torch.testing.assert_close(gram.diagonal().sqrt(), singular, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_paper_scores_equal_those_of_the_shortcut_form(llama):
    """The paper rotates the residual stream and gives each shortcut a (d, d) product; scores must not differ from that."""
    arch = describe(llama)
    rotations = fit("paper", arch, loader(llama, arch))
    turns = [rotations.sites[layer.index, site] for layer in arch.layers for site in ("attn_in", "mlp_in")]
    ours = recorded_scores(transformed(llama, arch, rotations), arch)
    shortcut = shortcut_model(arch, turns)
    theirs = recorded_scores(shortcut, arch)
    assert relative_difference(shortcut(IDS).logits, llama(IDS).logits) < EXACT
    for key, score in ours.items():
        assert relative_difference(score, theirs[key]) < EXACT
    # The SVD's V itself, up to signs, where singular values are not zero (k_proj has fewer rows than columns).
    vectors = torch.linalg.svd(folded(llama, arch.layers[0], "self_attn.k_proj", "input_layernorm")).Vh[:32].T
    torch.testing.assert_close((vectors.T @ turns[0][:, :32]).abs(), torch.eye(32).double(), rtol=0, atol=1e-7)


def shortcut_model(arch, turns):
    """The published form, on a copy: rotated residual stream, a product on each shortcut, rotated embedding and head."""
    model = make("llama", dtype=torch.float64, attention_bias=True)
    end = orthogonal(arch.hidden_size, 9)
    turns = [*turns, end]
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turns[0])
    model.lm_head.weight.copy_(model.lm_head.weight * model.model.norm.weight @ end)
    model.model.norm.weight.fill_(1.0)
    for i, layer in enumerate(model.model.layers):
        before, middle, after = turns[2 * i : 2 * i + 3]
        for norm, modules, turn in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], before),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], middle),
        ):
            for module in modules:
                module.weight.copy_(module.weight * norm.weight @ turn)
            norm.weight.fill_(1.0)
        layer.self_attn.o_proj.weight.copy_(middle.T @ layer.self_attn.o_proj.weight)
        layer.self_attn.o_proj.bias.copy_(layer.self_attn.o_proj.bias @ middle)
        layer.mlp.down_proj.weight.copy_(after.T @ layer.mlp.down_proj.weight)

        def forward(h, *, layer=layer, first=before.T @ middle, second=middle.T @ after, **kwargs):
            kwargs.pop(CACHE, None)
            h = h @ first + layer.self_attn(hidden_states=layer.input_layernorm(h), **kwargs)[0]
            return h @ second + layer.mlp(layer.post_attention_layernorm(h))

        layer.forward = forward
    return model


@torch.no_grad()
def recorded_scores(model, arch):
    """abs(x) * column norm of every projection on `IDS`; run-time matrices are hooked in before the recording."""
    scores, handles = {}, []
    for layer in arch.layers:
        for site in layer.sites:
            for p in site.projections:

                def hook(module, args, key=(layer.index, p.name)):
                    scores[key] = args[0].abs() * module.weight.norm(dim=0)

                handles.append(model.get_submodule(layer.prefix + p.module).register_forward_pre_hook(hook))
    model(IDS)
    for handle in handles:
        handle.remove()
    return scores


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@torch.no_grad()
def test_fitted_global_and_head_are_exact_and_repeatable(family):
    model = make(family, dtype=torch.float64)
    arch = describe(model)
    statistics = collect(model, arch)
    heard = Heard()
    rotations = fit("global+head", arch, loader(model, arch), statistics, steps=8, progress=heard)
    assert relative_difference(transformed(model, arch, rotations)(IDS).logits, model(IDS).logits) < EXACT
    identity = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(rotations.residual @ rotations.residual.T, identity, rtol=0, atol=1e-12)
    assert statistics.state_dict() == {}  # used up, so that its memory is free
    again = fit("global+head", arch, loader(model, arch), collect(model, arch), steps=8)
    assert torch.equal(again.residual, rotations.residual)
    assert all(torch.equal(a, b) for a, b in zip(again.heads, rotations.heads, strict=True))
    assert any("times the first error" in line for line in heard.lines)


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True])
def test_massive_first_tokens_have_an_axis(grouped):
    model = make("llama", dtype=torch.float64)
    arch = describe(model)
    statistics = collect(model, arch, "global")
    long = torch.cat([100 * torch.ones(1, 64), torch.ones(3, 64)])
    statistics.update_massive(1, long)
    rotations = fit("global", arch, loader(model, arch), statistics, steps=8, grouped=grouped)
    along = (rotations.residual.mT @ torch.full((64,), 1 / 8).double()).abs()
    assert along.max() > 1 - 1e-6
    assert grouped or int(along.argmax()) == 0
    assert relative_difference(transformed(model, arch, rotations)(IDS).logits, model(IDS).logits) < EXACT


def test_a_head_transform_fits_where_the_residual_stream_cannot_turn():
    model = make("olmo2", dtype=torch.float64)
    arch = describe(model)
    rotations = fit("auto", arch, loader(model, arch), collect(model, arch, "auto"), steps=2)
    assert rotations.residual is None
    assert rotations.heads is not None
    assert len(rotations.heads) == 3
    with torch.no_grad():
        assert relative_difference(transformed(model, arch, rotations)(IDS).logits, model(IDS).logits) < EXACT


def test_too_few_tokens_are_refused(llama):
    arch = describe(llama)
    with pytest.raises(TransformError, match=r"64 dimensions needs 256 sampled tokens and got 180"):
        fit("global", arch, loader(llama, arch), collect(llama, arch, per_site=30))
    with pytest.raises(TransformError, match=r"16 dimensions needs 64 sampled tokens and got 30"):
        fit("head", arch, loader(llama, arch), collect(llama, arch, "head", per_site=15))
    with pytest.raises(TransformError, match="needs the statistics"):
        fit("head", arch, loader(llama, arch))


class Beside(Ranks):
    """One of two processes: what it adds is added to what the other has, in the same order."""

    def __init__(self, other: dict[str, torch.Tensor]) -> None:
        super().__init__(rank=1, size=2)
        sites = sorted({name.rpartition(".")[0] for name in other if "hidden" not in name})
        samples = [other[f"{site}.{kind}"] for site in sites for kind in ("sample", "filled")]
        self.__dict__["others"] = iter([*samples, *(t for name, t in other.items() if "hidden" in name)])

    def add(self, counts: torch.Tensor) -> None:
        counts += next(self.others).view(torch.uint8)


def test_the_sample_does_not_depend_on_cuts_or_ranks(llama):
    arch = describe(llama)
    whole = collect(llama, arch, per_site=200)
    cut = collect(llama, arch, per_site=200, cuts=(1, 7, 3, 5))
    ids = torch.randint(4, 300, (16, 128), generator=torch.Generator().manual_seed(3))
    ranks = [Statistics(arch, "global+head", tokens=TOKENS, per_site=200) for _ in range(2)]
    feed(llama, arch, ranks[0], ids[:6], (4, 2))
    feed(llama, arch, ranks[1], ids[6:], (5, 5), first_block=6)
    long = torch.cat([torch.full((1, 64), 100.0), torch.ones(3, 64)])
    for layer in range(3):
        ranks[0].update_massive(layer, long)
        whole.update_massive(layer, long)
        ranks[1].reduce(layer, Beside(ranks[0].state_dict(layer)))
    for layer in range(3):
        for site in ("attn_in", "mlp_in", "attn_out"):
            assert torch.equal(cut.sample(layer, site), whole.sample(layer, site))
            assert torch.equal(ranks[1].sample(layer, site), whole.sample(layer, site))
    assert torch.equal(ranks[1].massive(), whole.massive())
    assert whole.massive().shape == (64, 1)
    assert not torch.equal(whole.rows(0, "attn_in"), whole.rows(0, "mlp_in"))
    with pytest.raises(TransformError, match=r"layer 0 attn_in hold \d+ of 200 planned rows"):
        ranks[0].sample(0, "attn_in")


def test_statistics_are_saved_and_loaded(llama):
    arch = describe(llama)
    whole = collect(llama, arch, per_site=100)
    other = Statistics(arch, "global+head", tokens=TOKENS, per_site=100)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(other.sample(2, "attn_out"), whole.sample(2, "attn_out"))
    held = sum(t.numel() * t.element_size() for t in whole.state_dict().values())
    assert held < whole.nbytes()
    assert needed_sites("stacked", arch) == ()
    assert Statistics(arch, "none", tokens=TOKENS).sites == ()


def test_deep_models_are_sampled_evenly():
    class Deep:
        layers = tuple(range(80))

    chosen = sampled_layers(Deep())
    assert len(chosen) == 32
    assert chosen[0] == 1
    assert chosen[-1] == 78
    assert {b - a for a, b in zip(chosen, chosen[1:], strict=False)} == {2, 3}


def test_low_rank_factor_keeps_trace_and_large_directions():
    basis = orthogonal(48, 0)
    values = torch.logspace(2, -2, 48, dtype=torch.float64)
    matrix = (basis * values) @ basis.T

    def times(block):
        return (matrix @ block.double()).float()

    factor, tail = low_rank(times, float(values.sum()), 48, 16, torch.Generator().manual_seed(0))
    kept = factor.T @ factor + tail * torch.eye(48)
    assert abs(float(kept.trace()) / float(values.sum()) - 1) < 1e-4
    rest = values[16:]
    best = float((rest - rest.mean()).norm())  # of any matrix of this form: values are sorted, largest first
    assert float((kept.double() - matrix).norm()) < 1.4 * best
    largest = torch.linalg.eigvalsh(kept.double()).flip(0)[:6]
    torch.testing.assert_close(largest, values[:6], rtol=1e-3, atol=0)


def sparse_problems(groups, width, seed, sites=3, rows=1024):
    """Inputs that are sparse in a hidden basis, a different one for each group: what the descent has to find."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.stack([orthogonal(width, seed + 1 + g) for g in range(groups)])
    problems = []
    for _ in range(sites):
        latent = torch.randn(groups, rows, width, dtype=torch.float64, generator=generator) ** 3
        mixing = torch.randn(groups, 2 * width, width, generator=generator) / width**0.5
        inputs = (latent @ bases.mT).bfloat16()
        problems.append(Problem(inputs, mixing, torch.zeros(groups), torch.full((groups,), 1e-2)))
    return problems, bases


def test_descent_finds_sparse_bases_that_a_covariance_cannot_see():
    problems, bases = sparse_problems(2, 12, 5)
    pooled = sum(p.inputs.double().mT @ p.inputs.double() for p in problems)
    start = torch.stack([eigenvectors(c) for c in pooled])
    found, cost, first = learn(problems, start, steps=150, sites_per_step=3, seed=0)
    ideal = held_out_cost(problems, bases)
    assert bool((cost < first - 0.6 * (first - ideal)).all())
    torch.testing.assert_close(cost, held_out_cost(problems, found), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.mT @ found, torch.eye(12).double().expand(2, 12, 12), rtol=0, atol=1e-12)


def test_a_start_that_cannot_be_improved_is_kept():
    problems, bases = sparse_problems(1, 8, 2)
    found, cost, first = learn(problems, bases, steps=0, sites_per_step=1, seed=0)
    assert torch.equal(found, bases)
    assert torch.equal(cost, first)


def test_orthogonalised_keeps_order_and_sign():
    exact = orthogonal(20, 3)
    torch.testing.assert_close(orthogonalised(exact + 1e-7), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(512, 96), (896, 896), (1152, 1152), (4096, 4096), (512, 33), (1, 1)])
def test_thresholds_are_of_all_columns(rows, width):
    places = torch.arange(0, rows * width, _stride(rows, width))
    assert len((places % width).unique()) == width
    assert len(places) <= 2 * _THRESHOLD_SAMPLE


def test_steps_follow_width():
    assert [default_steps(width) for width in (64, 384, 4096)] == [128, 200, 200]


@torch.no_grad()
def test_the_demo_model_in_bfloat16_and_what_learning_gains_on_it():
    """Rounded to bfloat16 after the transform, and computed in float32, the model loses at most 0.1 % of perplexity."""
    model = AutoModelForCausalLM.from_pretrained(demo_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    arch = describe(model)
    ids = load_blocks(("builtin",), tokenizer, samples=24, seq_len=256, seed=0, min_tokens=0).ids
    test = load_blocks(("builtin:heldout",), tokenizer, samples=32, seq_len=256, seed=0, min_tokens=0).ids
    statistics = Statistics(arch, "global+head", tokens=len(ids) * 255, per_site=1024)
    feed(model, arch, statistics, ids, (8, 8, 8), width=255)
    heard = Heard()
    rotations = fit("global+head", arch, loader(model, arch), statistics, steps=40, progress=heard)
    last = [float(line.split(": ")[1].split()[0]) for line in heard.lines if "first error" in line][-1]
    assert last < 0.97
    out = transformed(model, arch, rotations)
    for parameter in out.parameters():
        parameter.copy_(parameter.bfloat16())
    dense, turned = (float(m(test, labels=test).loss) for m in (model, out))
    assert abs(turned - dense) <= 0.001


def test_timings_name_every_part():
    timed = seconds(32, "cpu", steps=1)
    assert set(timed) == {"gram", "eigh", "svd", "step"}
    assert all(value >= 0 for value in timed.values())

"""What belongs to a pass: computed again in a backward pass, in several threads, within another pass, while a model changes."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import wina_calib
from wina_calib.errors import UsageError
from wina_calib.runtime.decoder import Recomputed
from wina_calib.runtime.forward_pass import Gate, here
from wina_calib.runtime.load import runtime_state

IDS = torch.randint(4, 300, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def loaded(calibrated: Path) -> PreTrainedModel:
    return wina_calib.load(calibrated, 0.5)


@pytest.fixture
def trained(loaded: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(loaded).train()


@pytest.fixture
def quick_switches() -> Iterator[None]:
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def loss(model: PreTrainedModel, row: int) -> torch.Tensor:
    """Of one text, whose first `row` tokens are padding."""
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[0, :row] = 0
    ids = IDS[row : row + 1]
    return model(input_ids=ids, attention_mask=mask, labels=ids).loss


def gradients(model: PreTrainedModel) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def checkpointed(model: PreTrainedModel, *, reentrant: bool = False) -> None:
    """Let a model's layers be computed again, by the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm() / b.norm()) < 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_layers_computed_again_are_of_their_own_pass(
    reentrant: bool, order: tuple[int, ...], trained: PreTrainedModel
) -> None:
    def passes() -> torch.Tensor:
        losses = [loss(trained, row) for row in (0, 3, 1)]
        with torch.no_grad():
            trained.eval()(IDS[:, :1])
            trained.train()
        for i in order:
            losses[i].backward()
        return gradients(trained)

    expected = passes()
    checkpointed(trained, reentrant=reentrant)
    trained.enable_input_require_grads()
    assert close(passes(), expected)
    assert all(isinstance(layer, Recomputed) for layer in trained.model.layers)


@pytest.mark.parametrize("context", ["counting", "densely"])
def test_layers_computed_again_outside_of_a_context(context: str, trained: PreTrainedModel) -> None:
    state = runtime_state(trained)
    found, seen = [], []
    for again in (False, True):
        if again:
            checkpointed(trained)
        with getattr(state, context)() as counts:
            passed = loss(trained, 2)
        before = copy.deepcopy(counts)
        with state.counting() as others:
            passed.backward()
        assert others == {}
        assert counts == before
        found.append(gradients(trained))
        seen.append(counts)
    assert close(found[1], found[0])
    assert seen[0] == seen[1]


def test_another_sparsity_before_the_backward_pass(trained: PreTrainedModel) -> None:
    passed = loss(trained, 2)
    wina_calib.set_sparsity(trained, 0.3)
    passed.backward()
    plain = gradients(trained)
    wina_calib.set_sparsity(trained, 0.5)
    loss(trained, 2).backward()
    assert close(plain, gradients(trained))
    checkpointed(trained)
    passed = loss(trained, 2)
    wina_calib.set_sparsity(trained, 0.3)
    with pytest.raises(UsageError, match="sparsity was changed between a forward pass and its backward pass"):
        passed.backward()
    loss(trained, 2).backward()


def test_a_layer_that_others_compute_again(trained: PreTrainedModel) -> None:
    """By torch's own checkpoint around it, which hands on no pass."""
    layer = trained.model.layers[1]
    stock = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(stock, *args, use_reentrant=False, **kwargs)
    passed = loss(trained, 2)
    with pytest.raises(UsageError, match="nothing tells which forward pass it belongs to"):
        passed.backward()
    assert getattr(here, "current", None) is None


def test_a_whole_decoder_computed_again(trained: PreTrainedModel) -> None:
    ids, mask = IDS[:1], torch.tensor([[0] * 5 + [1] * 19])
    embedded = trained.get_input_embeddings()(ids).detach().requires_grad_()

    def run(*, again: bool) -> torch.Tensor:
        def call(x: torch.Tensor) -> torch.Tensor:
            return trained.model(inputs_embeds=x, attention_mask=mask).last_hidden_state

        out = checkpoint(call, embedded, use_reentrant=False) if again else call(embedded)
        loss(trained, 0)
        (grad,) = torch.autograd.grad(out.square().sum(), embedded)
        return grad

    assert close(run(again=True), run(again=False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["model", "decoder", "embedded"])
def test_a_whole_model_computed_again_at_another_sparsity(what: str, reentrant: bool, trained: PreTrainedModel) -> None:
    """By torch's checkpoint around it, given ids or their embeddings."""
    embedded = trained.get_input_embeddings()(IDS[:1]).detach().requires_grad_()

    def passed(row: int = 0) -> torch.Tensor:
        ids = IDS[row : row + 1]
        if what == "model":  # an argument that requires gradients is what reentrant checkpointing goes by
            return checkpoint(
                lambda x, i: trained(input_ids=i).logits + 0 * x.sum(), embedded, ids, use_reentrant=reentrant
            )
        if what == "decoder":

            def call(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
                return trained.model(input_ids=i).last_hidden_state + 0 * x.sum()

            return checkpoint(call, embedded, ids, use_reentrant=reentrant)
        return checkpoint(lambda x: trained.model(inputs_embeds=x).last_hidden_state, embedded, use_reentrant=reentrant)

    for again in range(2):
        passed().square().sum().backward()
        assert float(trained.model.layers[0].mlp.up_proj.weight.grad.abs().sum()) > 0, again
        wina_calib.set_sparsity(trained, 0.4 + again / 10)  # between a backward pass and the next forward pass
    out = passed()
    wina_calib.set_sparsity(trained, 0.3)
    with pytest.raises(UsageError, match="sparsity was changed between a forward pass and its backward pass"):
        out.square().sum().backward()
    assert getattr(here, "current", None) is None
    passed().square().sum().backward()
    if what != "embedded":
        first = passed(1)
        wina_calib.set_sparsity(trained, 0.5)
        both = first.square().sum() + passed(2).square().sum()
        with pytest.raises(UsageError, match="sparsity was changed"):
            both.backward()


@pytest.mark.parametrize("what", ["prefill", "first_token", "densely"])
def test_a_whole_model_computed_again_on_other_terms(what: str, trained: PreTrainedModel) -> None:
    state = runtime_state(trained)
    with state.densely() if what == "densely" else nullcontext():
        out = checkpoint(lambda ids: trained(input_ids=ids).logits, IDS[:1], use_reentrant=False)
    if what != "densely":
        setattr(state, what, {"prefill": "dense", "first_token": "sparse"}[what])
    with pytest.raises(UsageError, match="changed between a forward pass and its backward pass"):
        out.sum().backward()


def test_what_is_computed_again_is_counted_once(trained: PreTrainedModel) -> None:
    with runtime_state(trained).counting() as counts:
        out = checkpoint(lambda ids: trained(input_ids=ids).logits, IDS[:1], use_reentrant=False)
        before = copy.deepcopy(counts)
        out.sum().backward()
    assert before
    assert counts == before


def test_plain_training_remembers_no_passes(trained: PreTrainedModel) -> None:
    loss(trained, 2).backward()
    trained.eval()
    with torch.no_grad():
        trained(IDS)
    assert runtime_state(trained).repeats._known == {}


def tokens(model: PreTrainedModel, prompt: torch.Tensor, mask: torch.Tensor | None = None) -> list[int]:
    kwargs = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 3}
    found: torch.Tensor = model.generate(prompt, attention_mask=mask, **kwargs)
    return found.tolist()


@pytest.mark.usefixtures("quick_switches")
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(st.tuples(st.integers(2, 20), st.integers(0, 6), st.booleans()), min_size=4, max_size=10),
    threads=st.integers(2, 4),
)
def test_threads_share_a_model(jobs: list[tuple[int, int, bool]], threads: int, loaded: PreTrainedModel) -> None:
    """Prompts of different lengths and padding, some dense and some counted, in several threads against one after the other."""
    state = runtime_state(loaded)

    def work(job: tuple[int, int, bool]) -> tuple[list[int], int]:
        length, padding, dense = job
        prompt = IDS[:1, :length]
        mask = torch.ones_like(prompt)
        mask[0, : min(padding, length - 1)] = 0
        if dense:
            with state.densely():
                return tokens(loaded, prompt, mask), 0
        with state.counting() as counts:
            found = tokens(loaded, prompt, mask)
        return found, sum(count.dropped for count in counts.values())

    expected = [work(job) for job in jobs]
    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(work, jobs)) == expected


@pytest.mark.usefixtures("quick_switches")
def test_the_first_passes_of_several_threads(calibrated: Path) -> None:
    """Storage is laid out once, by one of them."""
    model = wina_calib.load(calibrated, 0.5)
    twin = copy.deepcopy(model)
    expected = [tokens(twin, IDS[:1, : 4 + i]) for i in range(6)]
    start = threading.Barrier(6)

    def work(i: int) -> list[int]:
        start.wait()
        return tokens(model, IDS[:1, : 4 + i])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == expected


@pytest.mark.usefixtures("quick_switches")
@torch.no_grad()
def test_a_pass_sees_one_sparsity(loaded: PreTrainedModel) -> None:
    """Whatever another thread sets meanwhile."""
    model = copy.deepcopy(loaded)
    known = []
    for sparsity in (0.3, 0.6):
        wina_calib.set_sparsity(model, sparsity)
        known.append(model(IDS).logits)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for sparsity in (0.3, 0.6):
                wina_calib.set_sparsity(model, sparsity)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            found = model(IDS).logits
            assert any(close(found, expected) for expected in known)
    finally:
        done.set()
        thread.join()


@torch.no_grad()
def test_a_pass_within_a_pass(loaded: PreTrainedModel) -> None:
    model, other = copy.deepcopy(loaded), copy.deepcopy(loaded)
    mask = torch.ones(1, 24, dtype=torch.long)
    mask[0, :7] = 0
    expected = model(IDS[:1], attention_mask=mask).logits
    inner = model(IDS).logits
    found: list[torch.Tensor] = []

    def again(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not found:
            found.append(torch.empty(0))
            found.extend((model(IDS).logits, other(IDS).logits))

    model.model.layers[1].register_forward_pre_hook(again)
    assert torch.equal(model(IDS[:1], attention_mask=mask).logits, expected)
    assert torch.equal(found[1], inner)
    assert torch.equal(found[2], inner)


class Stopped(BaseException):
    """Stands for Ctrl-C."""


@torch.no_grad()
def test_a_pass_that_is_broken_off_leaves_nothing_behind(loaded: PreTrainedModel) -> None:
    model = copy.deepcopy(loaded)
    expected = model(IDS).logits

    def stop(*_: object) -> None:
        raise Stopped

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        model(IDS)
    handle.remove()
    assert getattr(here, "current", None) is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(wina_calib.set_sparsity, model, 0.5).result(timeout=30)
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_a_wait_that_is_broken_off_leaves_no_pass_behind(loaded: PreTrainedModel) -> None:
    model = copy.deepcopy(loaded)
    model(IDS)  # its storage is looked at here
    state = runtime_state(model)
    waiting, done = threading.Event(), threading.Event()

    def change() -> None:
        with state.gate.alone():
            waiting.set()
            done.wait(30)

    thread = in_thread(change)
    waiting.wait(30)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(state.gate, "_changed", Interrupted(state.gate._changed))
        model(IDS)
    done.set()
    thread.join(30)
    assert getattr(here, "current", None) is None


class Interrupted:
    """A condition whose wait is broken off."""

    def __init__(self, condition: threading.Condition) -> None:
        self.condition = condition

    def __enter__(self) -> bool:
        return self.condition.__enter__()

    def __exit__(self, *args: object) -> None:
        self.condition.__exit__(None, None, None)

    def wait(self) -> None:
        raise Stopped


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_a_change_waits_for_passes_and_they_for_it() -> None:
    gate, order = Gate(), []
    inside, changing, may_end = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        gate.enter()
        gate.enter()  # a pass within it
        inside.set()
        may_end.wait()
        gate.leave()
        order.append("pass")
        gate.leave()

    def change() -> None:
        inside.wait()
        changing.set()
        with gate.alone(), gate.alone():
            gate.enter()
            order.append("change")
            gate.leave()

    def late() -> None:
        with gate.alone():
            order.append("late")
        gate.enter()
        gate.leave()

    threads = [in_thread(run), in_thread(change)]
    changing.wait()
    threads.append(in_thread(late))
    may_end.set()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert order[0] == "pass"
    assert sorted(order[1:]) == ["change", "late"]


@torch.no_grad()
def test_the_stock_signature_and_name_stay(loaded: PreTrainedModel) -> None:
    decoder = loaded.model
    assert type(decoder).__name__ == "LlamaModel"
    out = decoder(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert tiny.cache_of(out) is not None

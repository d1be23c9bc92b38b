"""The Triton kernels, on a GPU or, for correctness alone, on the CPU with TRITON_INTERPRET=1."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import ADVERSARIAL, DTYPES, LIMITS, adversarial, error, exact, operands

from wina_calib.masks import mask
from wina_calib.runtime.kernels import autotune, cluster, cuda, dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    # The interpreter makes loop bounds of one-element arrays by int(), which numpy refuses since 2.4.
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(*args, **kwargs):
        patch(*args, **kwargs)
        for holder in args:
            if isinstance(holder, interpreter._LangPatchScope):
                holder.set_attr(interpreter.tl.core.tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRET or not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch makes one to start its graph pool with
]
SHAPES = [(128, 128), (77, 40)] if INTERPRET else [(512, 256), (333, 130), (4096, 1000), (1024, 5632)]
CONFIGS = [autotune.Config(64, 8, 128, 1), autotune.Config(256, 16, 64, 2)]


def launch(args, config=None):
    """The product by the kernels themselves, also in the interpreter."""
    x, weight_t = args[:2]
    if config is None:
        config = autotune.candidates(*weight_t.shape, x.element_size())[0]
    return cuda.launch(config, *args, overlap=False if INTERPRET else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_one_row_matches_float64(dtype, width, out, config):
    args = operands(1, width, out, dtype, device=DEVICE)
    assert error(launch(args, config), exact(*args)) <= LIMITS[dtype]
    bias = torch.randn(out, device=DEVICE).to(dtype)
    full = (*args, torch.ones(1, dtype=torch.bool, device=DEVICE), bias)
    assert error(launch(full, config), exact(*full)) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize(("width", "out"), [(133, 70)] if INTERPRET else [(1024, 512), (333, 130)])
def test_adversarial_inputs(dtype, case, width, out):
    args = adversarial(case, width, out, dtype, device=DEVICE)
    y = launch(args)
    assert error(y, exact(*args)) <= LIMITS[dtype]
    if case == "nothing":
        assert not y.any()


def test_strided_input_and_repeatable_bits():
    dtype = torch.float16
    wide, weight_t, norm, threshold = operands(1, 666, 130, dtype, device=DEVICE)
    args = (wide[:, ::2], weight_t[:333].contiguous(), norm[:333].contiguous(), threshold)
    first = launch(args)
    assert error(first, exact(*args)) <= LIMITS[dtype]
    for _ in range(3):
        assert torch.equal(launch(args), first)


def test_nan_shows_in_the_output():
    x, weight_t, norm, threshold = operands(1, 128, 256, torch.float32, device=DEVICE)
    x[0, 77] = float("nan")
    assert launch((x, weight_t, norm, threshold)).isnan().all()


@needs_gpu
class TestOnTheGpu:
    """What only a device shows: graphs, compilation, tuning."""

    @pytest.fixture(autouse=True, params=["cuda", "triton"])
    def cache(self, request, monkeypatch, tmp_path):
        if request.param == "triton":
            monkeypatch.setattr(cluster, "available", lambda index: False)
        elif not cluster.available(0):
            pytest.skip("needs a card with clusters")
        self.kind = request.param
        monkeypatch.setenv("WINA_CALIB_CACHE", str(tmp_path))
        monkeypatch.delenv("WINA_CALIB_AUTOTUNE", raising=False)
        monkeypatch.setattr(autotune, "_known", {})
        monkeypatch.setattr(autotune, "_loaded", set())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 3, 9])
    def test_seam(self, dtype, rows):
        args = operands(rows, 4096, 1000, dtype, device=DEVICE)
        assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[dtype]

    def test_tuned_once_and_remembered(self, monkeypatch):
        args = operands(1, 2048, 2560, torch.bfloat16, device=DEVICE)
        dispatch.sparse_site(*args)
        (entry,) = json.loads(autotune.cache_file().read_text()).values()
        monkeypatch.setattr(autotune, "_known", {})
        monkeypatch.setattr(autotune, "_loaded", set())
        monkeypatch.setattr(cuda, "_fastest", None)
        assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[torch.bfloat16]
        owner, kind = (cluster, cluster.Shape) if self.kind == "cuda" else (autotune, autotune.Config)
        assert kind(*entry) in owner.candidates(2048, 2560, 2)

    def test_capture_of_an_untuned_shape(self, monkeypatch):
        monkeypatch.setattr(cuda, "_fastest", None)
        x, weight_t, norm, threshold = operands(1, 2048, 768, torch.bfloat16, device=DEVICE)
        if self.kind == "triton":
            launch((x, weight_t, norm, threshold))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dispatch.sparse_site(x, weight_t, norm, threshold)
        for value in (0.75, 0.2, -1.0):
            threshold.fill_(value)
            y.fill_(float("nan"))
            graph.replay()
            assert error(y, exact(x, weight_t, norm, threshold)) <= LIMITS[torch.bfloat16]

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled_without_recompiling(self, mode):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        x, weight_t, norm, threshold = operands(1, 1024, 1024, torch.bfloat16, device=DEVICE)

        def site(x):
            return dispatch.sparse_site(x + 1, weight_t, norm, threshold) * 2

        compiled = torch.compile(site, fullgraph=True, mode=mode)
        with torch.no_grad():
            for value in (0.75, 0.75, 0.75, 0.2, -1.0):
                threshold.fill_(value)
                assert torch.equal(compiled(x).clone(), site(x))
        assert not torch._dynamo.utils.counters["graph_break"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_without_a_compiler_the_reference_answers(self, monkeypatch, caplog):
        def broken(*args, **kwargs):
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(cuda, "launch", broken)
        monkeypatch.setattr(cluster, "launch", broken)
        monkeypatch.setattr(cuda, "_unusable", set())
        args = operands(1, 512, 384, torch.bfloat16, device=DEVICE)
        for _ in range(2):
            assert error(dispatch.sparse_site(*args), exact(*args)) <= LIMITS[torch.bfloat16]
        assert [r.message[:21] for r in caplog.records if r.name.endswith("cuda")] == ["Triton cannot compile"]

    def test_many_products_share_scratch_safely(self):
        calls = [operands(1, 1024, 512 + 64 * i, torch.bfloat16, seed=i, device=DEVICE) for i in range(8)]
        config = autotune.Config(64, 8, 128, 1)
        for _ in range(5):
            results = [cuda.launch(config, *args) for args in calls]
            for y, args in zip(results, calls, strict=True):
                assert error(y, exact(*args)) <= LIMITS[torch.bfloat16]


@pytest.mark.skipif(INTERPRET or not torch.cuda.is_available() or not cluster.available(0), reason="needs clusters")
class TestProductInCuda:
    """The product in CUDA itself, at sizes around what its blocks take."""

    SHAPES = tuple(dict.fromkeys(cluster.NARROW + cluster.WIDE)) + (cluster.Shape(32, 4, 1, 8),)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("width", "out"), [(1, 8), (40, 8), (333, 136), (4096, 1000), (14336, 512)])
    def test_matches_float64(self, dtype, width, out):
        args = operands(1, width, out, dtype, device=DEVICE)
        bias = torch.randn(out, device=DEVICE).to(dtype)
        for extra in ((), (torch.tensor([False], device=DEVICE), bias), (torch.tensor([True], device=DEVICE),)):
            expected = exact(*args, *extra)
            for shape in self.SHAPES:
                if shape.passes(width) <= cluster.MAX_PASSES:
                    y = cluster.launch(shape, *args, *extra)
                    assert error(y, expected) <= LIMITS[dtype], shape
                    assert torch.equal(cluster.launch(shape, *args, *extra), y)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", ADVERSARIAL)
    def test_adversarial_inputs(self, dtype, case):
        args = adversarial(case, 1000, 520, dtype, device=DEVICE)
        for shape in self.SHAPES:
            y = cluster.launch(shape, *args)
            assert error(y, exact(*args)) <= LIMITS[dtype], shape
            if case == "nothing":
                assert not y.any()

    def test_nan_and_strides(self):
        x, weight_t, norm, threshold = operands(1, 512, 256, torch.bfloat16, device=DEVICE)
        wide = torch.stack([x, x], dim=2).reshape(1, 1024)[:, ::2]
        shape = self.SHAPES[0]
        assert torch.equal(
            cluster.launch(shape, wide, weight_t, norm, threshold), cluster.launch(shape, x, weight_t, norm, threshold)
        )
        x[0, 77] = float("nan")
        assert cluster.launch(shape, x, weight_t, norm, threshold).isnan().all()

    def test_a_thread_that_has_not_used_the_card(self):
        args = operands(1, 512, 256, torch.bfloat16, device=DEVICE)
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(lambda _: cluster.launch(self.SHAPES[0], *args), range(64)):
                assert error(y, exact(*args)) <= LIMITS[torch.bfloat16]

    def test_what_it_cannot_read_goes_elsewhere(self):
        odd = operands(1, 512, 130, torch.bfloat16, device=DEVICE)
        assert not cluster.serves(*odd[:2])
        assert not cluster.serves(*operands(2, 512, 256, torch.bfloat16, device=DEVICE)[:2])
        assert not cluster.serves(*operands(1, 100_000, 256, torch.bfloat16, device=DEVICE)[:2])
        assert error(dispatch.sparse_site(*odd), exact(*odd)) <= LIMITS[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 77, 2050])
def test_the_mask_of_many_rows_is_the_references(dtype, width):
    x, _, norm, threshold = operands(5, width, 4, dtype, device=DEVICE)
    x[1, 0], x[2, width // 2] = float("nan"), float("inf")
    rows = torch.tensor([True, False, False, True, False], device=DEVICE)
    for values in (x, x.t().contiguous().t(), torch.cat([x, x], dim=1)[:, width // 2 : width // 2 + width]):
        for dense in (None, rows):
            found = cuda.MaskInputs(norm, threshold)(values, dense)
            expected = values * (
                (values.float().abs() * norm <= threshold).logical_not() | (dense is not None and dense[:, None])
            )
            assert torch.equal(found.nan_to_num(7.0), torch.where(expected == 0, 0.0, expected).nan_to_num(7.0))
    assert torch.equal(cuda.MaskInputs(norm, threshold.new_full((), -1.0))(x, None).nan_to_num(7.0), x.nan_to_num(7.0))


@needs_gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_masks_of_many_rows_are_those_of_the_score(dtype):
    x, _, norm, threshold = operands(6, 2050, 4, dtype, device=DEVICE)
    x, rows = x.view(2, 3, -1), torch.tensor([[True, False, False], [False, True, False]], device=DEVICE)
    for limit in (threshold, threshold.new_full((), -1.0)):
        for dense in (None, rows):
            for values in (x, x[:, 1:]):
                some = dense if dense is None or values is x else dense[:, 1:]
                expected = mask.mask_inputs(values, norm, limit, dense_rows=some)
                assert torch.equal(dispatch.mask_inputs(values, norm, limit, some), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "size", "length"), [(8, 2, 64, 37), (6, 6, 32, 130), (40, 2, 128, 300)])
def test_attention_of_one_token(dtype, heads, groups, size, length):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies matrices of bfloat16 as if their bits were whole numbers")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, h, n, size, generator=generator).to(dtype).to(DEVICE)
        for h, n in ((heads, 1), (groups, length), (groups, length))
    )
    mask = torch.rand(2, 1, 1, length, generator=generator).to(DEVICE) < 0.6
    mask[..., 0], mask[0, ..., 20:] = True, False
    for seen in (mask, None):
        every = (t.repeat_interleave(heads // groups, dim=1).double() for t in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *every, attn_mask=seen, scale=0.2)
        found = cuda.attend(query, key, value, seen, 0.2)
        assert error(found.double().transpose(1, 2), expected) <= LIMITS[dtype]

"""What a user of the operator meets on a GPU: fla's own test grid, refusals, compilation ahead, CUDA graphs, several GPUs, torch.compile."""

import re

import pytest
import torch
import torch.nn.functional as F
from support import make_inputs, relative_error
from torch import Tensor

from deltanet import BackendError, DeltaNet, DeltaNetConfig, LanguageModel, ModelConfig
from deltanet.ops import autograd as operator
from deltanet.ops import chunk_delta_rule, decode_step, explain, recurrent_delta_rule, warmup
from deltanet.reference import recurrent

pytestmark = pytest.mark.gpu
RULES = [chunk_delta_rule, recurrent_delta_rule]


# ---- fla's grid (version 0.6.0, tests/ops/test_delta.py): its shapes, inputs, dtype, metric and bounds, against the definition in fp64

# B, T, H, D, scale, whether q and k are normalised
FLA_GRID = [
    (1, 63, 1, 64, 1.0, False),
    (2, 100, 4, 60, 0.1, False),
    (2, 1000, 3, 128, 0.1, False),
    (2, 1024, 4, 128, 1.0, True),
    (3, 2000, 4, 128, 0.1, False),
    (4, 2048, 8, 64, 0.1, False),
]
FLA_PACKED = [
    (2, 64, [0, 15]),
    (3, 60, [0, 111, 500]),
    (3, 64, [0, 256, 500, 900, 1000]),
    (4, 100, [0, 15, 100, 300, 1200, 1599, 1800, 2000]),
]


def fla_inputs(B: int, T: int, H: int, D: int, N: int, normalise_q: bool) -> list[Tensor]:
    """q, k, v, beta, initial state, do, and the gradient of the final state; fp16, the keys normalised."""
    gen = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    q, k = normal(B, T, H, D), F.normalize(normal(B, T, H, D), dim=-1)
    q = F.normalize(q, dim=-1) if normalise_q else q
    beta = torch.rand(B, T, H, generator=gen).sigmoid()
    halves = [x.half().cuda() for x in (q, k, normal(B, T, H, D), beta)]
    return [*halves, normal(N, H, D, D).cuda(), normal(B, T, H, D).half().cuda(), normal(N, H, D, D).cuda()]


def assert_close_as_fla_does(found: dict[str, Tensor], wanted: dict[str, Tensor], forward: float, backward: float) -> None:
    """Root mean square of the error over that of the reference, below a bound for each."""
    for name, x in wanted.items():
        assert torch.isfinite(found[name]).all(), name
        error = (found[name].double() - x).square().mean().sqrt() / (x.square().mean().sqrt() + 1e-8)
        assert error < (forward if name in ("o", "final_state") else backward), (name, error.item())


def run_fla_case(shape: tuple[int, int, int, int], scale: float, normalise_q: bool, cu_seqlens: Tensor | None, forward: float) -> None:
    N = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    *inputs, do, dfinal = fla_inputs(*shape, N, normalise_q)
    names = ("dq", "dk", "dv", "dbeta", "dinitial_state")
    leaves = [x.requires_grad_() for x in inputs]
    o, final = chunk_delta_rule(*leaves[:4], None, scale, leaves[4], True, cu_seqlens)
    grads = torch.autograd.grad([o, final], leaves, [do, dfinal])
    found = dict(zip(("o", "final_state", *names), (o, final, *grads), strict=True))
    q, k, v, beta, state = (x.detach().double() for x in leaves)
    exact = recurrent.delta_rule(q, k, v, beta, None, scale, state, cu_seqlens)
    *exact_grads, _, dstate = recurrent.backward(do.double(), dfinal.double(), q, k, v, beta, None, scale, state, cu_seqlens, [])
    wanted = dict(zip(("o", "final_state", *names), (*exact, *exact_grads, dstate), strict=True))
    assert_close_as_fla_does(found, wanted, forward, 0.008)


@pytest.mark.parametrize("case", FLA_GRID, ids=str)
def test_flas_grid(case: tuple[int, int, int, int, float, bool]) -> None:
    run_fla_case(case[:4], case[4], case[5], None, 0.006)


@pytest.mark.parametrize("case", FLA_PACKED, ids=str)
def test_flas_packed_grid(case: tuple[int, int, list[int]]) -> None:
    H, D, bounds = case
    run_fla_case((1, bounds[-1], H, D), 1.0, False, torch.tensor(bounds, dtype=torch.int32, device="cuda"), 0.005)


# ---- the door


def cuda_inputs(dtype: torch.dtype = torch.bfloat16, **options):
    return make_inputs(**{"B": 2, "T": 130, "H": 2, "K": 64, "V": 64, **options}, dtype=dtype, device="cuda")


def test_auto_takes_kernels() -> None:
    x = cuda_inputs()
    found = explain(x.q, x.k, x.v, x.beta)
    assert found.chosen not in (None, "reference")
    assert "auto takes it" in str(found)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype=torch.float64), "not float64: cast the tensors"),
        (dict(K=257), "K must be 16 to 256, got 257"),
        (dict(K=8), "K must be 16 to 256, got 8"),
        (dict(V=300), "V must be 16 to 256, got 300"),
    ],
    ids=str,
)
def test_what_kernels_cannot_take_is_refused(rule, options: dict, message: str) -> None:
    """By name, and by auto: on a GPU nothing goes to the slow reference in silence."""
    x = cuda_inputs(**options)
    for backend in ("auto", "triton"):
        with pytest.raises(BackendError, match=re.escape(message)):
            rule(x.q, x.k, x.v, x.beta, backend=backend)
    assert rule(x.q, x.k, x.v, x.beta, backend="reference")[0].shape == x.v.shape
    found = explain(x.q, x.k, x.v, x.beta)
    assert found.chosen is None
    assert message in str(found)


def test_tensors_of_two_devices_are_refused() -> None:
    x = cuda_inputs()
    with pytest.raises(ValueError, match="v must be on q's device cuda:0, got cpu"):
        chunk_delta_rule(x.q, x.k, x.v.cpu(), x.beta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [None, 0.5])
def test_decode_step_in_place(dtype: torch.dtype, gate: float | None) -> None:
    """Again and again, whole states and slices of a pool, in a CUDA graph too: the kernel is kept under all that decides its code."""
    for B, HV, K, V in ((1, 2, 64, 64), (3, 4, 100, 72), (64, 16, 128, 128)):
        x = make_inputs(B=B, T=1, H=HV // 2, HV=HV, K=K, V=V, gate=gate, state=True, dtype=dtype, device="cuda")
        inputs = (x.q, x.k, x.v, x.beta, x.g)
        wide = [None if y is None else y.double() for y in inputs]
        wanted, final = recurrent.delta_rule(*wide, 0.3, x.initial_state.double())
        pool = torch.full((B, HV + 3, K, V), 7.0, device="cuda")
        for state in (x.initial_state.clone(), pool[:, 1 : HV + 1]):
            state.copy_(x.initial_state)
            o = decode_step(*inputs, 0.3, state=state)
            assert relative_error(o, wanted) < (5e-3 if dtype == torch.bfloat16 else 2e-6)
            assert relative_error(state, final) < 2e-6
        assert (pool[:, [0, HV + 1, HV + 2]] == 7).all()
        graph, state = torch.cuda.CUDAGraph(), x.initial_state.clone()
        with torch.cuda.graph(graph):
            o = decode_step(*inputs, 0.3, state=state)
        state.copy_(x.initial_state)
        graph.replay()
        assert relative_error(state, final) < 2e-6


# ---- compilation ahead, CUDA graphs, several GPUs


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that Triton compiles (or reads from its cache on disk) from now on."""
    from triton.runtime.jit import JITFunction

    seen: list[str] = []
    plain = JITFunction._do_compile

    def watched(self, *args, **kwargs):
        seen.append(self.__name__)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", watched)
    return seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [dict(), dict(gated=True, states=True, packed=True)], ids=str)
def test_warmup_leaves_nothing_to_compile(rule, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rule.__name__.split("_")[0]
    seen = compilations(monkeypatch)
    # sizes that no other test has, so that it is the warm-up that compiles
    warmup(heads=3, value_heads=6, key_dim=48, value_dim=80, dtype=torch.float16, algorithm=algorithm, backend="triton", **options)
    assert seen
    seen.clear()
    packed, gated, states = (options.get(name) for name in ("packed", "gated", "states"))
    x = make_inputs(
        T=333, H=3, HV=6, K=48, V=80, dtype=torch.float16, device="cuda", state=bool(states),
        gate=0.1 if gated else None, lengths=[100, 0, 233] if packed else None,
    )  # fmt: skip
    x.g = None if x.g is None else x.g.float()
    leaves = x.leaves()
    o, final = rule(**leaves, output_final_state=bool(states), cu_seqlens=x.cu_seqlens, backend="triton")
    outputs, grads = ([o, final], [x.do, x.dfinal_state]) if states else ([o], [x.do])
    torch.autograd.grad(outputs, list(leaves.values()), grads)
    assert seen == []


def test_whoever_hooks_into_triton_sees_every_launch() -> None:
    """Profilers do; without one, calls skip the preparation for it. The first call goes through Triton's front door, the second does not."""
    from triton import knobs

    x = cuda_inputs()
    leaves, seen = x.leaves(), []
    call = ("q", "k", "v", "beta")
    chunk_delta_rule(*(leaves[n] for n in call), backend="triton")

    def note(metadata) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        o, _ = chunk_delta_rule(*(leaves[n] for n in call), backend="triton")
        torch.autograd.grad(o, [leaves[n] for n in call], x.do)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    assert {"transform", "forward", "state_gradient", "gradients"} <= set(seen)
    count = len(seen)
    chunk_delta_rule(*(leaves[n] for n in call), backend="triton")
    assert len(seen) == count


@pytest.mark.parametrize("rule", RULES)
def test_a_cuda_graph_captures_forward_and_backward(rule) -> None:
    x = cuda_inputs(gate=0.1, state=True)
    leaves = x.leaves()

    def call() -> list[Tensor]:
        o, final = rule(**leaves, output_final_state=True)
        return [o, final, *torch.autograd.grad([o, final], list(leaves.values()), [x.do, x.dfinal_state])]

    wanted = [x_.detach() for x_ in call()]  # without its graph, whose leaves would stay bound to the stream that made it
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for x_ in found:
        x_.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("rule", RULES)
def test_kernels_run_where_their_tensors_are(rule) -> None:
    """On cuda:1 while cuda:0 is current: the same bits, forward, backward and one token."""
    assert torch.cuda.current_device() == 0
    results = []
    for device in ("cuda:0", "cuda:1"):
        x = make_inputs(B=2, T=130, K=64, V=64, gate=0.1, state=True, dtype=torch.float32)
        leaves = {n: t.to(device).requires_grad_() for n, t in x.leaves().items()}
        with torch.no_grad():
            one = {n: t if n == "initial_state" else t[:, :1] for n, t in leaves.items()}
            step = rule(**one, output_final_state=True)
        o, final = rule(**leaves, output_final_state=True)
        grads = torch.autograd.grad([o, final], list(leaves.values()), [x.do.to(device), x.dfinal_state.to(device)])
        assert all(t.device == torch.device(device) for t in (o, final, *grads))
        results.append([t.cpu() for t in (*step, o, final, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- torch.compile and the operator's registration


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [dict(), dict(gate=0.1, lengths=[100, 0, 29], state=True)], ids=str)
def test_opcheck(rule, options: dict) -> None:
    x = make_inputs(**{"B": 2, "T": 129, "H": 1, "HV": 2, "K": 32, "V": 64, **options}, dtype=torch.float32, device="cuda")
    leaves = x.leaves()
    args = [leaves.get(n) for n in ("q", "k", "v", "beta", "g")]
    args += [0.5, leaves.get("initial_state"), x.cu_seqlens, True, "states", rule.__name__.split("_")[0], "auto"]
    # Not its comparison of two runs bit by bit: what is saved for the backward has places that nobody writes or reads.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator._delta_rule, args, test_utils=tests)


def gradients(module: torch.nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().square().mean(), list(module.parameters())))


@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_compiles_whole(packed: bool) -> None:
    torch.manual_seed(0)
    layer = DeltaNet(256, DeltaNetConfig(heads=4, output_gate=True)).cuda().bfloat16()
    x = torch.randn(1, 300, 256, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 120, 120, 300], device="cuda") if packed else None
    compiled = torch.compile(layer, fullgraph=True)
    y, found = layer(x, cu_seqlens=cu_seqlens)[0], compiled(x, cu_seqlens=cu_seqlens)[0]
    assert relative_error(found, y) < 2e-2
    for (name, _), a, b in zip(layer.named_parameters(), gradients(layer, found), gradients(layer, y), strict=True):
        assert relative_error(a, b) < 5e-2, name


def test_the_whole_model_compiles_whole() -> None:
    torch.manual_seed(0)
    mixers = (DeltaNetConfig(heads=4), DeltaNetConfig(heads=2, value_heads=4, negative_eigenvalues=True))
    model = LanguageModel(ModelConfig(vocab_size=300, d_model=256, depth=2, layers=mixers, feed_forward=512)).cuda().bfloat16()
    tokens = torch.randint(0, 300, (2, 259), device="cuda")
    compiled = torch.compile(model, fullgraph=True)
    y, found = model(tokens)[0], compiled(tokens)[0]
    assert relative_error(found, y) < 2e-2
    for (name, _), a, b in zip(model.named_parameters(), gradients(model, found), gradients(model, y), strict=True):
        assert relative_error(a, b) < 5e-2, name


def test_streaming_is_the_full_forward() -> None:
    """A prompt by chunks, then tokens one by one from its state, give the logits of the whole."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=300, d_model=256, depth=2, layers=(DeltaNetConfig(heads=2),))).cuda()
    tokens = torch.randint(0, 300, (3, 150), device="cuda")
    with torch.no_grad():
        whole, _ = model(tokens)
        logits, state = model(tokens[:, :130], model.init_state(3))
        parts = [logits]
        for t in range(130, 150):
            logits, state = model(tokens[:, t : t + 1], state)
            parts.append(logits)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-4

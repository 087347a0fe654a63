"""The chunk kernels against the definition in fp64: in Triton's interpreter without a GPU (fp32, fp16), compiled on one (bf16 too).

Each of these faults was planted once and seen: E from X without beta, D of another chunk, heads counted by H, segments joined without M,
exp2 of unmasked exponents, a merge of the solve left out, D kept in dq alone (wide values), rows past the end not masked (a crash).
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from deltanet.kernels import launch
from deltanet.kernels.triton import chunk, chunk_call
from deltanet.reference import recurrent

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# relative L2 error against fp64, by dtype: fla has .0052 at worst in bf16 (docs/log.md); a wrong mask or a lost term costs 1e-2 and more
LIMIT = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 7e-3}


def inputs(B, T, H, HV, K, V, dtype, *, gate=None, N=None, states=False, beta_max=1.0, keys="iid", seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    spread = {"iid": normal(B, T, H, K) + 0.3, "alike": normal(1, 1, H, K) * 0.95 + normal(B, T, H, K) * 0.3,
              "same": normal(1, 1, H, K).expand(B, T, H, K)}[keys]  # fmt: skip
    q, k, v = F.normalize(normal(B, T, H, K), dim=-1), F.normalize(spread, dim=-1), normal(B, T, HV, V)
    beta = normal(B, T, HV).sigmoid() * beta_max if keys == "iid" else torch.full((B, T, HV), beta_max)
    beta[:, 5::11] = 0
    g = None if gate is None else -gate * torch.rand(B, T, HV, generator=gen)
    N = B if N is None else N
    state, dstate = (normal(N, HV, K, V), normal(N, HV, K, V)) if states else (None, None)
    tensors = [x.to(DEVICE, dtype) for x in (q, k, v, beta, normal(B, T, HV, V))]
    return *tensors, *(None if x is None else x.to(DEVICE) for x in (g, state, dstate))


def definition(q, k, v, beta, do, g, state, dstate, scale, cu_seqlens):
    """What the definition gives in fp64, by name, gradients by autograd."""
    given = {"q": q, "k": k, "v": v, "beta": beta, "g": g, "state": state}
    given = {n: None if x is None else x.detach().double().requires_grad_() for n, x in given.items()}
    o, final = recurrent.delta_rule(*list(given.values())[:5], scale, given["state"], cu_seqlens)
    loss = (o * do.double()).sum() + (0 if dstate is None else (final * dstate.double()).sum())
    asked = {n: x for n, x in given.items() if x is not None}
    grads = torch.autograd.grad(loss, list(asked.values()))
    return {"o": o.detach(), "final": final.detach(), **{f"d{n}": x for n, x in zip(asked, grads, strict=True)}}


def kernels(q, k, v, beta, do, g, state, dstate, scale, cu_seqlens, save="states"):
    o, final, kept = chunk.chunk_forward(q, k, v, beta, g, scale, state, cu_seqlens, output_final_state=True, save=save)
    assert [(x.shape, x.dtype) for x in kept] == [(x.shape, x.dtype) for x in chunk_call.saved(q, v, g, cu_seqlens, save)]
    grads = chunk.chunk_backward(do, dstate, q, k, v, beta, g, scale, state, cu_seqlens, kept)
    return {"o": o, "final": final, **dict(zip(("dq", "dk", "dv", "dbeta", "dg", "dstate"), grads, strict=True))}


def changed_elsewhere(run, given, cu_seqlens, bad):
    """What sequences get differently, by name, when sequence `bad` holds NaN and infinities: `run(*given)` must give the others the same bits."""
    bounds = cu_seqlens.tolist()
    start, end = bounds[bad : bad + 2]
    before = {name: None if x is None else x.clone() for name, x in run(*given).items()}
    given = [None if x is None else x.clone() for x in given]
    for x in given[:6]:
        if x is not None:
            x[:, start:end:2], x[:, start + 1 : end : 2] = math.nan, math.inf
    for x in given[6:]:
        if x is not None:
            x[bad] = math.nan
    changed = []
    for name, after in run(*given).items():
        if after is not None:
            parts = [slice(bad), slice(bad + 1, None)] if name in ("final", "dstate") else [(0, slice(start)), (0, slice(end, None))]
            assert all(before[name][part].isfinite().all() for part in parts), name
            changed += [name] * (not all(torch.equal(before[name][part], after[part]) for part in parts))
    return changed


def error(x, exact):
    norm = exact.norm()
    relative = ((x.double() - exact).norm() / (norm if norm > 0 else 1)).item()
    return relative if math.isfinite(relative) else math.inf  # NaN would be nobody's maximum


def check(*shape, dtype=torch.float32, lengths=None, scale=None, save="states", limit=None, **options):
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    given = inputs(*shape, dtype, N=None if lengths is None else len(lengths), **options)
    scale = shape[4] ** -0.5 if scale is None else scale
    exact = definition(*given, scale, cu)
    ours = kernels(*given, scale, cu, save)
    errors = {name: error(ours[name], exact[name]) for name in exact}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= (limit or LIMIT[dtype]), errors
    return errors


RAGGED = [0, 1, 69, 0, 65]
CASES = {
    "tail": dict(shape=(1, 130, 1, 1, 64, 64)),
    "one token": dict(shape=(2, 1, 1, 1, 64, 64), states=True),
    "states": dict(shape=(1, 70, 1, 1, 64, 64), states=True, beta_max=2.0),
    "gated, grouped, odd dims": dict(shape=(1, 70, 2, 4, 24, 40), states=True, gate=0.2),
    "packed": dict(shape=(1, 135, 1, 1, 32, 64), lengths=RAGGED, states=True),
    "packed, gated, lean": dict(shape=(1, 135, 1, 1, 64, 64), lengths=RAGGED, states=True, gate=0.2, save="lean"),
    "wide values": dict(shape=(1, 130, 1, 1, 64, 128)),
    # sums of g near -4000 leave 2e-4 of an exponent in fp32
    "strong decay": dict(shape=(1, 130, 1, 1, 64, 64), gate=80.0, states=True, limit=1e-3),
    "no decay": dict(shape=(1, 70, 1, 1, 64, 64), gate=0.0),
    "fp16": dict(shape=(1, 130, 1, 1, 100, 64), dtype=torch.float16, states=True),
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name):
    case = dict(CASES[name])
    check(*case.pop("shape"), **case)


@pytest.mark.slow
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
@pytest.mark.parametrize("dims", [(128, 128), (256, 64), (64, 256), (16, 200), (100, 130)])
def test_wider_heads(dims, beta_max):
    check(1, 150, 2, 4, *dims, states=True, gate=0.1, beta_max=beta_max)


@pytest.mark.parametrize(
    "case",
    [dict(), dict(states=False), dict(gate=0.1, save="lean"), dict(lengths=[0, 1, 129, 70], gate=0.1), dict(dims=(256, 40), T=130)],
    ids=str,
)
def test_segments_give_what_whole_sequences_give(case, monkeypatch):
    monkeypatch.setattr(chunk_call, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(chunk_call, "SHORTEST_SEGMENT", 64)
    case = dict(case)
    check(1, case.pop("T", 200), 1, 1, *case.pop("dims", (64, 64)), **{"states": True, **case})


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("gate", "segments"), [(None, False), (0.1, True)])
def test_what_another_sequence_holds_is_not_seen(gate, segments, monkeypatch):
    """By the others in its batch: tiles that reach over a sequence's end do not read what is there. Nor does the definition."""
    if segments:
        monkeypatch.setattr(chunk_call, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(chunk_call, "SHORTEST_SEGMENT", 64)
    cu = torch.tensor([0, 70, 140, 211], dtype=torch.int32, device=DEVICE)
    given = inputs(1, 211, 1, 1, 64, 64, torch.float32, gate=gate, N=3, states=True, beta_max=2.0)
    assert changed_elsewhere(lambda *given: kernels(*given, 0.1, cu), given, cu, bad=1) == []
    assert changed_elsewhere(lambda *given: definition(*given, 0.1, cu), given, cu, bad=1) == []


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5])
def test_any_scale(scale):
    check(1, 65, 1, 1, 64, 64, scale=scale, states=True)


def test_strided_inputs():
    *given, g, state, dstate = inputs(2, 66, 1, 1, 64, 64, torch.float32)
    plain = kernels(*given, g, state, dstate, 0.1, None)
    strided = [torch.stack([x, torch.full_like(x, 7)], -1)[..., 0] for x in given]
    assert not any(x.is_contiguous() for x in strided)
    for name, x in kernels(*strided, g, state, dstate, 0.1, None).items():
        assert x is plain[name] is None or torch.equal(x, plain[name]), name


def test_no_tokens_hand_the_state_through():
    q, k, v, beta, do, g, state, dstate = inputs(2, 0, 1, 1, 64, 64, torch.float32, states=True)
    ours = kernels(q, k, v, beta, do, g, state, dstate, 0.1, None)
    assert ours["o"].shape == v.shape
    assert torch.equal(ours["final"], state)
    assert torch.equal(ours["dstate"], dstate)


@pytest.mark.parametrize("keys", ["iid", "alike", "same"])
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_the_triangular_solve(keys, beta_max):
    """X to 1e-3 for the worst keys there are; a tf32 or fp16 solve has 0.3 to 0.4 for repeated keys at beta 2."""
    _, k, v, beta, *_ = inputs(1, 100, 1, 1, 64, 64, torch.float32, beta_max=beta_max, keys=keys)
    call = chunk_call.Call(k, v, beta, None, None)
    X, b, *_ = chunk_call.saved(k, v, None, None, "lean")
    chunk._transform(call, k, beta, None, b, None, X, None)
    X = X[0, : 64 * 48].cpu()
    full = torch.zeros(64, 64)
    full[:32, :32], full[32:] = X[:1024].view(32, 32), X[1024:].view(32, 64)
    kd, bd = k[0, :64, 0].double().cpu(), beta[0, :64, 0].double().cpu()
    L = (kd @ kd.T).tril(-1)
    exact = torch.linalg.solve(torch.eye(64).double() + L * bd, L)
    assert (full - exact).abs().max() < 1e-3
    assert torch.equal(b.view(-1), beta.view(-1))


REPEATED = {
    "whole tiles": dict(shape=(1, 200, 1, 2, 64, 64)),
    "tiles of 32": dict(shape=(1, 130, 1, 1, 64, 64)),
    "a narrow tile, gated, packed": dict(shape=(1, 265, 1, 1, 64, 100), lengths=[1, 199, 0, 65], gate=1e-3, states=True),
    "segments": dict(shape=(1, 265, 1, 1, 64, 64), states=True),
}


@pytest.mark.parametrize("name", REPEATED)
def test_what_rounding_left_of_X_reaches_the_backward(name, monkeypatch):
    """Alike keys at beta 2, where it matters. X is rounded to 8 bits, as in bf16, though all else is fp16: the interpreter has no bf16."""
    case = dict(REPEATED[name])
    if name == "segments":
        monkeypatch.setattr(chunk_call, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(chunk_call, "SHORTEST_SEGMENT", 64)
    if name == "tiles of 32":
        monkeypatch.setattr(chunk_call, "_gpu", lambda device: launch.AMPERE)
    shape, lengths, plain = case.pop("shape"), case.pop("lengths", None), chunk.chunk_forward

    def forward(*args, **kwargs):
        o, final, kept = plain(*args, **kwargs)
        kept[0].copy_(kept[0].bfloat16())
        return o, final, kept

    monkeypatch.setattr(chunk, "chunk_forward", forward)
    found = []
    for dtypes in ((), (torch.float16,)):
        monkeypatch.setattr(chunk, "ROUNDING_COUNTS", dtypes)
        found.append(check(*shape, dtype=torch.float16, keys="alike", beta_max=2.0, limit=9.0, lengths=lengths, **case))
    rounded, whole = found
    assert whole["dv"] < 0.02
    assert rounded["dv"] > 3 * whole["dv"], (rounded, whole)
    assert rounded["dbeta"] > 2 * whole["dbeta"], (rounded, whole)


@pytest.mark.parametrize("keys", ["iid", "alike", "same"])
def test_what_rounding_left_of_X_is_all_of_it(keys):
    """X as stored and what is found again are X, for one key repeated too: one step of refinement, tried for it, is off by 1e-4 there."""
    T = 64
    _, k, v, beta, *_ = inputs(1, T, 1, 1, 64, 64, torch.float16, beta_max=1.99, keys=keys)
    k = (0.997 * k.float()).half()
    call = chunk_call.Call(k, v, beta, None, None)
    X, b, *_ = chunk_call.saved(k, v, None, None, "lean")
    chunk._transform(call, k, beta, None, b, None, X, None)
    X.copy_(X.bfloat16())
    low = chunk._rest_of_X(call, k, beta, b, None, X, torch.empty_like(v))[0, :, 0].double().cpu()
    X = X[0].double().cpu()
    full = torch.zeros(64, 64).double()
    full[:32, :32], full[32:] = X[:1024].view(32, 32) + low[:32, :32], X[1024:].view(32, 64) + low[32:]
    kd, bd = k[0, :, 0].double().cpu(), beta[0, :, 0].double().cpu()
    L = (kd @ kd.T).tril(-1)
    exact = torch.linalg.solve(torch.eye(64).double() + L * bd, L)
    assert low.tril(-1).abs().max() > 1e-3
    assert (full - exact).abs().max() < 3e-5


@pytest.mark.parametrize("options", [dict(), dict(gated=True, packed=True, states=True, memory="lean")], ids=str)
def test_warmup_runs_what_it_is_told_to_compile(options):
    from deltanet.kernels import triton as family

    family.warmup(heads=1, key_dim=64, value_dim=64, tokens=65, dtype=torch.float32, device=DEVICE, **options)


def test_every_row_is_there():
    tables = (launch.CHUNK_TRANSFORM, launch.CHUNK_FORWARD, launch.CHUNK_STATE_GRADIENT, launch.CHUNK_GRADIENTS, launch.CHUNK_GRADIENTS_GATED)
    for table in tables:
        for gpu in (launch.HOPPER, launch.AMPERE):
            assert set(table[gpu]) == {(size, width) for size in (2, 4) for width in (64, 128, 256)}


def test_which_rows_a_gpu_takes():
    assert [launch.gpu_class(major) for major in (8, 9, 10, 12)] == [launch.AMPERE, launch.HOPPER, launch.HOPPER, launch.AMPERE]


def test_a_kind_of_call_is_worked_out_once():
    """On a GPU: another batch of boundaries is the same kind, with a place of its own."""

    class Elsewhere:
        is_cuda = True

        def __init__(self, x):
            self.x = x

        def __getattr__(self, name):
            return getattr(self.x, name)

    q, v, beta = torch.zeros(1, 130, 1, 64), torch.zeros(1, 130, 2, 32), torch.zeros(1, 130, 2)
    plain, again, gated = (chunk_call.Call.of(Elsewhere(q), v, beta, g, None) for g in (None, None, beta))
    assert plain is again
    assert plain.key != gated.key
    bounds = [torch.tensor([0, cut, 130]) for cut in (1, 70)]
    first, second = (chunk_call.Call.of(Elsewhere(q), v, beta, None, cu_seqlens) for cu_seqlens in bounds)
    assert [first.place[0] is bounds[0], second.place[0] is bounds[1]] == [True, True]
    assert first.key == second.key != plain.key
    assert vars(first) | {"place": 0} == vars(chunk_call.Call(q, v, beta, None, bounds[0])) | {"place": 0}


# ---- on a GPU: every shipped row, in every dtype, over what the kernels branch on

ROWS = [(dtype, D) for dtype in (torch.bfloat16, torch.float16, torch.float32) for D in (64, 128, 256)]
BRANCHES = {
    "plain": dict(shape=(2, 1000)),
    "gated": dict(shape=(1, 321), gate=0.1, states=True),
    "packed": dict(shape=(1, 259), lengths=[0, 15, 63, 64, 0, 65, 1, 51], states=True, group=2, save="lean"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_shipped_configurations(row, branch):
    (dtype, D), case = row, dict(BRANCHES[branch])
    group, (B, T) = case.pop("group", 1), case.pop("shape")
    print(check(B, T, 2, 2 * group, D, D, dtype=dtype, **case))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 4096])
def test_lengths(T):
    check(1, T, 2, 2, 128, 128, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", [1e-4, 1.0, 20.0])
def test_decays(gate):
    check(1, 200, 2, 2, 128, 128, dtype=torch.bfloat16, gate=gate, limit=1.2e-2)


@pytest.mark.gpu
def test_alike_keys():
    check(1, 500, 2, 2, 128, 128, dtype=torch.bfloat16, keys="alike", beta_max=1.0, limit=1.2e-2)
    check(1, 500, 2, 2, 128, 128, dtype=torch.bfloat16, keys="alike", beta_max=2.0, limit=4e-2)
    check(1, 500, 2, 2, 128, 128, dtype=torch.float32, keys="same", beta_max=2.0, limit=1e-3)


@pytest.mark.gpu
def test_segments_on_the_gpu():
    check(1, 4500, 2, 2, 128, 128, dtype=torch.bfloat16, states=True)
    check(1, 4500, 2, 2, 128, 128, dtype=torch.bfloat16)
    check(1, 4500, 2, 2, 64, 64, dtype=torch.bfloat16, states=True, lengths=[2100, 0, 2300, 100], gate=0.01)
    check(1, 4500, 1, 1, 256, 256, dtype=torch.bfloat16, states=True)


@pytest.mark.gpu
def test_the_same_bits():
    given = inputs(2, 1000, 8, 8, 128, 128, torch.bfloat16)
    first = kernels(*given, 0.1, None)
    for _ in range(200):
        for name, x in kernels(*given, 0.1, None).items():
            assert x is first[name] is None or torch.equal(x, first[name]), name


@pytest.mark.gpu
def test_seventy_thousand_sequences():
    """One token each: o = scale (q . k) beta v."""
    n = 70_000
    q, k, v, beta, do, *_ = inputs(1, n, 2, 2, 64, 64, torch.bfloat16)
    cu = torch.arange(n + 1, device=DEVICE, dtype=torch.int32)
    ours = kernels(q, k, v, beta, do, None, None, None, 0.5, cu)
    similarity = 0.5 * (q.double() * k.double()).sum(-1) * beta.double()
    assert error(ours["o"], similarity[..., None] * v.double()) < 7e-3
    assert error(ours["dv"], similarity[..., None] * do.double()) < 7e-3


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2.3e9 elements in one sequence of 70,000 tokens: the last head alone gives what it gives among 256."""
    T, H, D = 70_000, 256, 128
    q, k = (F.normalize(torch.randn(1, T, H, D, device=DEVICE, dtype=torch.bfloat16), dim=-1) for _ in range(2))
    v, beta = torch.randn_like(q), torch.rand(1, T, H, device=DEVICE, dtype=torch.bfloat16)
    o, _, kept = chunk.chunk_forward(q, k, v, beta, None, 0.1, None, None, output_final_state=False, save="states")
    dq, dk, dv, *_ = chunk.chunk_backward(v, None, q, k, v, beta, None, 0.1, None, None, kept)
    q, k, v, beta = (x[:, :, -1:].contiguous() for x in (q, k, v, beta))
    o1, _, kept = chunk.chunk_forward(q, k, v, beta, None, 0.1, None, None, output_final_state=False, save="states")
    dq1, dk1, dv1, *_ = chunk.chunk_backward(v, None, q, k, v, beta, None, 0.1, None, None, kept)
    for many, one in ((o, o1), (dq, dq1), (dk, dk1), (dv, dv1)):
        assert error(many[:, :, -1:], one.double()) < 1e-2  # not equal: one head runs in segments

"""The public operator: gradients, tracing, laws of sequences, and everything that it refuses at the door."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from support import make_inputs, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from deltanet.ops import (
    BackendError,
    check_values,
    chunk_delta_rule,
    decode_step,
    delta_rule,
    explain,
    recurrent_delta_rule,
    warmup,
)
from deltanet.ops import autograd as operator
from deltanet.reference import recurrent

RULES = [chunk_delta_rule, recurrent_delta_rule]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory", ["states", "lean"])
@pytest.mark.parametrize("lengths", [None, [3, 0, 1, 2]])
def test_gradcheck(rule, memory: str, lengths: list[int] | None) -> None:
    x = make_inputs(B=2, T=4, H=1, HV=2, K=3, V=2, gate=0.3, state=True, lengths=lengths)
    leaves = x.leaves()

    def call(*tensors):
        return rule(
            **dict(zip(leaves, tensors, strict=True)), cu_seqlens=x.cu_seqlens, output_final_state=True, memory=memory
        )

    assert torch.autograd.gradcheck(call, list(leaves.values()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("needed", ["q", "k", "v", "beta", "g", "initial_state"])
def test_gradients_reach_one_input_alone(rule, needed: str) -> None:
    x = make_inputs(T=70, gate=0.1, state=True)
    leaves = x.leaves()
    full, _ = rule(**leaves)
    wanted = torch.autograd.grad(full, leaves[needed], x.do)[0]
    alone = {n: t.detach().requires_grad_(n == needed) for n, t in leaves.items()}
    got = torch.autograd.grad(rule(**alone)[0], alone[needed], x.do)[0]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("algorithm", ["chunk", "recurrent"])
@pytest.mark.parametrize("gate", [None, 0.2])
@pytest.mark.parametrize("lengths", [None, [3, 0, 61, 6]])
@pytest.mark.parametrize("save", ["states", "lean"])
def test_opcheck(algorithm: str, gate: float | None, lengths: list[int] | None, save: str) -> None:
    x = make_inputs(B=2, T=70, K=8, V=6, gate=gate, state=lengths is not None, lengths=lengths, dtype=torch.float32)
    leaves = x.leaves()
    args = [leaves.get(n) for n in ("q", "k", "v", "beta", "g")]
    args += [0.5, leaves.get("initial_state"), x.cu_seqlens, True, save, algorithm, "reference"]
    torch.library.opcheck(operator._delta_rule, args)


@pytest.mark.parametrize("rule", RULES)
def test_registered_and_eager_are_the_same_bits(rule) -> None:
    """Under a dispatch mode the call goes through the registered operator, and the mode sees it as one."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = make_inputs(gate=0.1, state=True)
    leaves = x.leaves()
    results = []
    for mode in (nullcontext(), Watch()):
        with mode:
            o, state = rule(**leaves, output_final_state=True)
            grads = torch.autograd.grad([o, state], list(leaves.values()), [x.do, x.dfinal_state])
        results.append([o, state, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert seen.count("deltanet.delta_rule.default") == 1
    assert seen.count("deltanet.delta_rule_backward.default") == 1


def test_compiles_whole() -> None:
    x = make_inputs(gate=0.2, state=True, dtype=torch.float32)
    leaves = x.leaves()

    def call(**tensors):
        o, state = chunk_delta_rule(**tensors, output_final_state=True)
        return o.square().sum() + state.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted = torch.autograd.grad(call(**leaves), list(leaves.values()))
    got = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for name, a, b in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("split", [0, 1, 63, 64, 65, 129])
def test_split_anywhere(rule, split: int) -> None:
    x = make_inputs(T=130, gate=0.1, state=True)
    whole, final = rule(x.q, x.k, x.v, x.beta, x.g, initial_state=x.initial_state, output_final_state=True)
    state, parts = x.initial_state, []
    for part in (slice(0, split), slice(split, None)):
        o, state = rule(
            x.q[:, part], x.k[:, part], x.v[:, part], x.beta[:, part], x.g[:, part],
            initial_state=state, output_final_state=True,
        )  # fmt: skip
        parts.append(o)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-13
    assert relative_error(state, final) < 1e-13


@pytest.mark.parametrize("rule", RULES)
def test_packed_is_separate(rule) -> None:
    lengths = [5, 0, 1, 64, 70]
    x = make_inputs(gate=0.1, state=True, lengths=lengths)
    o, final = rule(
        x.q, x.k, x.v, x.beta, x.g, initial_state=x.initial_state, output_final_state=True, cu_seqlens=x.cu_seqlens
    )
    start = 0
    for n, length in enumerate(lengths):
        part = slice(start, start + length)
        alone, state = rule(
            x.q[:, part], x.k[:, part], x.v[:, part], x.beta[:, part], x.g[:, part],
            initial_state=x.initial_state[n : n + 1], output_final_state=True,
        )  # fmt: skip
        assert relative_error(o[:, part], alone) < 1e-13
        assert relative_error(final[n : n + 1], state) < 1e-13
        start += length


@pytest.mark.parametrize("rule", RULES)
def test_any_strides(rule) -> None:
    x = make_inputs(HV=4)
    expected, _ = rule(x.q, x.k, x.v, x.beta)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v, x.beta)]
    assert not strided[0].is_contiguous()
    got, _ = rule(*strided)
    assert torch.equal(got, expected)
    assert got.is_contiguous()


def test_same_bits_twice() -> None:
    x = make_inputs(T=200, dtype=torch.float32)
    runs = [chunk_delta_rule(x.q, x.k, x.v, x.beta)[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_scale_defaults_to_the_root_of_key_dim() -> None:
    x = make_inputs(K=9)
    assert torch.equal(
        chunk_delta_rule(x.q, x.k, x.v, x.beta)[0], chunk_delta_rule(x.q, x.k, x.v, x.beta, scale=1 / 3)[0]
    )


def test_initial_state_is_not_touched() -> None:
    x = make_inputs(state=True)
    before = x.initial_state.clone()
    for rule in RULES:
        rule(x.q, x.k, x.v, x.beta, initial_state=x.initial_state, output_final_state=True)
    assert torch.equal(x.initial_state, before)


BAD = [
    (dict(q=lambda x: x.q[0]), ValueError, "q must be [B, T, H, K], got 3 dimensions"),
    (dict(v=lambda x: x.v[0]), ValueError, "v must be [B, T, HV, V], got 3 dimensions"),
    (dict(k=lambda x: x.k[:, :5]), ValueError, "k must be [B, T, H, K] = [2, 70, 2, 16], got [2, 5, 2, 16]"),
    (dict(v=lambda x: x.v[:, :5]), ValueError, "v must begin with [B, T] = [2, 70]"),
    (dict(v=lambda x: x.v[:, :, :1]), ValueError, "v must have a multiple of q's 2 heads, got 1"),
    (dict(beta=lambda x: x.beta[..., :1]), ValueError, "beta must be [B, T, HV] = [2, 70, 2], got [2, 70, 1]"),
    (dict(beta=lambda x: x.beta.long()), TypeError, "beta must be a floating dtype"),
    (dict(g=lambda x: x.beta[0]), ValueError, "g must be [B, T, HV]"),
    (dict(k=lambda x: x.k.float()), TypeError, "k must have q's dtype torch.float64, got torch.float32"),
    (dict(q=lambda x: x.q.long()), TypeError, "q must be one of"),
    (dict(v=lambda x: x.v.to("meta")), ValueError, "v must be on q's device cpu, got meta"),
    (dict(initial_state=lambda x: x.dfinal_state[0]), ValueError, "initial_state must be [N, HV, K, V]"),
    (dict(initial_state=lambda x: x.dfinal_state.float()), TypeError, "initial_state must be torch.float64"),
    (dict(cu_seqlens=lambda x: torch.tensor([0, 70])), ValueError, "with cu_seqlens B must be 1, got 2"),
    (dict(cu_seqlens=lambda x: torch.tensor([0.0, 70.0])), TypeError, "cu_seqlens must be int32 or int64"),
    (dict(cu_seqlens=lambda x: torch.tensor([0])), ValueError, "cu_seqlens must be [N + 1]"),
    (dict(memory=lambda x: "leen"), ValueError, "Did you mean 'lean'?"),
    (dict(backend=lambda x: "tritn"), ValueError, "Did you mean 'triton'?"),
    (dict(backend=lambda x: "triton"), BackendError, "the triton backend cannot run this call"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
@pytest.mark.parametrize("rule", RULES)
def test_refused_at_the_door(rule, change: dict, error: type, message: str) -> None:
    x = make_inputs()
    args = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta} | {n: make(x) for n, make in change.items()}
    with pytest.raises(error, match=re.escape(message)):
        rule(**args)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 5, 3, 8], "cu_seqlens must not go down, got 5 then 3 at position 1"),
        ([0, 5], "cu_seqlens must run from 0 to T = 8, got 0 to 5"),
        ([1, 8], "cu_seqlens must run from 0 to T = 8, got 1 to 8"),
    ],
)
def test_boundaries_are_checked(bounds: list[int], message: str) -> None:
    x = make_inputs(B=1, T=8)
    with pytest.raises(ValueError, match=re.escape(message)):
        chunk_delta_rule(x.q, x.k, x.v, x.beta, cu_seqlens=torch.tensor(bounds))


def test_a_kind_of_call_is_checked_once_and_a_wrong_one_every_time() -> None:
    x = make_inputs(B=3, T=7, H=1, K=5, V=6)
    checks = delta_rule._check_forms
    chunk_delta_rule(x.q, x.k, x.v, x.beta)
    before = checks.cache_info()
    chunk_delta_rule(x.q, x.k, x.v, x.beta)
    assert checks.cache_info()[:2] == (before.hits + 1, before.misses)
    for wrong in (x.beta[:, :, :0], x.beta[:2], x.beta.long(), x.beta[:2]):  # whatever was right before
        with pytest.raises((ValueError, TypeError), match="beta must be"):
            chunk_delta_rule(x.q, x.k, x.v, wrong)


def test_boundaries_are_checked_again_when_they_change() -> None:
    x = make_inputs(B=1, T=8)
    bounds = torch.tensor([0, 5, 8])
    chunk_delta_rule(x.q, x.k, x.v, x.beta, cu_seqlens=bounds)
    bounds[1] = 9
    with pytest.raises(ValueError, match="must not go down"):
        chunk_delta_rule(x.q, x.k, x.v, x.beta, cu_seqlens=bounds)


def test_explain_says_who_and_why() -> None:
    x = make_inputs()
    found = explain(x.q, x.k, x.v, x.beta)
    assert found.chosen == "reference"
    assert found.refusals["reference"] is None
    assert "cpu" in found.refusals["triton"]
    assert "reference" in str(found)


def test_warmup_where_nothing_is_compiled() -> None:
    warmup(heads=2, key_dim=64, device="cpu")
    with pytest.raises(BackendError, match="the triton backend cannot run this call"):
        warmup(heads=2, key_dim=64, device="cpu", backend="triton")


def test_auto_never_takes_the_interpreter() -> None:
    """With TRITON_INTERPRET set the kernels can run on a CPU, for debugging: by name, never by themselves."""
    code = (
        "import torch, deltanet; x = torch.nn.functional.normalize(torch.randn(1, 3, 1, 16), dim=-1);"
        "found = deltanet.explain(x, x, x, torch.rand(1, 3, 1)); print(found.chosen, found.refusals['triton'])"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    code = "import triton;" + code
    pytest.importorskip("triton")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "reference None"


def test_check_values_names_the_tensor() -> None:
    x = make_inputs(gate=0.1)
    check_values(x.q, x.k, x.beta, x.g)
    with pytest.raises(ValueError, match="keys must be L2-normalised, got a norm of 2"):
        check_values(x.q, 2 * x.k, x.beta)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 2\]"):
        check_values(x.q, x.k, x.beta + 1)
    with pytest.raises(ValueError, match="g must be a log decay"):
        check_values(x.q, x.k, x.beta, -x.g)
    with pytest.raises(ValueError, match="q must be finite, got 1 values"):
        x.q[0, 0, 0, 0] = torch.nan
        check_values(x.q, x.k, x.beta)


def test_unnormalised_keys_diverge_as_documented() -> None:
    """Why `check_values` exists: it is the rule that blows up, not its implementation."""
    x = make_inputs(T=70, beta=1.0)
    _, state = recurrent.delta_rule(x.q, 3 * x.k, x.v, x.beta)
    assert state.abs().max() > 1e6


# ---- one token, in place


@pytest.mark.parametrize("gate", [None, 0.5])
def test_decode_step_is_one_token_of_the_rule(gate: float | None) -> None:
    x = make_inputs(B=3, T=1, H=1, HV=2, gate=gate, state=True)
    wanted, final = recurrent_delta_rule(
        x.q, x.k, x.v, x.beta, x.g, 0.3, initial_state=x.initial_state, output_final_state=True
    )
    state = x.initial_state.clone()
    o = decode_step(x.q, x.k, x.v, x.beta, x.g, 0.3, state=state)
    assert torch.equal(o, wanted)
    assert torch.equal(state, final)


def test_decode_step_writes_into_a_pool_and_nowhere_else() -> None:
    x = make_inputs(B=2, T=1, state=True)
    pool = torch.full((2, 5, *x.initial_state.shape[2:]), 7.0, dtype=torch.float64)
    pool[:, 1:3] = x.initial_state
    _, final = recurrent_delta_rule(
        x.q, x.k, x.v, x.beta, initial_state=x.initial_state, output_final_state=True
    )
    decode_step(x.q, x.k, x.v, x.beta, state=pool[:, 1:3])
    assert torch.equal(pool[:, 1:3], final)
    assert (pool[:, [0, 3, 4]] == 7).all()


def test_decode_step_compiles_whole_and_is_registered_right() -> None:
    x = make_inputs(B=2, T=1, state=True, dtype=torch.float32)
    states = [x.initial_state.clone() for _ in range(2)]
    wanted = decode_step(x.q, x.k, x.v, x.beta, state=states[0])
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.q, x.k, x.v, x.beta, state=states[1]), wanted)
    assert torch.equal(*states)
    args = (x.q, x.k, x.v, x.beta, None, 0.3, states[0], "reference")
    torch.library.opcheck(operator._decode_step, args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(q=lambda x: x.q.expand(2, 3, 2, 16)), ValueError, "k must be [B, T, H, K] = [2, 3, 2, 16]"),
        (dict(state=lambda x: x.initial_state.mT.contiguous().mT), ValueError, "contiguous [K, V] matrices"),
        (dict(state=lambda x: x.initial_state.float()), TypeError, "state must be torch.float64, got torch.float32"),
        (dict(v=lambda x: x.v.requires_grad_()), ValueError, "a step in place has no gradient"),
        (dict(backend=lambda x: "tritn"), ValueError, "Did you mean 'triton'?"),
        (dict(backend=lambda x: "triton"), BackendError, "the triton backend cannot run this call"),
    ],
)
def test_decode_step_refuses(change: dict, error: type, message: str) -> None:
    x = make_inputs(T=1, state=True)
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "state": x.initial_state}
    with pytest.raises(error, match=re.escape(message)):
        decode_step(**(given | {n: make(x) for n, make in change.items()}))


def test_decode_step_takes_one_token() -> None:
    x = make_inputs(T=2, state=True)
    with pytest.raises(ValueError, match=r"T = 1, got 2: use recurrent_delta_rule"):
        decode_step(x.q, x.k, x.v, x.beta, state=x.initial_state)

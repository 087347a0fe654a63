"""The operator as torch sees it, twice over the same forward and backward:

- registered with torch.library, with shapes for tracing, so that it compiles whole and shows as one operator to whoever looks;
- as a plain autograd.Function for eager calls, because a registered operator costs 0.2 to 0.3 ms a call on the host.

The backend is chosen inside, out of the compiler's sight, and the same choice is made again for the backward.
A registered operator cannot return None: outputs that a call does not have are empty tensors there, which `run` turns back.
"""

import torch
from torch import Tensor

from deltanet.ops.backends import family_of
from deltanet.ops.segments import check_boundaries
from deltanet.reference.recurrent import work_dtype

__all__ = ["run", "step"]


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    save: str,
    algorithm: str,
    backend: str,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, q.shape[1])
    chosen = family_of(q, v, g, cu_seqlens, algorithm, backend)
    forward = chosen.chunk_forward if algorithm == "chunk" else chosen.recurrent_forward
    return forward(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state=output_final_state, save=save)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
    save: str,
    algorithm: str,
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    o, state, saved = _compute(
        q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, save, algorithm, backend
    )
    return o, q.new_empty(0) if state is None else state, saved


_delta_rule = torch.library.custom_op("deltanet::delta_rule", _forward, mutates_args=())


@_delta_rule.register_fake
def _(q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, save, algorithm, backend):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, v.shape[2], q.shape[3], v.shape[3])
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = q.new_empty(state, dtype=work_dtype(q.dtype)) if output_final_state else q.new_empty(0)
    chosen = family_of(q, v, g, cu_seqlens, algorithm, backend)
    return o, final, chosen.saved(q, v, g, cu_seqlens, algorithm=algorithm, save=save)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    backend: str,
) -> Tensor:
    return family_of(q, v, g, None, "recurrent", backend).decode_step(q, k, v, beta, g, scale, state, inplace=True)[0]


_decode_step = torch.library.custom_op("deltanet::decode_step", _step, mutates_args=("state",))


@_decode_step.register_fake
def _(q, k, v, beta, g, scale, state, backend):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _compute_gradients(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    algorithm: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    chosen = family_of(q, v, g, cu_seqlens, algorithm, backend)
    backward = chosen.chunk_backward if algorithm == "chunk" else chosen.recurrent_backward
    return backward(do, dfinal_state, q, k, v, beta, g, scale, initial_state, cu_seqlens, saved)


def _gradients(
    do: Tensor,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    algorithm: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta, dg, dstate = _compute_gradients(
        do, dfinal_state, q, k, v, beta, g, scale, initial_state, cu_seqlens, saved, algorithm, backend
    )
    empty = q.new_empty(0)
    return dq, dk, dv, dbeta, empty if dg is None else dg, empty.clone() if dstate is None else dstate


_delta_rule_backward = torch.library.custom_op("deltanet::delta_rule_backward", _gradients, mutates_args=())


@_delta_rule_backward.register_fake
def _(do, dfinal_state, q, k, v, beta, g, scale, initial_state, cu_seqlens, saved, algorithm, backend):
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(q), like(k), like(v), like(beta), like(g), like(initial_state)


def _setup_context(ctx, inputs, output):
    q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, _save, algorithm, backend = inputs
    ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, *output[2])
    ctx.scale, ctx.has_state, ctx.algorithm, ctx.backend = scale, output_final_state, algorithm, backend


def _backward(ctx, do, dfinal_state, _dsaved):
    q, k, v, beta, g, initial_state, cu_seqlens, *saved = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal_state = dfinal_state if ctx.has_state else None
    gradients = _compute_gradients if plain(do) else _delta_rule_backward
    dq, dk, dv, dbeta, dg, dstate = gradients(
        do, dfinal_state, q, k, v, beta, g, ctx.scale, initial_state, cu_seqlens, saved, ctx.algorithm, ctx.backend
    )
    dg, dstate = None if g is None else dg, None if initial_state is None else dstate
    return dq, dk, dv, dbeta, dg, None, dstate, None, None, None, None, None


_delta_rule.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0], output[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal_state):
        return _backward(ctx, do, dfinal_state, None)


# what Function.apply comes to where no transform of torch.func is active, which `plain` has seen; for those it goes through every argument
_apply = super(torch.autograd.Function, _Eager).apply


def plain(x: Tensor) -> bool:
    """Whether nobody looks on: no compiler, no tracing, no dispatch mode, no tensor subclass."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    output_final_state: bool,
    memory: str,
    algorithm: str,
    backend: str,
    eager: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run a checked call, of which `eager` says whether it is `plain`; BackendError when `backend` cannot."""
    needed = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or beta.requires_grad
        or (g is not None and g.requires_grad)
        or (initial_state is not None and initial_state.requires_grad)
    )
    save = memory if needed else "nothing"
    call = (q, k, v, beta, g, scale, initial_state, cu_seqlens, output_final_state, save, algorithm, backend)
    if not eager:
        o, state, _ = _delta_rule(*call)
        return o, state if output_final_state else None
    return _apply(*call) if needed else _compute(*call)[:2]


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    backend: str,
) -> Tensor:
    """Run a checked decode step; BackendError when `backend` cannot."""
    return (_step if plain(q) else _decode_step)(q, k, v, beta, g, scale, state, backend)

"""The chunked operator on Hopper: which kernels run, in what order.

    forward     transform -> X, beta in fp32, G;     forward -> o, final state, and for the backward E and the chunk states S
    backward    rest -> what rounding X left, where betas are above 1;     backward_kernel -> every gradient
                heads of 256: state_gradient -> dv, D;     gradients -> the others (chunk_backward_256.py)

Where sequences are cut into segments a launch and a chain over them come before `forward`, and before `backward_kernel` the gradient of the
state at their ends is found, which may cut sequences that the forward did not (chunk_backward_ends.py).
What is saved is what the portable family saves (kernels/triton/chunk_call.py), so that its backward can run behind this forward, which it
does where this family has none; the chain over segments, and the states that "lean" computes again, are borrowed from it too.
"""

from threading import local

import torch
from torch import Tensor

from deltanet.kernels.hopper import chunk_backward_256, chunk_backward_kernel
from deltanet.kernels.hopper.chunk_state import forward
from deltanet.kernels.hopper.chunk_state_256 import forward_256
from deltanet.kernels.hopper.chunk_transform import transform
from deltanet.kernels.hopper.tensor_maps import tensor_map
from deltanet.kernels.launch import LaunchConfig
from deltanet.kernels.triton import chunk as portable
from deltanet.kernels.triton import chunk_call
from deltanet.kernels.triton.compiled import launch, on_its_device, together

__all__ = ["chunk_backward", "chunk_forward"]

CHUNK = chunk_call.CHUNK
# 96 registers a thread leave room for five programs a multiprocessor, which hide each other's waits: 0.058 ms; 102, left to itself, for four
# (0.063), 80 for six, but they spill (0.064)
TRANSFORM = LaunchConfig(warps=4, registers=96)
FORWARD = LaunchConfig(warps=4, stages=2, overlaps=True)  # warps of the first partition; load stages: a third changes nothing
# Registers of a thread, 512 over the warpgroups of a multiprocessor, 24 of them the loader's. Below 192 the state warpgroups' products are
# serialised (ptxas C7512), beside 208 the auxiliary one spills.
REGISTERS = dict(STATE_REGISTERS=192, AUXILIARY_REGISTERS=104)
WIDE = 256  # heads with a kernel of their own, whose programs take 64 columns of V, and all registers that a thread can have
WIDE_REGISTERS = dict(OUTPUT_REGISTERS=232)


class _Call(chunk_call.Call):
    """Sizes of one call, and how a GPU with one program a multiprocessor is filled."""

    def __init__(self, *tensors: Tensor | None):
        super().__init__(*tensors)
        # half of V a program where that is what it takes to fill the GPU
        halves = self.N * self.HV * -(-self.V // 64)
        places = chunk_call.multiprocessors(tensors[0].device)
        self.columns = 64 if self.K == WIDE or (halves <= places and not self.segment) else min(self.V, 128)


class _Inference(_Call):
    """A call without a backward, whose first segments the first of two launches makes: in the second there is a place for one segment more. A
    backward has one launch for all of them, in which it would be a second round.
    """

    def __init__(self, *tensors: Tensor | None):
        super().__init__(*tensors)
        if self.segment:
            cuts = chunk_call.multiprocessors(tensors[0].device) // (self.N * self.HV) + 1
            self.segment = max(chunk_call.SHORTEST_SEGMENT, -(-self.T // (cuts * CHUNK)) * CHUNK)
            self.segments = self.parts(self.segment)


@on_its_device
def chunk_forward(
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
    save: str,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """o `[B, T, HV, V]`, the final states or None, and what the backward needs (docs/conventions.md)."""
    _bind_context(q.device)
    q, k, v, beta, g, initial_state = (chunk_call.plain(x) for x in (q, k, v, beta, g, initial_state))
    # Where sequences are cut, what each segment does to a state is found first. That launch leaves room for the outputs of first segments, whose
    # start is known; but not where it is short itself, since gates forget, nor of packed sequences, which may have no other segment. With an
    # initial state its products would be serialised; heads of 256 have none.
    first = initial_state is None and g is None and cu_seqlens is None and q.shape[-1] != WIDE
    call = (_Inference if first and save == "nothing" else _Call).of(q, v, beta, g, cu_seqlens)
    _compile_once(call, q, k, v, beta, g, initial_state, cu_seqlens, output_final_state, save)
    o = torch.empty_like(v)
    final = q.new_empty(call.states, dtype=torch.float32) if output_final_state else None
    kept, (X, b, G, M, E, S) = call.memory(q, v, g, save)
    if call.tokens == 0:
        if final is not None:
            final.zero_() if initial_state is None else final.copy_(initial_state)
        return o, final, kept
    X_low = torch.empty_like(X)  # what rounding left of X counts in both dtypes (chunk_call.ROUNDING_COUNTS)
    _transform(call, k, beta, g, b, G, X, X_low)
    inputs = (q, k, v, b, G, X, X_low)
    if call.segment:
        N = q.new_empty((call.parts(call.segment), *call.states[1:]), dtype=torch.float32)
        # of what the first segments do to a state, and the last, in the chain forward and the one backward
        used = int(initial_state is not None), int(final is not None and save != "nothing")
        outputs = (o, E, S) if first else (None, None, None)
        _forward(call, *inputs, None, *outputs, N, scale, final_of=1, transition=M, used=used)
        starts = portable.chain_segments(call, M, N, initial_state, backwards=False)
        _forward(call, *inputs, starts, o, E, S, final, scale, final_of=0 if final is None else 2, first_part=int(first))
    else:
        _forward(call, *inputs, initial_state, o, E, S, final, scale, final_of=0 if final is None else 1)
    return o, final, kept


@on_its_device
def chunk_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, beta, g and initial_state, each in the dtype of its tensor."""
    call = _Call.of(q, v, beta, g, cu_seqlens)
    backwards = [home.backward for home in (chunk_backward_kernel, chunk_backward_256) if home.takes(call)]
    if call.tokens == 0 or scale == 0.0 or not backwards:
        return portable.chunk_backward(do, dfinal_state, q, k, v, beta, g, scale, initial_state, cu_seqlens, saved)
    _bind_context(q.device)
    q, k, do = (chunk_call.plain(x) for x in (q, k, do))
    dfinal = None if dfinal_state is None else chunk_call.plain(dfinal_state.to(torch.float32))
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv, dbeta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, beta))
    dg = None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    dinitial = None if initial_state is None else torch.empty_like(initial_state)
    X, b, G, M, E, S = chunk_call.unpack(saved, call, g)
    if S is None:
        S = q.new_empty(call.slots)
        portable.run_forward(call, None, k, None, b, G, X, None, initial_state, None, E, S, None, scale, replay=True)
    backwards[0](
        call, do, dfinal, q, k, scale, initial_state, X, b, G, M, E, S,
        dq=dq, dk=dk, dv=dv, dbeta=dbeta, dg=dg, dinitial=dinitial,
    )  # fmt: skip
    return dq, dk, dv, dbeta, dg, dinitial


_compiled: set[tuple] = set()  # what has been compiled, forward and backward


def _compile_once(call: _Call, q, k, v, beta, g, initial_state, cu_seqlens, output_final_state: bool, save: str) -> None:
    """On the first call of a kind, compile its kernels side by side, those of the coming backward too."""
    key = (call.key, initial_state is not None, output_final_state, save, call.segment > 0, call.columns)
    if key in _compiled or torch.cuda.is_current_stream_capturing():
        return
    _compiled.add(key)

    def run() -> None:
        given = (q, k, v, beta, g, 1.0, initial_state, cu_seqlens)
        o, final, kept = chunk_forward(*given, output_final_state=output_final_state, save=save)
        if save != "nothing":
            chunk_backward(o, final, *given, kept)

    together(run)


_bound = local()  # .device: where this thread has a context


def _bind_context(device: torch.device) -> None:
    """Tensor maps are made by a call of the driver, which needs a context in its thread; one of autograd's has none before its first kernel."""
    if getattr(_bound, "device", None) != device:
        torch.zeros(1, device=device)
        _bound.device = device


def _transform(call: _Call, k, beta, g, b, G, X, X_low) -> None:
    keys = tensor_map(k, call.H * call.K, CHUNK, call.K)
    args = (keys, beta, *chunk_call.or_stand_in(beta, g), b, *chunk_call.or_stand_in(b, G), X, X_low, *_place(call, k))
    key = ("hopper transform", call.key)
    launch(transform, key, (call.parts(CHUNK) * call.HV, 1, 1), args, TRANSFORM, lambda: dict(
        H=call.H, HV=call.HV, K=call.K, PACKED=call.packed, GATED=g is not None,
    ))  # fmt: skip


def _place(call: _Call, stand_in: Tensor) -> tuple:
    return (stand_in if call.place[0] is None else call.place[0], *call.place[1:])


def _forward(
    call: _Call, q, k, v, b, G, X, X_low, initial, o, E, S, final, scale, *,
    final_of: int = 0, transition=None, used: tuple[int, int] = (1, 1), first_part: int = 0,
) -> None:  # fmt: skip
    """o, the final states, E and S where there is a place for them; with one for `transition` what each segment does to a state instead, and
    the former of each sequence's first.
    """
    K, V, HV = call.K, call.V, call.HV
    columns = V if transition is None else V + K
    programs = (call.parts(call.segment) if call.segment else call.N) * (columns // call.columns)
    keys = tensor_map(k, call.H * K, CHUNK, K)
    outputs = keys if o is None else tensor_map(o, HV * V, CHUNK, 64)
    errors = outputs if E is None else tensor_map(E, HV * V, CHUNK, 64)
    states = keys if S is None or S.numel() == 0 else tensor_map(S, K, CHUNK, min(K, 128))
    args = (
        tensor_map(q, call.H * K, CHUNK, K), keys, tensor_map(v, HV * V, CHUNK, call.columns), outputs, errors, states,
        b, *chunk_call.or_stand_in(b, G), X, X_low, *chunk_call.or_stand_in(b, initial), *chunk_call.or_stand_in(v, o, E),
        *chunk_call.or_stand_in(b, final, transition), *_place(call, k), call.segment, *used, *(() if K == WIDE else (first_part,)), scale,
    )  # fmt: skip
    flags = (initial is None, transition is None, o is None, E is None, S is None, final_of, call.segment > 0, call.columns)
    own = dict(COLUMNS=call.columns, FIRST=transition is not None and o is not None, **REGISTERS)
    kernel, own = (forward_256, WIDE_REGISTERS) if K == WIDE else (forward, own)
    launch(kernel, ("hopper forward", call.key, flags), (programs * HV, 1, 1), args, FORWARD, lambda: dict(
        H=call.H, HV=HV, K=K, V=V, STAGES=FORWARD.stages, SPLIT=call.segment > 0, PACKED=call.packed,
        GATED=G is not None, INITIAL=initial is not None,
        OUTPUT=transition is None, SAVE_E=E is not None, SAVE_S=S is not None, FINAL=final_of, **own,
    ))  # fmt: skip

"""The backward of heads of 256 on Hopper: which kernels run, in what order.

    rest -> what rounding X left, where betas are above 1
    state_gradient -> dv, D, dinitial, and sums that make dbeta;     gradients -> dq, dk, dbeta, dg

The tiles that heads of 64 and 128 keep in shared memory for one launch (chunk_backward_kernel.py) would take 500 KiB here, so D goes through
memory, as in the portable family.
"""

from torch import Tensor

from deltanet.kernels.hopper.chunk_backward_load import in_32_bits
from deltanet.kernels.hopper.chunk_gradients_256 import gradients
from deltanet.kernels.hopper.chunk_rest import rest_of_X
from deltanet.kernels.hopper.chunk_state_gradient_256 import COLUMNS, state_gradient
from deltanet.kernels.triton import chunk as portable
from deltanet.kernels.triton import chunk_call

__all__ = ["backward", "takes"]

DIM = 256


def takes(call: chunk_call.Call) -> bool:
    """Whether this backward runs a call."""
    return call.K == call.V == DIM and in_32_bits(call)


def backward(
    call: chunk_call.Call, do: Tensor, dfinal: Tensor | None, q: Tensor, k: Tensor, scale: float, initial_state: Tensor | None,
    X: Tensor, b: Tensor, G: Tensor | None, M: Tensor | None, E: Tensor, S: Tensor, *,
    dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dg: Tensor | None, dinitial: Tensor | None,
) -> None:  # fmt: skip
    """As chunk_backward_kernel.backward."""
    rest_of_X(call, k, b, G, X, dv)
    ends = dfinal
    if call.segment:
        d = b.new_empty((call.parts(call.segment), *call.states[1:]))
        state_gradient(call, q, k, do, do, b, G, X, dv, None, None, None, None, d, scale, split=True)
        ends = portable.chain_segments(call, M, d, dfinal, backwards=True)
    partial = b.new_empty(call.V // COLUMNS.value, call.HV, call.tokens)
    D = q.new_empty(call.slots)
    state_gradient(call, q, k, do, E, b, G, X, dv, ends, dv, partial, D, dinitial, scale, split=call.segment > 0)
    gradients(call, q, k, do, E, dv, b, G, S, D, initial_state, dfinal, partial, dq, dk, dbeta, dg, scale)

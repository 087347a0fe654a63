"""The public operator: the delta rule over sequences, by chunks or token by token.

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T,    o_t = scale * S_t^T q_t

Everything a caller can get wrong is refused here, before compute; see docs/conventions.md for the legend and docs/math.md for the algebra.
"""

from functools import lru_cache

import torch
from torch import Tensor

from deltanet.ops import autograd, backends
from deltanet.ops.backends import Explanation, nearest
from deltanet.reference.recurrent import work_dtype

__all__ = ["check_values", "chunk_delta_rule", "decode_step", "explain", "recurrent_delta_rule", "warmup"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORY = ("states", "lean")


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    memory: str = "states",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule, parallel over chunks of 64 tokens: the form to train and to read prompts with.

    Args:
        q, k: `[B, T, H, K]`, L2-normalised by the caller (unnormalised keys make the state diverge; `check_values` tells).
        v: `[B, T, HV, V]`, HV a multiple of H: value head h reads key head `h // (HV // H)`.
        beta: `[B, T, HV]` write strength in [0, 2].
        g: `[B, T, HV]` log decay (natural logarithm, <= 0), or None for the plain rule.
        scale: factor on the output; `K ** -0.5` by default.
        initial_state: `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs), or None for zero.
        output_final_state: whether to return the states after the last token.
        cu_seqlens: `[N + 1]` int32 or int64 boundaries of N packed sequences (then B = 1); empty sequences are legal.
        memory: "states" keeps the state of every chunk for the backward, "lean" recomputes them there.
        backend: "auto", or a family by name, which then runs or says why not.

    Returns:
        o `[B, T, HV, V]` in v's dtype, and the final states `[N, HV, K, V]` in fp32 (fp64) or None.
        Gradients reach q, k, v, beta, g and initial_state, and come back through the final states.

    Raises:
        TypeError, ValueError: a tensor of the wrong dtype, shape or device, or an unknown option.
        BackendError: no backend can run the call.

    Source: Yang et al. 2024 (arXiv 2406.06484), equations 8-11; the gated rule, arXiv 2412.06464.
    """
    return _call("chunk", q, k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, memory, backend)


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    memory: str = "states",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The delta rule token by token: the same arguments, results and gradients as `chunk_delta_rule`; the form to decode with."""
    return _call("recurrent", q, k, v, beta, g, scale, initial_state, output_final_state, cu_seqlens, memory, backend)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    *,
    state: Tensor,
    backend: str = "auto",
) -> Tensor:
    """One token of `recurrent_delta_rule` for each of B sequences, overwriting their states: what a loop in a CUDA graph needs.

    Args:
        q, k, v, beta, g, scale, backend: as there, with T = 1.
        state: `[B, HV, K, V]` in fp32 (fp64 for fp64 inputs), read and written. It may be a slice of a larger pool: the [K, V] matrices
            must be contiguous, what lies between them is not touched.

    Returns:
        o `[B, 1, HV, V]` in v's dtype. There is no gradient: an input that requires one is refused unless gradients are off.

    Raises:
        TypeError, ValueError, BackendError: as there.

    >>> with torch.no_grad():
    ...     o = decode_step(q, k, v, beta, state=state)      # state is now the new one
    """
    _check(q, k, v, beta, g, state, None, "state")
    _check_backend(backend)
    if q.shape[1] != 1:
        raise ValueError(f"a step takes one token of each sequence, T = 1, got {q.shape[1]}: use recurrent_delta_rule")
    if (state.stride(3), state.stride(2)) != (1, state.shape[3]):
        raise ValueError(
            f"a state updated in place must have contiguous [K, V] matrices, got strides {state.stride()}: pass state.contiguous()"
        )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, beta, g, state)):
        raise ValueError(
            "a step in place has no gradient, got an input that requires one: call it under torch.no_grad(), or use recurrent_delta_rule"
        )
    return autograd.step(q, k, v, beta, g, q.shape[-1] ** -0.5 if scale is None else float(scale), state, backend)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    algorithm: str = "chunk",
) -> Explanation:
    """Which backends can run this call, which one `auto` takes, and why the others refuse. Print it."""
    _check(q, k, v, beta, g, None, cu_seqlens)
    return backends.explain(backends.describe(q, v, g, cu_seqlens, algorithm))


def warmup(
    *,
    heads: int,
    key_dim: int,
    value_dim: int | None = None,
    value_heads: int | None = None,
    batch: int = 1,
    tokens: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = False,
    packed: bool = False,
    states: bool = False,
    memory: str = "states",
    algorithm: str = "chunk",
    device: str | torch.device = "cuda",
    backend: str = "auto",
) -> None:
    """Compile ahead what the first call of this kind, forward and backward, would compile; needed before a CUDA graph is captured.

    Args:
        heads, value_heads, key_dim, value_dim, dtype, gated, packed: as the calls will have them (`packed`: with cu_seqlens).
        batch, tokens: matter only where few heads make long sequences run in segments; give the largest.
        states: whether an initial state is given and the final one asked for.

    Raises BackendError when no backend can run such calls. The reference compiles nothing.
    """
    value_dim, value_heads = value_dim or key_dim, value_heads or heads
    q = torch.empty(1, 1, heads, key_dim, dtype=dtype, device=device)
    v = torch.empty(1, 1, value_heads, value_dim, dtype=dtype, device=device)
    name = backends.choose(backends.describe(q, v, v[..., 0] if gated else None, None, algorithm), backend)
    if name != "reference":
        backends.family(name).warmup(
            heads=heads, key_dim=key_dim, value_dim=value_dim, value_heads=value_heads, batch=batch, tokens=tokens,
            dtype=dtype, gated=gated, packed=packed, states=states, memory=memory, algorithm=algorithm, device=device,
        )  # fmt: skip


def check_values(q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None = None, *, tolerance: float = 1e-2) -> None:
    """Opt-in check of what shapes cannot show: |k| <= 1, beta in [0, 2], g <= 0, all finite. Waits for the device.

    Outside these bounds the recurrence itself diverges. Raises ValueError that names the tensor and its worst value.
    """
    for name, x in {"q": q, "k": k, "beta": beta, "g": g}.items():
        if x is not None and not torch.isfinite(x).all():
            raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} values that are not")
    norm = k.float().norm(dim=-1).max().item() if k.numel() else 0.0
    if norm > 1 + tolerance:
        raise ValueError(f"keys must be L2-normalised, got a norm of {norm:.4g}: pass F.normalize(k, dim=-1)")
    low, high = (beta.min().item(), beta.max().item()) if beta.numel() else (0.0, 0.0)
    if low < 0 or high > 2:
        raise ValueError(f"beta must lie in [0, 2], got [{low:.4g}, {high:.4g}]: pass a sigmoid, or twice a sigmoid")
    if g is not None and g.numel() and g.max().item() > 0:
        raise ValueError(f"g must be a log decay <= 0, got {g.max().item():.4g}")


def _call(
    algorithm: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    memory: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    eager = _check(q, k, v, beta, g, initial_state, cu_seqlens)
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}{nearest(memory, MEMORY)}")
    _check_backend(backend)
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    return autograd.run(
        q,
        k,
        v,
        beta,
        g,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        initial_state,
        cu_seqlens,
        output_final_state=output_final_state,
        memory=memory,
        algorithm=algorithm,
        backend=backend,
        eager=eager,
    )


def _check_backend(backend: str) -> None:
    if backend not in backends.NAMES:
        raise ValueError(
            f"backend must be one of {', '.join(backends.NAMES)}, got {backend!r}{nearest(backend, backends.NAMES)}"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_name: str = "initial_state",
) -> bool:
    """Everything that shapes, dtypes and devices can tell, in the order in which a caller would fix it; each kind of call once.

    Returns whether the call is plain (autograd.py).
    """
    eager = autograd.plain(q)
    # sizes that are symbols have no hash, and a compiler does not see what is remembered
    check = _check_forms if eager else _check_forms.__wrapped__
    check(_form(q), _form(k), _form(v), _form(beta), _form(g), _form(initial_state), _form(cu_seqlens), state_name)
    return eager


Form = tuple[torch.Size, torch.dtype, torch.device]


def _form(x: Tensor | None) -> Form | None:
    return None if x is None else (x.shape, x.dtype, x.device)


@lru_cache(1024)
def _check_forms(
    q: Form, k: Form, v: Form, beta: Form, g: Form | None, initial_state: Form | None, cu_seqlens: Form | None, state_name: str
) -> None:
    shape, dtype, device = q
    if len(shape) != 4:
        raise ValueError(f"q must be [B, T, H, K], got {len(shape)} dimensions: {list(shape)}")
    if len(v[0]) != 4:
        raise ValueError(f"v must be [B, T, HV, V], got {len(v[0])} dimensions: {list(v[0])}")
    B, T, H, K = shape
    HV, V = v[0][2:]
    _expect("k", k, (B, T, H, K), "B, T, H, K", "the shape of q")
    if v[0][:2] != (B, T):
        raise ValueError(f"v must begin with [B, T] = [{B}, {T}] as q does, got {list(v[0])}")
    if H == 0 or K == 0 or V == 0 or HV == 0:
        raise ValueError(f"heads and head dimensions must not be 0, got q {list(shape)} and v {list(v[0])}")
    if HV % H:
        raise ValueError(f"v must have a multiple of q's {H} heads, got {HV}: each key head serves HV // H value heads")
    _expect("beta", beta, (B, T, HV), "B, T, HV", "one write strength per value head")
    if g is not None:
        _expect("g", g, (B, T, HV), "B, T, HV", "one log decay per value head")
    N = B
    if cu_seqlens is not None:
        bounds, kind, _ = cu_seqlens
        if kind not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {kind}")
        if len(bounds) != 1 or bounds[0] < 2:
            raise ValueError(f"cu_seqlens must be [N + 1] with N >= 1, got shape {list(bounds)}")
        if B != 1:
            raise ValueError(
                f"packed sequences lie in one row: with cu_seqlens B must be 1, got {B}; pass q.view(1, B * T, H, K)"
            )
        N = bounds[0] - 1
    if initial_state is not None:
        _expect(state_name, initial_state, (N, HV, K, V), "N, HV, K, V", "one state per sequence and value head")
        if initial_state[1] != work_dtype(dtype):
            raise TypeError(
                f"{state_name} must be {work_dtype(dtype)}, got {initial_state[1]}: states are kept in fp32 (fp64 for fp64 inputs)"
            )
    if dtype not in DTYPES:
        raise TypeError(f"q must be one of {', '.join(str(d) for d in DTYPES)}, got {dtype}")
    for name, x in (("k", k), ("v", v)):
        if x[1] != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, got {x[1]}")
    for name, strength in (("beta", beta), ("g", g)):
        if strength is not None and not strength[1].is_floating_point:
            raise TypeError(f"{name} must be a floating dtype, got {strength[1]}")
    others = {"k": k, "v": v, "beta": beta, "g": g, state_name: initial_state, "cu_seqlens": cu_seqlens}
    for name, other in others.items():
        if other is not None and other[2] != device:
            raise ValueError(f"{name} must be on q's device {device}, got {other[2]}")


def _expect(name: str, x: Form, shape: tuple[int, ...], dims: str, why: str) -> None:
    if tuple(x[0]) != shape:
        raise ValueError(f"{name} must be [{dims}] = {list(shape)}, got {list(x[0])}: {why}")

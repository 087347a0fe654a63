"""What several tests need: inputs of the operator, and the one way errors are measured."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Inputs", "make_inputs", "relative_error"]


@dataclass
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    do: Tensor
    dfinal_state: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of everything that gradients reach."""
        names = ("q", "k", "v", "beta", "g", "initial_state")
        return {n: x.detach().clone().requires_grad_() for n in names if (x := getattr(self, n)) is not None}


def make_inputs(
    B: int = 2,
    T: int = 70,
    H: int = 2,
    HV: int | None = None,
    K: int = 16,
    V: int = 8,
    *,
    gate: float | None = None,
    keys: str = "iid",
    beta: float | tuple[float, float] = (0.0, 2.0),
    state: bool = False,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Inputs in `dtype` (states in fp32, or fp64 with it). `gate` is the strongest decay a token; `lengths` packs sequences."""
    gen = torch.Generator(device).manual_seed(seed)
    HV = H if HV is None else HV
    if lengths is not None:
        B, T = 1, sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, device=device, dtype=torch.float64)

    q, k = normal(B, T, H, K), normal(B, T, H, K)
    if keys == "relu":
        q, k = q.relu(), k.relu()
    elif keys == "correlated":
        k = 3 * normal(B, 1, H, K) + k
    elif keys == "identical":
        k = normal(B, 1, H, K).expand(B, T, H, K)
    strength = uniform(B, T, HV)
    low, high = beta if isinstance(beta, tuple) else (beta, beta)
    N = B if lengths is None else len(lengths)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        q=F.normalize(q, dim=-1).to(dtype),
        k=F.normalize(k, dim=-1).to(dtype),
        v=normal(B, T, HV, V).to(dtype),
        beta=(low + (high - low) * strength).to(dtype),
        g=None if gate is None else (-gate * uniform(B, T, HV)).to(dtype),
        initial_state=normal(N, HV, K, V).to(work) if state else None,
        cu_seqlens=None
        if lengths is None
        else F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0)).to(torch.int32),
        do=normal(B, T, HV, V).to(dtype),
        dfinal_state=normal(N, HV, K, V).to(work),
    )


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference| in L2; |x| where the reference is zero. NaN never passes a bound."""
    assert x.shape == reference.shape, f"{tuple(x.shape)} is not {tuple(reference.shape)}"
    size = reference.double().norm().item()
    return (x.double() - reference.double()).norm().item() / (size or 1.0)

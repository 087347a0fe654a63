"""The pipelines of the chunk kernels in plain PyTorch: sums in fp32, and every tensor rounded where the kernels round it.

Their error against fp64 is what the rounding costs by itself, on the inputs at hand. A kernel that is right has about that error and no more:
the budget of test_matrix.py. One value head a key head; formulas as in kernels/triton/chunk_*.py. The Hopper family differs in one place of
its backward: dg is made of q . dq and k . dk (kernels/hopper/chunk_backward_gradients.py); and at heads of 256 in one of its forward: beta
goes into P, not into E (kernels/hopper/chunk_state_256.py).
"""

import torch
from torch import Tensor

C = 64


def emulate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    lengths: list[int],
    do: Tensor,
    dfinal_state: Tensor | None,
    family: str = "triton",
) -> dict[str, Tensor]:
    """o, final state and every gradient by name. Sequences lie behind one another: q, k, v, do `[tokens, H, D]`, beta, g `[tokens, H]`."""
    parts: list[dict[str, Tensor]] = []
    start = 0
    for n, length in enumerate(lengths):
        token = slice(start, start + length)
        state = torch.zeros(q.shape[1], q.shape[2], v.shape[2], device=q.device) if initial_state is None else initial_state[n].float()
        dstate = torch.zeros_like(state) if dfinal_state is None else dfinal_state[n].float()
        gate = None if g is None else g[token]
        parts.append(_sequence(q[token], k[token], v[token], beta[token], gate, scale, state, do[token], dstate, family))
        start += length
    join = {name: torch.stack if name in ("final", "dstate") else torch.cat for name in parts[0]}
    return {name: join[name]([part[name] for part in parts]) for name in parts[0]}


def _solve(L: Tensor, b: Tensor) -> Tensor:
    """X of a chunk in fp32 `[H, n, n]`, from L in fp64 and beta `[H, n, 1]`; by products in fp16 where a head's betas are at most 1."""
    n = L.shape[-1]
    eye = torch.eye(n, device=L.device, dtype=torch.float64)
    exact = torch.linalg.solve_triangular(eye + L * b.double().mT, L, upper=False, unitriangular=True).float()
    L, b = torch.nn.functional.pad(L.float(), (0, C - n, 0, C - n)), torch.nn.functional.pad(b, (0, 0, 0, C - n))

    def product(x: Tensor, y: Tensor) -> Tensor:
        return x.half().float() @ y.half().float()

    def diagonal(x: Tensor, size: int) -> Tensor:
        """The blocks of that size on the diagonal `[H, C / size, size, size]`."""
        return x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    betas = b.unflatten(1, (-1, 4))
    small = diagonal(L, 4)
    N = -small * betas.mT
    first = product(N, small)
    X = small + first + product(N, first)  # [H, C / 4, 4, 4]
    for size in (4, 8, 16, 32):
        above, below = X[:, ::2], X[:, 1::2]
        betas = b.unflatten(1, (-1, 2, size))
        left = diagonal(L, 2 * size)[..., size:, :size]
        left = left - product(left, betas[:, :, 0] * above)
        left = left - product(below * betas[:, :, 1].mT, left)
        X = torch.cat([torch.cat([above, torch.zeros_like(above)], -1), torch.cat([left, below], -1)], -2)
    return torch.where(b.amax(1, keepdim=True) > 1, exact, X[:, 0, :n, :n])


def _sequence(q, k, v, beta, g, scale, S, do, dS, family) -> dict[str, Tensor]:
    dtype, rest_counts = q.dtype, q.dtype.itemsize == 2
    wide = family == "hopper" and q.shape[-1] == 256

    def r(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    Q, K, V, b, dO = (x.float().movedim(0, 1) for x in (q, k, v, beta, do))
    log_decay = torch.zeros_like(b) if g is None else g.float().movedim(0, 1)
    T = Q.shape[1]
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("o", "dq", "dk", "dv", "dbeta", "dg")}
    saved = []
    for c in range(0, T, C):
        t = slice(c, c + C)
        Qc, Kc, Vc, bc, G = Q[:, t], K[:, t], V[:, t], b[:, t, None], log_decay[:, t].cumsum(1)[..., None]
        decay = (G - G.mT).tril().exp().tril()
        L = (Kc.double() @ Kc.double().mT * decay.double()).tril(-1)
        X = _solve(L, bc)
        high, low = r(X), r(X - r(X))
        Sb = r(S)
        W = Vc - G.exp() * (Kc @ Sb)
        bW = r(bc * W)
        E = W - high @ bW - (low @ bW if rest_counts and (family == "triton" or bc.max() > 1) else 0)
        P = (Qc @ Kc.mT * decay).tril()
        inside = r(P * bc.mT) @ r(E) if wide else r(P) @ r(bc * E)
        outputs["o"].append(r(scale * (G.exp() * (Qc @ Sb) + inside)))
        saved.append((Sb, r(E), high, low, G, decay))
        last = G[:, -1:]
        S = S * last.exp() + Kc.mT @ r(bc * (last - G).exp() * E)
    final = S
    D = dS / scale
    for i in reversed(range(len(saved))):
        t = slice(i * C, i * C + C)
        Qc, Kc, bc, dOc = Q[:, t], K[:, t], b[:, t, None], dO[:, t]
        Sb, E, high, low, G, decay = saved[i]
        last, Db = G[:, -1:], r(D)
        onward = (last - G).exp()
        P = r((Qc @ Kc.mT * decay).tril())
        A = onward * (Kc @ Db) + P.mT @ dOc
        bA = r(bc * A)
        H = A - high.mT @ bA
        if rest_counts and bc.max() > 1:  # of all heads: a little stricter than the kernel, which asks each
            H = H - low.mT @ bA
        dW = bc * H
        dv = r(scale * dW)
        D = D * last.exp() + r(Qc * G.exp()).mT @ dOc - Kc.mT @ r(dW * G.exp())
        dP, dL, new = dOc @ E.mT * bc.mT * decay, (dv @ E.mT * bc.mT * decay).tril(-1), r(scale * bc * onward * E)
        dq = G.exp() * (dOc @ Sb.mT)
        back = G.exp() * (dv @ Sb.mT)
        through = new @ Db.mT
        dk = back - through - r((scale * dP).tril().mT) @ Qc + r(dL + dL.mT) @ Kc
        by_new = (Kc * through).sum(-1)
        dG = scale * (Qc * dq).sum(-1) - (Kc * back).sum(-1) - by_new
        if family == "triton":
            M = (scale * dP).tril(-1) * (Qc @ Kc.mT) - dL * (Kc @ Kc.mT)
            dG = dG + M.sum(-1) - M.sum(-2)
        else:
            # the same rounded numbers by rows and by columns, of dL what rounding left as well
            p, m = r((scale * dP).tril()), r(dL) + r(dL - r(dL))
            dG = dG + (Qc * (p @ Kc)).sum(-1) - (Kc * (p.mT @ Qc)).sum(-1) - (Kc * (m @ Kc)).sum(-1) + (Kc * (m.mT @ Kc)).sum(-1)
        ends = by_new.sum(-1) + scale * last[:, 0, 0].exp() * (Sb * Db).sum((-1, -2))
        found = {
            "dq": r(scale * (dq + r(dP.tril()) @ Kc)), "dk": r(-dk), "dv": dv, "dbeta": (scale * (E * H).sum(-1)).to(beta.dtype).float(),
            "dg": dG.flip(1).cumsum(1).flip(1) + ends[:, None],
        }  # fmt: skip
        for name, x in found.items():
            outputs[name].insert(0, x)
    like = {"o": V, "dq": Q, "dk": K, "dv": V, "dbeta": b, "dg": b}
    joined = {name: (torch.cat(x, 1) if x else like[name]).movedim(0, 1) for name, x in outputs.items()}
    return {**joined, "final": final, "dstate": scale * D}

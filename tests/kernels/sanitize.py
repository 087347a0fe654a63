"""Every kernel on awkward shapes, for NVIDIA's compute-sanitizer, which sees reads and writes outside of tensors (memcheck) and races (racecheck).

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1        # each tensor its own allocation, or memcheck would not know where one ends
    python tests/kernels/sanitize.py               # compiles, and must pass by itself
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/kernels/sanitize.py --cases 0 3 7

Needs `src` in PYTHONPATH, or the package installed. `--cases` picks by number; without it all run. `--backend hopper` has cases of its own.
"""

import argparse
import time
from importlib import import_module

import torch
import torch.nn.functional as F

from deltanet.kernels.triton import chunk_call, recurrent
from deltanet.kernels.triton.decode import decode_step

RAGGED = [0, 1, 69, 0, 65, 130]
# H, HV, K, V, lengths (None: two sequences of T), T, dtype, gated, states, save, segments
TRITON = [
    (1, 1, 128, 128, None, 65, "bfloat16", False, False, "states", False),
    (2, 2, 64, 64, None, 1, "bfloat16", False, True, "lean", False),
    (1, 2, 100, 40, RAGGED, 265, "bfloat16", True, True, "states", False),
    (1, 1, 128, 128, RAGGED, 265, "bfloat16", False, True, "states", False),
    (1, 1, 24, 200, None, 130, "bfloat16", True, False, "lean", False),
    (1, 1, 256, 256, None, 71, "bfloat16", False, False, "states", False),
    (1, 1, 256, 80, RAGGED, 265, "bfloat16", True, True, "lean", False),
    (1, 1, 128, 128, None, 330, "bfloat16", False, True, "states", True),
    (1, 2, 64, 64, RAGGED, 265, "bfloat16", True, True, "states", True),
    (1, 1, 100, 130, None, 67, "float32", True, True, "states", False),
    (1, 1, 64, 64, RAGGED, 265, "float16", False, True, "lean", False),
]
# up to 31 heads of all sequences together the backward is the portable one
HOPPER = [
    (1, 1, 128, 128, None, 65, "bfloat16", False, False, "states", False),
    (1, 2, 128, 128, RAGGED, 265, "bfloat16", True, True, "lean", False),
    (1, 1, 128, 128, None, 330, "bfloat16", False, False, "states", True),
    (1, 1, 128, 128, RAGGED, 265, "bfloat16", True, True, "states", True),
    (1, 1, 64, 64, RAGGED, 265, "float16", False, True, "states", False),
    (1, 1, 64, 64, None, 1, "bfloat16", True, True, "states", False),
    (1, 1, 256, 256, None, 71, "bfloat16", False, False, "states", False),
    (1, 2, 256, 256, RAGGED, 265, "bfloat16", True, True, "states", False),
    (1, 1, 256, 256, None, 330, "float16", False, True, "states", True),
    (3, 6, 128, 128, RAGGED, 265, "bfloat16", False, True, "states", False),
    (6, 6, 64, 64, RAGGED, 265, "bfloat16", True, True, "states", False),
    (6, 6, 256, 256, RAGGED, 265, "bfloat16", True, True, "states", False),
]
CASES = {"triton": TRITON, "hopper": HOPPER}


def run(backend: str, case: tuple) -> None:
    H, HV, K, V, lengths, T, dtype, gated, states, save, segments = case
    B, N = (2, 2) if lengths is None else (1, len(lengths))
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device="cuda")

    def halves(x: torch.Tensor) -> torch.Tensor:
        return x.to(getattr(torch, dtype))

    q, k = (halves(F.normalize(normal(B, T, H, K), dim=-1)) for _ in range(2))
    v, do, beta = halves(normal(B, T, HV, V)), halves(normal(B, T, HV, V)), halves(2 * normal(B, T, HV).sigmoid())
    g = -0.1 * normal(B, T, HV).abs() if gated else None
    state, dstate = (normal(N, HV, K, V), normal(N, HV, K, V)) if states else (None, None)
    cu = None if lengths is None else torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    given = (q, k, v, beta, g, 0.1, state, cu)
    chunk_call.SHORTEST_SEGMENT = 64 if segments else 1 << 30
    chunk = import_module(f"deltanet.kernels.{backend}.chunk")
    for way, module in (("chunk", chunk), ("recurrent", recurrent)):
        if way == "recurrent" and (segments or backend == "hopper"):
            continue
        forward, backward = getattr(module, f"{way}_forward"), getattr(module, f"{way}_backward")
        o, _, kept = forward(*given, output_final_state=states, save=save)
        grads = backward(do, dstate, *given, kept)
        for x in (o, *grads):
            assert x is None or torch.isfinite(x).all(), (way, case)
    if lengths is None and backend == "triton":
        first = [x[:, :1].contiguous() for x in (q, k, v, beta)]
        decode_step(*first, None if g is None else g[:, :1], 0.1, torch.zeros(B, HV, K, V, device="cuda"), inplace=True)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=CASES, default="triton")
    parser.add_argument("--cases", nargs="*", type=int, help="numbers; without it all")
    options = parser.parse_args()
    cases = CASES[options.backend]
    for number in range(len(cases)) if options.cases is None else options.cases:
        start = time.perf_counter()
        run(options.backend, cases[number])
        print(f"case {number} {cases[number]}: ran in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()

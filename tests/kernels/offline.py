"""Compile the shipped kernels without a GPU, exactly as a launch would, and read what the assembler says about them.

The operators themselves are called, on small CPU tensors, with Triton's driver replaced by one that names a GPU and launches nothing: what
is compiled is what would run, with the launch tables' tiles, warps and stages and the compiler's own specialisation of the arguments.
Then ptxas is asked again, verbosely. Run as a script it prints one JSON list; it must be a process of its own, because a process that
imported the kernels for Triton's interpreter cannot compile them.

    python tests/kernels/offline.py --capability 90 --row chunk-2-128-gated --row recurrent-2-128-gated --row hopper_backward-2-128-plain
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes one block may ask for: A100 (compute capability 8.0), H100 and H200 (9.0)
FOLDERS = ["", *filter(None, os.environ.get("TRITON_FOLDERS", "").split(os.pathsep))]  # the Triton installed, and others, each unpacked in a folder
SERIALISED = ("C7510", "C7511", "C7512", "C7513", "C7514")  # ptxas: wgmma pipeline crosses a function, registers ..., so it waits after each


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel of one row of the launch tables, on one compute capability."""

    row: str
    kernel: str
    capability: int
    warps: int
    registers: int
    stack: int  # bytes of a thread's local memory: spills, and arrays that are indexed at run time
    spill: int  # bytes stored to and loaded from local memory for want of registers
    shared: int  # bytes
    shuffles: int  # instructions that exchange registers between lanes, anywhere in the kernel
    overlaid: int  # barriers that are made where the arguments of warp-specialised roles lie
    warnings: tuple[str, ...]


def assemble(ptx: str, capability: int) -> tuple[int, int, int, tuple[str, ...]]:
    """Registers, stack bytes, spill bytes and warnings of a kernel's PTX."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [ptxas, "-v", f"--gpu-name={name}", source, "-o", Path(folder, "kernel.cubin")]
        for options in (["--regAllocOptLevel=2"], []):  # as Triton 3.7 calls it; older assemblers do not know the option
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            if done.returncode == 0:
                return read_log(done.stderr)
    raise RuntimeError(f"ptxas failed:\n{done.stderr[-2000:]}")


def read_log(log: str) -> tuple[int, int, int, tuple[str, ...]]:
    number = {what: sum(int(n) for n in re.findall(rf"(\d+) bytes {what}", log)) for what in ("stack frame", "spill stores", "spill loads")}
    registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    warnings = tuple(sorted({code for code in SERIALISED if code in log}))
    if not warnings and re.search(r"wgmma.*serializ", log):
        warnings = ("wgmma serialised",)
    return registers, number["stack frame"], number["spill stores"] + number["spill loads"], warnings


def overlaid(ptx: str) -> int:
    """Barriers made where the roles of a warp-specialised kernel find their arguments. A barrier that nobody uses is given such a place, and making
    it is not ordered with ordinary stores: it may come after the arguments were put there.
    """
    places = {int(at) for at in re.findall(r"mbarrier\.init\S* \[(?:global_smem\+)?(\d+)\]", ptx)}
    for register in re.findall(r"mbarrier\.init\S* \[(%r\d+)\]", ptx):
        places |= {int(at) for at in re.findall(rf"add\.s32\s+{register}, %r\d+, (\d+);", ptx)}
    start = ptx.find("mbarrier.init")
    arguments: set[int] = set()
    for vector, bits, at in re.findall(r"st\.shared(?:\.v(\d))?\.b(\d+)\s+\[global_smem\+(\d+)\]", ptx[start : ptx.find("barrier.sync", start)]):
        arguments |= set(range(int(at), int(at) + int(vector or 1) * int(bits) // 8))
    return sum(not arguments.isdisjoint(range(at, at + 8)) for at in places)


class Offline:
    """Stands in for Triton's driver: names a device, has no stream, loads nothing."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


class Forgetful(dict):
    """Keeps nothing, so that every launch goes through Triton's front door, where it is caught."""

    def __setitem__(self, key, value):
        pass


def launches(capability: int, call, without: str = "") -> dict[tuple, object]:
    """Every kernel that `call()` would launch but the one named `without`, compiled for `capability`: one per (name, constants, options)."""
    import triton
    from triton.runtime.jit import JITFunction

    from deltanet.kernels.launch import gpu_class
    from deltanet.kernels.triton import chunk_call, compiled

    found: dict[tuple, object] = {}
    run, compiled._kernels = JITFunction.run, Forgetful()
    chunk_call._gpu = lambda device: gpu_class(capability // 10)

    def compile_only(self, *args, grid, warmup, **kwargs):
        if self.__name__ == without:
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found[self.__name__, kernel.hash] = kernel
        return kernel

    active = getattr(triton.runtime.driver, "_active", None)
    triton.runtime.driver.set_active(Offline(capability))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active
    return found


def calls(row: str):
    """The calls that reach every kernel of a row `algorithm-itemsize-dim-rule[-light]`: forward and backward, with states, packed."""
    import torch

    from deltanet.kernels.triton import chunk, recurrent
    from deltanet.kernels.triton.decode import decode_step

    algorithm, itemsize, dim, rule = row.split("-")[:4]
    if algorithm == "hopper_forward":
        return hopper_forward_calls(int(dim), gated=rule == "gated")
    if algorithm == "hopper_backward":
        return hopper_backward_calls(int(dim), gated=rule == "gated")
    if algorithm == "cross_entropy":
        return [lambda: cross_entropy_call(int(dim))]
    if algorithm == "short_conv":
        return [lambda: short_conv_call(int(dim), packed=rule == "packed")]
    dtype = {"2": torch.bfloat16, "4": torch.float32}[itemsize]
    B, T, H, HV, D = 1, 130, 2, 4, int(dim)
    q, k = (torch.zeros(B, T, H, D, dtype=dtype) for _ in range(2))
    v = torch.zeros(B, T, HV, D, dtype=dtype)
    beta = torch.zeros(B, T, HV, dtype=dtype)
    g = torch.zeros(B, T, HV) if rule == "gated" else None
    cu_seqlens = torch.tensor([0, 70, 130], dtype=torch.int32) if rule == "gated" else None
    state = torch.zeros(2 if rule == "gated" else 1, HV, D, D)
    if algorithm == "scan":
        return [lambda: scan(dtype, int(dim))]
    if algorithm == "decode":
        return [lambda: decode_step(q[:, :1], k[:, :1], v[:, :1], beta[:, :1], None if g is None else g[:, :1], 1.0, state[:1], inplace=True)]
    home = {"chunk": chunk, "recurrent": recurrent}[algorithm]
    forward, backward = (getattr(home, f"{algorithm}_{way}") for way in ("forward", "backward"))

    def both(save: str, with_state: bool, heads: int):
        initial = state if with_state else None
        tensors = (q, k, *(None if x is None else x[:, :, :heads].contiguous() for x in (v, beta, g)))
        o, final, saved = forward(*tensors, 1.0, initial, cu_seqlens, output_final_state=with_state, save=save)
        backward(torch.zeros_like(o), final, *tensors, 1.0, initial, cu_seqlens, saved)

    fewer = H if algorithm == "chunk" else HV  # as many value heads as key heads: chunks then have D elsewhere
    return [lambda: both("states", True, HV), lambda: both("lean", False, fewer)]


def scan(dtype, S: int) -> None:
    """Mamba's scan with S numbers a channel, packed, forward and backward."""
    import torch

    from deltanet.kernels.triton import selective_scan

    u, dt, A, B = torch.zeros(1, 64, 48, dtype=dtype), torch.zeros(1, 64, 48), torch.zeros(48, S), torch.zeros(1, 64, S, dtype=dtype)
    inputs = (u, dt, A, B, B, None, torch.tensor([0, 40, 64], dtype=torch.int32))
    y, final = selective_scan.scan_forward(*inputs)
    selective_scan.scan_backward(y, final, *inputs)


def short_conv_call(unit: int, *, packed: bool):
    """The convolution of a layer's keys; packed, with a bias and a tail, and without a norm, as Mamba's."""
    import torch

    from deltanet.kernels.triton.short_conv import short_conv_backward, short_conv_forward

    D = 4 * unit
    x, weight = torch.zeros(1, 130, D, dtype=torch.bfloat16), torch.zeros(D, 1, 4)
    bias, tail, cu_seqlens, unit = (
        (torch.zeros(D), torch.zeros(2, 3, D, dtype=x.dtype), torch.tensor([0, 70, 130]), 0) if packed else (None, None, None, unit)
    )
    short_conv_forward(x, weight, bias, tail, cu_seqlens, "silu", unit, 1e-6)
    short_conv_backward(x, x, weight, bias, tail, cu_seqlens, "silu", unit, 1e-6)


def cross_entropy_call(vocabulary: int):
    import torch

    from deltanet.kernels.triton.cross_entropy import cross_entropy_backward, cross_entropy_forward

    logits, targets, lse = torch.zeros(3, vocabulary, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    cross_entropy_forward(logits, targets, lse, lse)
    cross_entropy_backward(logits, targets, lse, lse)


def hopper_forward_calls(D: int, *, gated: bool):
    """What the Hopper forward ships with: inference, training packed with states, segments, half of V a program, fp16."""
    import torch

    from deltanet.kernels.hopper import chunk
    from deltanet.kernels.triton import chunk_call

    def one(dtype: torch.dtype, keep: bool, packed: bool, segment: int, columns: int):
        q, k = (torch.zeros(1, 256, 2, D, dtype=dtype) for _ in range(2))
        v, beta = torch.zeros(1, 256, 4, D, dtype=dtype), torch.zeros(1, 256, 4, dtype=dtype)
        g = torch.zeros(1, 256, 4) if gated else None
        cu_seqlens = torch.tensor([0, 70, 256], dtype=torch.int32) if packed else None
        call = chunk._Call(q, v, beta, g, cu_seqlens)
        X, b, G, _, E, S = chunk_call.unpack(chunk_call.saved(q, v, g, cu_seqlens, "states"), call, g)
        X_low = torch.empty_like(X)
        call.segment, call.columns = segment, columns
        chunk._transform(call, k, beta, g, b, G, X, X_low)
        inputs, state = (q, k, v, b, G, X, X_low), torch.zeros(call.states)
        given, E, S = state if packed or segment else None, E if keep else None, S if keep else None
        o = torch.empty_like(v)
        chunk._forward(call, *inputs, given, o, E, S, given, 1.0, final_of=2 if segment else int(packed))
        if segment:
            outputs = (None, None, None) if packed or gated or D == chunk.WIDE else (o, E, S)
            chunk._forward(call, *inputs, None, *outputs, state, 1.0, final_of=1, transition=state)

    bf16, fp16, all_columns = torch.bfloat16, torch.float16, 64 if D == chunk.WIDE else D
    kinds = [(bf16, False, False, 0, all_columns), (bf16, True, True, 0, all_columns), (bf16, False, False, 128, all_columns)]
    kinds += [(bf16, True, False, 128, all_columns), (bf16, False, True, 128, all_columns)]
    if D == 128:
        kinds += [(bf16, True, False, 0, 64)]
    if not gated:
        kinds += [(fp16, True, False, 0, all_columns)]
    return [lambda kind=kind: one(*kind) for kind in kinds]


def hopper_backward_calls(D: int, *, gated: bool):
    """What the Hopper backward ships with: full chunks, ragged with states, packed, cut into segments, ends found on the way; bf16, and fp16."""
    import torch

    from deltanet.kernels.hopper import chunk_backward_256, chunk_backward_ends, chunk_backward_kernel
    from deltanet.kernels.triton import chunk_call

    home = chunk_backward_256 if D == chunk_backward_256.DIM else chunk_backward_kernel

    def one(dtype: torch.dtype, T: int, lengths: list[int] | None, group: int, with_state: bool, segment: int, walk: bool = False):
        H, HV = 2, 2 * group
        q, k, dq, dk = (torch.zeros(1, T, H, D, dtype=dtype) for _ in range(4))
        v, do, dv = (torch.zeros(1, T, HV, D, dtype=dtype) for _ in range(3))
        beta, dbeta = (torch.zeros(1, T, HV, dtype=dtype) for _ in range(2))
        g = torch.zeros(1, T, HV) if gated else None
        cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        call = chunk_call.Call(q, v, beta, g, cu_seqlens)
        state = torch.zeros(call.states) if with_state else None
        X, b, G, _, E, S = chunk_call.unpack(chunk_call.saved(q, v, g, cu_seqlens, "states"), call, g)
        if walk:
            chunk_backward_ends.find_ends(call, segment, q, k, do, b, G, X, dv, state, 1.0, walk=True)
            return
        call.segment = segment
        M = torch.zeros(call.parts(segment), HV, D, D) if segment else None
        home.backward(
            call, do, state, q, k, 1.0, state, X, b, G, M, E, S, dq=dq, dk=dk, dv=dv,
            dbeta=dbeta, dg=None if g is None else torch.zeros_like(g), dinitial=None if state is None else torch.zeros_like(state),
        )  # fmt: skip

    bf16, fp16 = torch.bfloat16, torch.float16
    kinds = [(bf16, 128, None, 1, False, 0), (bf16, 130, None, 1, True, 0), (bf16, 130, [70, 60], 2, True, 0), (fp16, 128, None, 1, True, 0)]
    if D == chunk_backward_256.DIM:
        kinds += [(bf16, 130, None, 1, True, 64)]
    else:
        kinds += [(bf16, 256, None, 1, False, 128), (fp16, 256, None, 1, False, 128)]
        kinds += [(bf16, 256, [70, 186], 1, True, 128, True), (bf16, 256, None, 1, False, 128, True)]
    return [lambda kind=kind: one(*kind) for kind in kinds]


def compile_row(row: str, capability: int) -> list[Compiled]:
    found: dict[tuple, object] = {}
    for call in calls(row):  # a light row leaves out transform, which compiles for longer than all others together
        found |= launches(capability, call, without="transform" if row.endswith("-light") else "")
    result = []
    for (name, _), kernel in found.items():
        registers, stack, spill, warnings = assemble(kernel.asm["ptx"], capability)
        result.append(
            Compiled(
                row=row,
                kernel=name,
                capability=capability,
                warps=kernel.metadata.num_warps,
                registers=registers,
                stack=stack,
                spill=spill,
                shared=kernel.metadata.shared,
                shuffles=kernel.asm["ptx"].count("shfl.sync"),
                overlaid=overlaid(kernel.asm["ptx"]),
                warnings=warnings,
            )
        )
    return result


def compile_rows(rows: list[str], capability: int, workers: int, triton: str = "") -> list[Compiled]:
    """In a process of its own, so that kernels already imported for the interpreter do not matter; with the Triton in folder `triton`, if given."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(x for x in (triton, *sys.path) if x)
    command = [sys.executable, __file__, "--capability", str(capability), "--workers", str(workers)]
    for row in rows:
        command += ["--row", row]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"offline compilation failed:\n{done.stderr[-4000:]}")
    return [Compiled(**{**x, "warnings": tuple(x["warnings"])}) for x in json.loads(done.stdout)]


def name(folder: str) -> str:
    """Of a Triton, for the names of tests."""
    return Path(folder).name or "installed"


def problems(compiled: Compiled, budget: int) -> list[str]:
    """What is wrong with a kernel, in words; nothing when it may ship."""
    wrong = []
    if compiled.spill > budget:
        wrong.append(f"spills {compiled.spill} bytes of registers, {budget} allowed")
    if compiled.warnings:
        wrong.append(f"wgmma is serialised ({', '.join(compiled.warnings)})")
    if compiled.overlaid:
        wrong.append(f"{compiled.overlaid} barriers that nobody uses are made over the arguments of its roles")
    if compiled.shared > SHARED_LIMIT[compiled.capability]:
        wrong.append(f"needs {compiled.shared} bytes of shared memory, {SHARED_LIMIT[compiled.capability]} exist")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers) as pool:
        results = pool.map(compile_row, options.row, [options.capability] * len(options.row))
        json.dump([asdict(x) for found in results for x in found], sys.stdout)


if __name__ == "__main__":
    main()

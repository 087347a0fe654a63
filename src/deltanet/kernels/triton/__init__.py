"""The portable GPU family: the delta rule in plain Triton, forward and backward, for compute capability 8.0 and above."""

from deltanet.kernels.launch import Problem


def refuse(problem: Problem) -> str | None:
    """Why this family cannot run `problem`, or None."""
    if problem.device != "cuda":
        return f"it runs on CUDA GPUs and the tensors are on {problem.device}"
    return "its kernels are not written yet"

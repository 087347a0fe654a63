"""The portable GPU family: the delta rule in plain Triton, forward and backward, for compute capability 8.0 and above."""

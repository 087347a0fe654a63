"""GPU kernels of the delta rule, one folder per family: triton (portable) and, on Hopper, hopper.

May import torch; triton only inside a family and only when an operator runs. `ops` is the only room that imports this one.
"""

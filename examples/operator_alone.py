"""The delta rule by itself: a memory that can be written, read, and corrected.

A key's value is overwritten, not added to: that is the whole difference from linear attention, which keeps every value it was ever
given. Prints the answer of both.
"""

import torch
import torch.nn.functional as F

from deltanet import chunk_delta_rule, explain

torch.manual_seed(0)
K = V = 32

# A sequence of facts: 8 keys and their values; then key 3 again with a new value; then a question: what is stored at key 3?
keys = torch.linalg.qr(torch.randn(K, K)).Q[:8]  # orthonormal, so that they do not disturb each other
values = torch.randn(9, V)
order = [0, 1, 2, 3, 4, 5, 6, 7, 3]
k = keys[order][None, :, None]  # [B, T, H, K]
v = values[None, :, None]  # [B, T, H, V]
q = keys[[3] * len(order)][None, :, None]  # every token asks for key 3
beta = torch.ones(1, len(order), 1)  # write with full strength

print(explain(q, k, v, beta))
answers, state = chunk_delta_rule(q, k, v, beta, scale=1.0, output_final_state=True)

delta = answers[0, -1, 0]
linear = sum((keys[3] @ keys[i]) * values[t] for t, i in enumerate(order))  # what linear attention would read
for name, stored in (("new", values[8]), ("old", values[3])):
    by_delta, by_sum = (F.cosine_similarity(read, stored, dim=0).item() for read in (delta, linear))
    print(f"similarity to the {name} value: delta rule {by_delta:.3f}, linear attention {by_sum:.3f}")
print(f"the memory is one matrix a head: {list(state.shape)} in {state.dtype}")
assert torch.allclose(delta, values[8], atol=1e-4)

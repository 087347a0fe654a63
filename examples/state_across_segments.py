"""State carried across segments: a stream of any length in constant memory, and coming back to an earlier moment.

The state is data: it is passed in and handed back, can be copied, and is the same size after ten tokens or ten million.
"""

import torch

from deltanet import LanguageModel, preset
from deltanet.layers import snapshot, state_bytes

torch.manual_seed(0)
model = LanguageModel(preset("nano", vocab_size=257)).eval()
stream = torch.randint(0, 257, (1, 1000))

with torch.no_grad():
    whole, _ = model(stream)

    # The same stream in segments of uneven length.
    state, pieces = model.init_state(batch=1), []
    for segment in stream.split([1, 99, 400, 7, 493], dim=1):
        logits, state = model(segment, state)
        pieces.append(logits)
    difference = (torch.cat(pieces, 1) - whole).abs().max().item()
    print(f"in segments and in one go differ by at most {difference:.1e} (logits up to {whole.abs().max().item():.1f})")
    print(f"the state takes {state_bytes(state):,} bytes after {stream.shape[1]} tokens, as after one")

    # Two continuations from the same moment.
    moment = snapshot(state)
    first, _ = model(torch.tensor([[10, 20, 30]]), state)
    second, _ = model(torch.tensor([[40, 50, 60]]), moment)
    again, _ = model(torch.tensor([[10, 20, 30]]), moment)
    print(
        f"the same continuation gives the same bits: {torch.equal(first, again)}; another one does not: {torch.equal(first, second)}"
    )

assert difference < 1e-4
assert torch.equal(first, again)
assert not torch.equal(first, second)

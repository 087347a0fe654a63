"""The DeltaNet layer inside a model of your own: a small classifier that reads a sequence and must remember one token of it.

Each sequence holds one marked token among noise; the class is the symbol right after the mark. The layer has no position
embeddings and needs none. Trains for a few seconds on a CPU and prints the accuracy.
"""

import torch
import torch.nn.functional as F
from torch import nn

from deltanet import DeltaNet, DeltaNetConfig

torch.manual_seed(0)
SYMBOLS, MARK, LENGTH, WIDTH = 8, 8, 40, 32


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 1, WIDTH)
        self.norm = nn.RMSNorm(WIDTH)
        self.mixer = DeltaNet(WIDTH, DeltaNetConfig(heads=2))
        self.classify = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        mixed, _ = self.mixer(self.norm(x))  # [B, T, WIDTH]; the second value is a state, when one is given
        return self.classify((x + mixed)[:, -1])


def sample(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(SYMBOLS, (count, LENGTH))
    place = torch.randint(0, LENGTH - 1, (count,))
    rows = torch.arange(count)
    tokens[rows, place] = MARK
    return tokens, tokens[rows, place + 1]


model = Reader()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(301):
    tokens, label = sample(64)
    loss = F.cross_entropy(model(tokens), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step:4d}  loss {loss.item():.3f}")

tokens, label = sample(1000)
with torch.no_grad():
    accuracy = (model(tokens).argmax(-1) == label).float().mean().item()
print(f"accuracy on new sequences: {accuracy:.1%} (chance is {1 / SYMBOLS:.1%})")
assert accuracy > 0.9

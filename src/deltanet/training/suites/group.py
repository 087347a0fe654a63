"""Cells alike but for rate and decay, trained as one model (`stacked`): the same batches, and no more kernels than one of them takes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltanet.data.synthetic import IGNORED
from deltanet.training.suites.cell import Cell
from deltanet.training.suites.model import SuiteModel
from deltanet.training.suites.stacked import can_stack, stack
from deltanet.training.suites.trial import Examined, Trial, begun, compiled, is_over

__all__ = ["Group", "grouped"]


def grouped(cells: Sequence[Cell], most: int) -> list[list[Cell]]:
    """The cells in their order, those beside each other that can be trained as one model together, at most so many."""
    found = list[list[Cell]]()
    for cell in cells:
        last = found[-1] if found else []
        alike = bool(last) and _without_rate(last[0]) == _without_rate(cell)
        if alike and len(last) < most and can_stack(cell.config):
            last.append(cell)
        else:
            found.append([cell])
    return found


def _without_rate(cell: Cell) -> dict[str, Any]:
    return replace(cell, learning_rate=0.0, weight_decay=0.0).record()


class Group(Trial):
    """The training of `cells`. One whose recipe asks for no more is measured no more, though its model goes on with the others'."""

    def __init__(self, cells: Sequence[Cell], *args: Any, **options: Any) -> None:
        """As `Trial`, with several cells that `grouped` has put together."""
        super().__init__(cells[0], *args, others=cells[1:], **options)

    def _make_model(self, backend: str) -> SuiteModel:
        return stack([begun(cell) for cell in self.cells], backend=backend)

    def _make_rates(self) -> Tensor:
        rates = [self.recipe.learning_rates(cell.learning_rate) for cell in self.cells]
        return torch.tensor(rates, device=self.device).t().contiguous()

    def _make_groups(self) -> list[dict[str, Any]]:
        """Each model's own slices of the parameters, in the shapes that they have alone: AdamW treats it as it would alone."""
        with torch.device("meta"):
            self._shapes = [p.shape for p in SuiteModel(self.cell.config).parameters()]
        weights = [p.detach() for p in self.model.parameters()]
        return [
            {"params": self._slices(weights, g), "lr": self.rate[g], "weight_decay": cell.weight_decay}
            for g, cell in enumerate(self.cells)
        ]

    def _slices(self, tensors: Sequence[Tensor | None], g: int) -> list[Tensor]:
        pairs = zip(tensors, self._shapes, strict=True)
        return [x.unflatten(0, (len(self.cells), -1))[g].view(shape) for x, shape in pairs if x is not None]

    def _backward(self, loss: Tensor) -> None:
        loss.sum().backward()
        gradients = [p.grad for p in self.model.parameters()]
        for g, group in enumerate(self.optimizer.param_groups):
            for p, gradient in zip(group["params"], self._slices(gradients, g), strict=True):
                p.grad = gradient

    def _loss(self, rows: Tensor) -> Tensor:
        """`[G]`: of each model what it would have alone."""
        tokens, labels, places = self._batch(rows)
        features = compiled(_features) if self.compiles else _features
        logits = self.model.lm_head(features(self.model, self._body(tokens), places)).unflatten(-1, (len(self.cells), -1))
        asked = (labels != IGNORED).sum()
        labels = labels[..., None].expand(logits.shape[:-1]).flatten()
        each = F.cross_entropy(logits.flatten(0, 2).float(), labels, ignore_index=IGNORED, reduction="none")
        return each.view(-1, len(self.cells)).sum(0) / asked

    def _examine(
        self, epoch: int, loss: Any, scores: dict[str, Any], losses: dict[str, Any]
    ) -> list[tuple[Cell, Examined]]:
        seconds, told = time.monotonic() - self.began, list[tuple[Cell, Examined]]()
        for g, (cell, history) in enumerate(zip(self.cells, self.histories, strict=True)):
            if not is_over(history, cell):
                mine, surprise = ({name: of[g] for name, of in found.items()} for found in (scores, losses))
                history.append(Examined(epoch, loss[g], mine, seconds, surprise))
                told.append((cell, history[-1]))
        return told

    def _logits(self, tokens: Tensor, places: Tensor | None) -> Tensor:
        return super()._logits(tokens, places).unflatten(-1, (len(self.cells), -1)).movedim(-2, 0)

    def _cross_entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([super(Group, self)._cross_entropies(one, labels) for one in logits])


def _features(model: SuiteModel, x: Tensor, places: Tensor | None) -> Tensor:
    return model.features(x, places)

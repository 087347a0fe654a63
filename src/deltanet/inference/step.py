"""One token after another, from a state. On a GPU the step soon becomes a CUDA graph: at small batches it is hundreds of small kernels, and
launching them one by one takes several times as long as they run.
"""

from typing import Any

import torch
from torch import Tensor

from deltanet.layers import Mixer, snapshot
from deltanet.models import LanguageModel

EAGER = 8  # tokens before a step is captured, which takes as long as some tens of them: short answers go without


class Step:
    """`step(tokens)`: logits `[B, vocabulary]` after `tokens` `[B]`, good until the next call; the state goes on, the one given stays as it is.

    With `graph`, captured where that can be. A state that grows, as that of attention without a window does, cannot: the next token's would not fit.
    """

    def __init__(self, model: LanguageModel, state: Any, *, graph: bool = True) -> None:
        self._model, self._state, self._taken, self._may_capture = model, state, 0, graph
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self._graph is not None:
            self._tokens.copy_(tokens)
            self._graph.replay()
            return self._logits
        logits, state = self._model(tokens[:, None], self._state)
        before, self._state = self._state, state
        self._taken += 1
        if self._may_capture and self._taken == EAGER and tokens.is_cuda:
            shapes = [[x.shape for x in _tensors(s)] for s in (before, state)]
            if shapes[0] == shapes[1]:
                self._capture(tokens)
        return logits[:, -1]

    def _capture(self, tokens: Tensor) -> None:
        """The step as a graph that reads tokens and state where it will find them every time, and leaves the new state in the old one's place."""
        self._tokens, self._state = tokens.clone(), snapshot(self._state)
        graph = torch.cuda.CUDAGraph()
        # Weights that autocast narrows must be narrowed inside: what it keeps for other calls is freed when it likes.
        autocast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False)
        mixers = [module for module in self._model.modules() if isinstance(module, Mixer)]
        try:
            for mixer in mixers:
                mixer.overwrite = True
            with torch.cuda.device_of(tokens), torch.cuda.graph(graph), autocast:
                logits, state = self._model(self._tokens[:, None], self._state)
                moved = [(old, new) for old, new in zip(_tensors(self._state), _tensors(state), strict=True) if old is not new]
                for old, new in moved:
                    old.copy_(new)
                self._logits = logits[:, -1]
        finally:
            for mixer in mixers:
                mixer.overwrite = False
        self._graph = graph


def _tensors(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in _tensors(part)]

"""AdamW, which weights decay, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from deltanet.training.config import TrainConfig

FIELDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of linear layers only.

    Norm scales and convolution filters do not decay: they set the scale of what passes, and zero is no natural value for
    them. Embeddings do not either (nor a head tied to them): the row of a rare token would shrink with no gradient
    against it. An untied head is a matrix like the others.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - embeddings
    groups = [
        {"params": [p for p in model.parameters() if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, steps: int | None, config: TrainConfig) -> float:
    """The rate of step `step` (the first is 0) of `steps`: up in a line, then down along half a cosine.

    It starts and ends at `learning_rate_floor` times the peak. Where `steps` is not known yet, it stays at the peak.
    """
    floor, peak_step = config.learning_rate_floor, config.warmup_steps
    if step < peak_step:
        fraction = step / peak_step
    elif steps is None:
        fraction = 1.0
    else:
        progress = min(1.0, (step - peak_step) / max(1, steps - 1 - peak_step))
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (floor + (1 - floor) * fraction)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What `optimizer` keeps, under "<parameter>.<field>"; empty before its first step."""
    return {
        f"{name}.{field}": optimizer.state[parameter][field]
        for name, parameter in model.named_parameters()
        for field in FIELDS
        if parameter in optimizer.state
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the tensors must be all of them or none."""
    for name, parameter in model.named_parameters() if tensors else ():
        optimizer.state[parameter] = {field: tensors[f"{name}.{field}"].to(parameter.device) for field in FIELDS}

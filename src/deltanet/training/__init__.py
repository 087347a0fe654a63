"""Training: a run's config, optimizer, checkpoints, metrics, and the one loop that uses them.

May import evaluation, inference, models, data and below; integrations and the command line use it. It prints nothing.
"""

from deltanet.training.config import DataConfig, RunConfig, TrainConfig, read_config, write_config
from deltanet.training.metrics import Evaluation, Header, Reporter, Result, Silent, Step, read_metrics
from deltanet.training.sizes import default_run

__all__ = [
    "DataConfig",
    "Evaluation",
    "Header",
    "Reporter",
    "Result",
    "RunConfig",
    "Silent",
    "Step",
    "TrainConfig",
    "default_run",
    "read_config",
    "read_metrics",
    "write_config",
]

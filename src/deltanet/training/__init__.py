"""Training: a run's config, optimizer, checkpoints, metrics, and the one loop that uses them.

May import evaluation, inference, models, data and below; integrations and the command line use it. It prints nothing.
"""

from deltanet.training.checkpoint import CheckpointError, Trained, load_model
from deltanet.training.config import DataConfig, RunConfig, TrainConfig, read_config, write_config
from deltanet.training.metrics import read_metrics
from deltanet.training.report import Evaluation, Header, Reporter, Result, Silent, Step
from deltanet.training.sizes import default_run
from deltanet.training.trainer import NonFiniteError, train

__all__ = [
    "CheckpointError",
    "DataConfig",
    "Evaluation",
    "Header",
    "NonFiniteError",
    "Reporter",
    "Result",
    "RunConfig",
    "Silent",
    "Step",
    "TrainConfig",
    "Trained",
    "default_run",
    "load_model",
    "read_config",
    "read_metrics",
    "train",
    "write_config",
]

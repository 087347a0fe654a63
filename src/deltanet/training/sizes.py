"""How a model of each size is trained unless told otherwise, on bytes of text. One dial; recipes/ holds whole runs."""

from deltanet.data import ByteTokenizer
from deltanet.models import preset
from deltanet.training.config import DataConfig, RunConfig, TrainConfig

# size: (context, batch_size, micro_batch_size, steps, learning_rate, warmup_steps, evaluate_every)
# 340m and 1.3b: batch, length and rates of the paper (recipes/340m.toml says where from). The rest grows towards them.
_RUNS = {
    "nano": (128, 16, 16, 500, 3e-3, 50, 100),
    "micro": (256, 32, 32, 3000, 2e-3, 200, 250),
    "small": (512, 64, 64, 10000, 1e-3, 500, 500),
    "medium": (1024, 128, 32, 20000, 6e-4, 1000, 500),
    "340m": (2048, 256, 16, 28672, 3e-4, 954, 1000),
    "1.3b": (2048, 1024, 8, 47684, 3e-4, 477, 1000),
}


def default_run(size: str = "nano") -> RunConfig:
    """The run of that size on the bundled novels. ValueError for an unknown size."""
    model = preset(size, vocab_size=ByteTokenizer.vocab_size)
    context, batch_size, micro_batch_size, steps, learning_rate, warmup_steps, evaluate_every = _RUNS[size]
    train = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        evaluate_every=evaluate_every,
        save_every=2 * evaluate_every,
        evaluate_tokens=max(16384, 64 * context),
    )
    return RunConfig(model=model, data=DataConfig(context=context), train=train)

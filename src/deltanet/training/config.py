"""A whole run as one value: the model, the text, the training. Read from TOML, written to TOML, checked field by field."""

import tomllib
import types
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from deltanet.data import Corpus, load_corpus
from deltanet.models import ModelConfig, preset
from deltanet.ops.backends import nearest
from deltanet.training.run_folder import replace_text


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and how it is cut. A run goes on only with the same text, cut the same way."""

    source: str = "austen"
    """A corpus (austen, pydocs, pycode), or a path to your own text: .txt, .jsonl, .jsonl.gz, or a folder of those."""
    context: int = 128
    """Tokens in one training window."""
    bad_lines: Literal["error", "skip"] = "error"
    """What becomes of a line that cannot be read: stop and name it, or leave it out and count it."""
    cache: str = "~/.cache/deltanet"
    """Where pydocs and pycode are kept once they are collected from what is installed here."""
    shards: str | None = None
    """A folder that keeps the tokens, memory-mapped, for text larger than memory; none: tokenized anew into memory."""

    def __post_init__(self) -> None:
        check_fields(self, context=(1, 1 << 24))

    def corpus(self) -> Corpus:
        """The text, read once and checked; see `load_corpus`."""
        return load_corpus(self.source, self.bad_lines, cache=Path(self.cache).expanduser())


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the weights are found. All but the seed may change when a run goes on."""

    steps: int | None = None
    """Optimizer steps in all; the learning rate decays over all of them."""
    tokens: int | None = None
    """Training tokens in all, instead of `steps`."""
    minutes: float | None = None
    """Stop and save after so much time, in every call. Without `steps` and `tokens`, also plan as many steps as fit."""
    batch_size: int = 16
    """Windows of one optimizer step."""
    micro_batch_size: int | None = None
    """Windows of one forward pass: fewer than `batch_size` save memory and give the same gradient. None: all at once."""
    learning_rate: float = 3e-4
    """The peak, reached after the warm-up."""
    learning_rate_floor: float = 0.1
    """The fraction of the peak that the warm-up starts from and the cosine ends at."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.01
    """Pull of the matrices towards zero, times the learning rate."""
    beta1: float = 0.9
    """Memory of AdamW's mean of the gradient."""
    beta2: float = 0.95
    """Memory of AdamW's mean of the squared gradient."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this length."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """Where to train: "cpu", "cuda", "cuda:1"; auto takes a GPU where there is one."""
    backend: str = "auto"
    """Who runs the delta rule: auto, reference, triton or hopper."""
    memory: Literal["states", "lean"] = "states"
    """Keep the states of all chunks for the backward pass, or recompute them there: less memory, more time."""
    compile: bool = False
    """Train blocks as torch.compile makes them: up to three times as fast on a GPU, after half a minute."""
    recompute: Literal["nothing", "cheap", "blocks"] = "nothing"
    """What the backward pass makes again instead of keeping it. cheap: norms, activations and convolutions, not products of matrices nor what
    mixes tokens; blocks: all of a block but its input, a third more time."""
    seed: int = 0
    """Decides the initial weights and the order of the windows."""
    evaluate_every: int = 250
    """Steps between evaluations during the run; the whole validation text is evaluated at the end."""
    evaluate_tokens: int = 16384
    """Tokens of validation text, evenly spread over it, that an evaluation during the run reads."""
    sample_tokens: int = 200
    """Tokens written as a sample at every evaluation; 0: none."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many of the newest checkpoints are kept, beside the one with the best validation."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is not finite: stop before the update, or leave the batch out and count it."""
    max_skips: int = 5
    """How many batches a run may leave out."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            steps=(0, 1 << 40),
            tokens=(1, 1 << 60),
            minutes=(1e-3, 1e7),
            batch_size=(1, 1 << 20),
            micro_batch_size=(1, 1 << 20),
            learning_rate=(0.0, 100.0),
            learning_rate_floor=(0.0, 1.0),
            warmup_steps=(0, 1 << 40),
            weight_decay=(0.0, 100.0),
            beta1=(0.0, 0.999999),
            beta2=(0.0, 0.999999),
            max_grad_norm=(1e-6, 1e9),
            seed=(0, (1 << 63) - 1),
            evaluate_every=(1, 1 << 40),
            evaluate_tokens=(1, 1 << 60),
            sample_tokens=(0, 1 << 20),
            save_every=(1, 1 << 40),
            keep=(2, 1 << 20),
            max_skips=(0, 1 << 40),
        )
        if self.steps is not None and self.tokens is not None:
            raise ValueError(
                f"steps or tokens must be left out, got {self.steps} and {self.tokens}: one length is enough"
            )
        if self.steps is None and self.tokens is None and self.minutes is None:
            raise ValueError("steps, tokens or minutes must say how long the run is, got none of them: give one")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig
    """The optimisation."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokens_per_step > MAX_TOKENS_PER_STEP:
            raise ValueError(
                f"train.batch_size times data.context must be at most {MAX_TOKENS_PER_STEP} tokens, got "
                f"{self.train.batch_size} * {self.data.context} = {self.tokens_per_step}: make one of them smaller"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch_size * self.data.context

    @property
    def steps(self) -> int | None:
        """Optimizer steps in all; None where they are planned from `train.minutes` once the speed is known."""
        if self.train.tokens is not None:
            return -(-self.train.tokens // self.tokens_per_step)
        return self.train.steps


MAX_TOKENS_PER_STEP = 1 << 32


def check_fields(config: Any, **limits: tuple[float, float]) -> None:
    """Raises TypeError for a field of another type than it says, and ValueError for a number outside its limits."""
    hints = get_type_hints(type(config))
    for one in fields(config):
        _check_type(one.name, getattr(config, one.name), hints[one.name])
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value!r}: correct it")


def read_config(path: str | Path) -> RunConfig:
    """The run that a TOML file describes; see `config_from_dict`. ValueError names the file and, where known, the field."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"a run config must be a TOML file, but nothing is at '{path}': check the path") from None
    except OSError as error:
        raise ValueError(f"a run config must be a readable file, got {error}: check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' must be TOML, got {error}: correct the file") from None
    try:
        return config_from_dict(table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{path}': {error}") from None


def write_config(path: Path, config: RunConfig) -> None:
    """Writes `config`, every field of it, so that `read_config` gives the same value."""
    replace_text(path, config_to_toml(config))


def config_to_toml(config: RunConfig) -> str:
    return tomli_w.dumps(config_to_dict(config))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain tables, lists, strings and numbers. None, the default wherever it is allowed, is left out."""
    table: dict[str, Any] = {"kind": config.kind} if hasattr(type(config), "kind") else {}
    values = {one.name: getattr(config, one.name) for one in fields(config)}
    return table | {name: _to_plain(value) for name, value in values.items() if value is not None}


def config_from_dict(table: dict[str, Any]) -> RunConfig:
    """The run of a table like `config_to_dict`'s. Fields may be left out where they have a default.

    In [model], `size = "nano"` (or another preset) stands for all fields of that preset, of DeltaNet or of the model that
    `name = "gla"` (or another) says; others beside them override.
    Raises ValueError or TypeError for unknown keys, with the nearest known one, and for values that do not fit.
    """
    model = table.get("model")
    if isinstance(model, dict) and "size" in model:
        rest = {key: value for key, value in model.items() if key not in ("size", "name")}
        table = {**table, "model": {**_preset_table(model["size"], model.get("name", "deltanet")), **rest}}
    config: RunConfig = from_table(RunConfig, table, "")
    return config


def _preset_table(size: Any, name: Any) -> dict[str, Any]:
    _check_type("[model] size", size, str)
    _check_type("[model] name", name, str)
    try:
        return config_to_dict(preset(size, model=name))
    except ValueError as error:
        raise ValueError(f"[model] {error}") from None


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return config_to_dict(value)
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def from_table(cls: Any, table: Any, where: str) -> Any:
    """The dataclass `cls` built from a TOML or JSON table; `where` names the table in errors. ValueError, TypeError."""
    label = f"[{where}]" if where else "the run"
    if not isinstance(table, dict):
        raise TypeError(f"{label} must be a table of fields, got {table!r}: give it one")
    known = {one.name: one for one in fields(cls)}
    hints = get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key == "kind" and hasattr(cls, "kind"):
            continue
        if key not in known:
            advice = nearest(key, tuple(known)) or f": it has {', '.join(known)}"
            raise ValueError(f"{label} has no field {key!r}{advice}")
        values[key] = _from_plain(hints[key], value, f"{where}.{key}" if where else key)
        _check_type(f"{label} {key}", values[key], hints[key])
    missing = [name for name, one in known.items() if name not in values and _is_required(one)]
    if missing:
        raise ValueError(f"{label} must give {', '.join(missing)}, got {', '.join(values) or 'nothing'}: add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{label} {error}") from None


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    """What TOML gives, as the field's type has it: tables become configs, lists tuples, whole numbers floats."""
    options = _options(hint)
    if isinstance(value, list):
        items = [get_args(option)[0] for option in options if get_origin(option) is tuple]
        return tuple(_from_plain(items[0], item, where) for item in value) if items else value
    if any(is_dataclass(option) for option in options):
        return from_table(_by_kind(options, value, where), value, where)
    if type(value) is int and float in options:
        return float(value)
    return value


def _by_kind(configs: tuple[Any, ...], table: Any, where: str) -> Any:
    """Which of `configs` the table is: the only one, or for mixers that which its `kind` names."""
    kinds = {config.kind: config for config in configs if hasattr(config, "kind")}
    if not kinds or not isinstance(table, dict):
        return configs[0]
    kind = table.get("kind")
    if kind not in kinds:
        raise ValueError(
            f"[{where}] kind must be one of {', '.join(kinds)}, got {kind!r}{nearest(str(kind), tuple(kinds))}"
        )
    return kinds[kind]


def _is_required(one: "Field[Any]") -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = _options(hint)
    if not any(_fits(value, option) for option in options):
        raise TypeError(f"{name} must be {' or '.join(map(_spell, options))}, got {value!r}: correct it")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return type(value) is str and value in get_args(option)
    if get_origin(option) is tuple:
        return isinstance(value, tuple) and all(
            any(_fits(item, choice) for choice in _options(get_args(option)[0])) for item in value
        )
    return type(value) is option


def _spell(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if get_origin(option) is tuple:
        return "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "left out"}
    return words.get(option) or "a table"

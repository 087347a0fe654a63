"""A run is one value: it survives the file, and what cannot be is refused with the name of the field."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltanet.layers import DeltaNetConfig
from deltanet.models import SIZES, LanguageModel, ModelConfig
from deltanet.training import DataConfig, RunConfig, TrainConfig, default_run, read_config, write_config
from deltanet.training.config import config_from_dict, config_to_toml

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL = '[model]\nsize = "nano"\n'


def small(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=True, exclude_max=True)


mixers = st.builds(
    DeltaNetConfig,
    heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.none() | st.integers(1, 256),
    short_conv=st.integers(0, 8),
    feature_map=st.sampled_from(["silu", "relu", "elu1", "identity"]),
    output_gate=st.booleans(),
    norm_eps=small(0, 1),
)
models = st.builds(
    ModelConfig,
    vocab_size=st.integers(1, 1 << 20),
    depth=st.just(6),
    layers=st.lists(mixers, min_size=1, max_size=3).map(tuple),
    feed_forward=st.none() | st.integers(1, 4096),
    tie_embeddings=st.booleans(),
    norm_eps=small(0, 1),
)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
data = st.builds(
    DataConfig,
    source=names,
    context=st.integers(1, 4096),
    bad_lines=st.sampled_from(["error", "skip"]),
    shards=st.none() | names,
)
lengths = st.sampled_from([{"steps": 7}, {"tokens": 10**9}, {"minutes": 0.5}, {"steps": 0, "minutes": 1e6}])
trainings = st.builds(
    lambda length, **fields: TrainConfig(**length, **fields),
    lengths,
    batch_size=st.integers(1, 1 << 20),
    micro_batch_size=st.none() | st.integers(1, 64),
    learning_rate=st.floats(0, 100),
    learning_rate_floor=st.floats(0, 1),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
    recompute=st.sampled_from(["nothing", "cheap", "blocks"]),
    seed=st.integers(0, (1 << 63) - 1),
    on_nonfinite=st.sampled_from(["stop", "skip"]),
)


@given(st.builds(RunConfig, model=models, data=data, train=trainings))
def test_a_run_survives_its_file(config: RunConfig) -> None:
    assert config_from_dict(tomllib.loads(config_to_toml(config))) == config


def test_files(tmp_path: Path, config: RunConfig) -> None:
    write_config(tmp_path / "config.toml", config)
    assert read_config(tmp_path / "config.toml") == config
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name, message in (
        ("missing.toml", "nothing is at"),
        ("bad.toml", "must be TOML"),
        ("binary.toml", "must be TOML"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / name)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[modle]\n", "the run has no field 'modle'. Did you mean 'model'?"),
        ("", "the run must give model, train"),
        (MODEL, "the run must give train"),
        ("model = 3\n", r"\[model\] must be a table"),
        ('[model]\nsize = "nani"\n', r"\[model\] size must be one of .*Did you mean 'nano'"),
        ("[model]\nsize = 3\n", r"\[model\] size must be a string, got 3"),
        (MODEL + "d_modl = 3\n", r"\[model\] has no field 'd_modl'. Did you mean 'd_model'"),
        (MODEL + 'd_model = "32"\n', r"\[model\] d_model must be a whole number, got '32'"),
        (MODEL + "d_model = true\n", r"\[model\] d_model must be a whole number, got True"),
        (MODEL + "d_model = -1\n", r"\[model\] d_model must be between 1 and 65536, got -1"),
        (MODEL + "d_model = 10000000000\n", r"\[model\] d_model must be between 1 and 65536"),
        (MODEL + "layers = 3\n", r"\[model\] layers must be a list, got 3"),
        (MODEL + "layers = [3]\n", r"\[model.layers\] must be a table"),
        (
            MODEL + '[[model.layers]]\nkind = "dleta"\n',
            r"kind must be one of .*delta.*got 'dleta'. Did you mean 'delta'",
        ),
        (MODEL + "[[model.layers]]\nheads = 1\n", r"\[model.layers\] kind must be one of .*delta.*got None"),
        (MODEL + '[[model.layers]]\nkind = "delta"\nheads = 1.5\n', r"\[model.layers\] heads must be a whole number"),
        (MODEL + "[data]\ncontext = 0\n", r"\[data\] context must be from 1 to 16777216, got 0"),
        (MODEL + "[train]\n", r"\[train\] steps, tokens or minutes must say"),
        (MODEL + "[train]\nsteps = 1\ntokens = 1\n", r"\[train\] steps or tokens must be left out"),
        (MODEL + "[train]\nsteps = -1\n", r"\[train\] steps must be from 0 to \d+, got -1"),
        (MODEL + "[train]\nsteps = 1\nlearning_rate = nan\n", r"\[train\] learning_rate must be from"),
        (MODEL + "[train]\nsteps = 1\nkeep = 1\n", r"\[train\] keep must be from 2 to"),
        (MODEL + '[train]\nsteps = 1\nprecision = "fp8"\n', r"\[train\] precision must be 'auto' or .*, got 'fp8'"),
        (MODEL + "[data]\ncontext = 16777216\n[train]\nsteps = 1\nbatch_size = 1048576\n", "train.batch_size times"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(toml)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path / "run.toml")
    assert str(tmp_path / "run.toml") in str(caught.value)


def test_fields_may_be_left_out_and_presets_overridden() -> None:
    config = config_from_dict({"model": {"size": "nano", "depth": 6}, "train": {"steps": 5, "learning_rate": 1}})
    assert (config.model.depth, config.model.d_model) == (6, 128)
    assert config.train == TrainConfig(steps=5, learning_rate=1.0)
    assert config.data == DataConfig()


def test_length_of_a_run(config: RunConfig) -> None:
    tokens = replace(config.train, steps=None, tokens=1000)
    assert replace(config, train=tokens).steps == 16  # 64 tokens a step
    assert replace(config, train=replace(tokens, tokens=None, minutes=1.0)).steps is None


def test_every_size_has_a_run_and_the_quickstart_is_the_default() -> None:
    assert [default_run(size).model.depth for size in SIZES] == [3, 6, 8, 12, 24, 24]
    assert read_config(RECIPES / "quickstart.toml") == default_run()


@pytest.mark.parametrize(("name", "parameters"), [("340m", 374_362_112), ("1.3b", 1_365_677_056)])
def test_recipes_of_the_paper(name: str, parameters: int) -> None:
    config = read_config(RECIPES / f"{name}.toml")
    with torch.device("meta"):
        assert LanguageModel(config.model).parameter_count() == parameters
    assert config.train.learning_rate * config.train.learning_rate_floor == pytest.approx(3e-5)
    assert config.tokens_per_step * (config.steps or 0) == pytest.approx({"340m": 15e9, "1.3b": 100e9}[name], rel=0.01)
    warmup = config.tokens_per_step * config.train.warmup_steps
    assert warmup == pytest.approx({"340m": 0.5e9, "1.3b": 1e9}[name], rel=0.01)

"""Implementations that we did not write, with the same weights: transformers' Llama, Mistral and Mamba models, and its delta rule.

Needs the extra test-oracles; skipped without it. Outputs, gradients of all weights and decoding agree.
"""

import os

import pytest
import torch
from support import make_inputs, relative_error
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, not even a kernel
pytest.importorskip("transformers", reason="needs transformers: pip install '.[test-oracles]'")

from transformers import LlamaConfig, LlamaForCausalLM, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import MambaConfig as TheirMambaConfig
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from deltanet import chunk_delta_rule
from deltanet.layers import AttentionConfig, MambaConfig
from deltanet.models import LanguageModel, ModelConfig

VOCABULARY, WIDTH, DEPTH = 31, 24, 2


def rename_llama(name: str) -> str:
    for ours, theirs in {
        "embeddings": "model.embed_tokens",
        "layers": "model.layers",
        "norm.weight": "model.norm.weight",
    }.items():
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
    for ours, theirs in {
        "feed_forward_norm": "post_attention_layernorm",
        "mixer_norm": "input_layernorm",
        "feed_forward": "mlp",
        "mixer": "self_attn",
    }.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def rename_mamba(name: str) -> str:
    """Our block of two mixers is two of their layers."""
    part = name.split(".")
    if part[0] == "layers":
        second = part[2].startswith("second_")
        layer = f"backbone.layers.{2 * int(part[1]) + second}"
        inner = ".".join(part[3:]).replace("o_proj", "out_proj").replace("conv_bias", "conv1d.bias")
        inner = "conv1d.weight" if inner == "conv.weight" else inner
        return f"{layer}.norm.{inner}" if part[2].endswith("norm") else f"{layer}.mixer.{inner}"
    return {"embeddings.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"}.get(name, name)


def llama(window: int | None, kv_heads: int) -> tuple[LanguageModel, nn.Module]:
    mixer = AttentionConfig(heads=4, kv_heads=kv_heads, window=window, rope_theta=500.0)
    ours = LanguageModel(
        ModelConfig(vocab_size=VOCABULARY, d_model=WIDTH, depth=DEPTH, layers=(mixer,), feed_forward=40)
    )
    options = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=DEPTH, intermediate_size=40, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=6, rms_norm_eps=1e-6, tie_word_embeddings=False, use_cache=True,
        rope_parameters=dict(rope_type="default", rope_theta=500.0), attn_implementation="eager",
    )  # fmt: skip
    if window is None:
        return ours, LlamaForCausalLM(LlamaConfig(**options))
    return ours, MistralForCausalLM(MistralConfig(**options, sliding_window=window))


def mamba() -> tuple[LanguageModel, nn.Module]:
    ours = LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=WIDTH, depth=DEPTH, layers=(MambaConfig(state=5),)))
    config = TheirMambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2 * DEPTH, state_size=5, layer_norm_epsilon=1e-6,
        tie_word_embeddings=False, residual_in_fp32=False, use_mambapy=False,
    )  # fmt: skip
    return ours, MambaForCausalLM(config)


MODELS = {
    "llama": (lambda: llama(None, 4), rename_llama),
    "llama_grouped": (lambda: llama(None, 2), rename_llama),
    "mistral": (lambda: llama(5, 2), rename_llama),
    "mamba": (mamba, rename_mamba),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_weights_same_model(name: str) -> None:
    build, rename = MODELS[name]
    torch.manual_seed(0)
    ours, theirs = build()
    for parameter in ours.parameters():
        parameter.data.normal_(std=0.3)
    missing = theirs.load_state_dict({rename(n): w for n, w in ours.state_dict().items()})
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    # Their rotary angles and scan stay in fp32 whatever the weights are, so fp64 would tell no more.
    tokens = torch.randint(VOCABULARY, (2, 70))
    got, expected = ours(tokens)[0], theirs(tokens).logits
    assert relative_error(got, expected) < 3e-6

    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = dict(theirs.named_parameters())
    for n, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, wanted[rename(n)].grad) < 1e-4, n

    with torch.no_grad():
        prompt = tokens[:1, :9]
        generated = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        state, new = ours.init_state(1), prompt
        for _ in range(12):
            logits, state = ours(new, state)
            new = logits[:, -1].argmax(-1, keepdim=True)
            prompt = torch.cat([prompt, new], 1)
    assert torch.equal(prompt, generated)


@pytest.mark.parametrize("gate", [None, 2.0])
def test_the_delta_rule_is_transformers(gate: float | None) -> None:
    """Their chunked gated delta rule in plain PyTorch, with g = 0 and with decay: outputs, final states and gradients."""
    inputs = make_inputs(T=130, K=16, V=8, gate=gate, beta=(0.0, 1.0), state=True, dtype=torch.float32)
    outcomes: list[tuple[Tensor, ...]] = []
    for rule in ("ours", "theirs"):
        leaves = inputs.leaves()
        tensors = dict(leaves)
        g = tensors.pop("g", None)
        if rule == "ours":
            o, final = chunk_delta_rule(**tensors, g=g, output_final_state=True)
        else:
            q, k, v, beta, state = (tensors[n] for n in ("q", "k", "v", "beta", "initial_state"))
            g = torch.zeros_like(beta) if g is None else g
            o, final = torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
        loss = (o * inputs.do).sum() + (final * inputs.dfinal_state).sum()
        outcomes.append((o, final, *torch.autograd.grad(loss, list(leaves.values()))))
    for got, expected in zip(*outcomes, strict=True):
        assert relative_error(got, expected) < 2e-5

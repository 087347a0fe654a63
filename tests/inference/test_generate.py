"""Generation with a state equals the full forward pass, however the prompt is cut and whatever else is in the batch."""

import pytest
import torch

from deltanet.data import ByteTokenizer
from deltanet.inference import GREEDY, Sampling, decode, generate, prefill, stream_text
from deltanet.layers import DeltaNetConfig, reorder, snapshot, state_bytes
from deltanet.models import LanguageModel, ModelConfig

VOCABULARY = 257
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=32, depth=2, layers=(DeltaNetConfig(heads=2),), feed_forward=48, init_std=0.3
    )
    return LanguageModel(config).double().eval()


def tokens(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def test_the_state_gives_the_logits_of_the_full_pass(model):
    ids = tokens(2, 150)
    full, _ = model(ids)
    ready = prefill(model, list(ids[:, :97]))
    logits = [ready.logits]
    state = ready.state
    for t in range(97, 150):
        out, state = model(ids[:, t : t + 1], state)
        logits.append(out[:, -1])
    torch.testing.assert_close(torch.stack(logits, 1), full[:, 96:], **EXACT)


def test_greedy_tokens_are_those_of_the_full_pass(model):
    prompt = tokens(70)
    (found,) = generate(model, [prompt], GREEDY, max_tokens=40)
    ids = prompt
    for _ in range(40):
        ids = torch.cat([ids, model(ids[None])[0][0, -1].argmax()[None]])
    assert found.tolist() == ids[70:].tolist()


@pytest.mark.parametrize("at_once", [1, 7, 64, 100, 1000])
def test_the_prompt_may_be_cut_anywhere(model, at_once):
    ids = tokens(2, 131)
    whole, cut = prefill(model, list(ids)), prefill(model, list(ids), at_once=at_once)
    torch.testing.assert_close(cut.logits, whole.logits, **EXACT)
    torch.testing.assert_close(cut.state[-1].memory, whole.state[-1].memory, **EXACT)


def test_a_conversation_may_go_on_from_a_state(model):
    ids = tokens(2, 90)
    first = prefill(model, list(ids[:, :33]))
    torch.testing.assert_close(
        prefill(model, list(ids[:, 33:]), first.state).logits, prefill(model, list(ids)).logits, **EXACT
    )


@pytest.mark.parametrize("at_once", [5, 1000])
def test_prompts_of_unequal_lengths_do_not_see_each_other(model, at_once):
    prompts = [tokens(n, seed=n) for n in (1, 67, 3, 20)]
    together = prefill(model, prompts, at_once=at_once)
    alone = [prefill(model, [prompt]) for prompt in prompts]
    torch.testing.assert_close(together.logits, torch.cat([ready.logits for ready in alone]), **EXACT)
    for sampling in (GREEDY, Sampling(temperature=0.8, top_k=50, top_p=0.9, seed=3)):
        batch = generate(model, prompts, sampling, max_tokens=15)
        for i, prompt in enumerate(prompts):
            row = Sampling(**{**vars(sampling), "seed": sampling.seed + i})
            assert batch[i].tolist() == generate(model, [prompt], row, max_tokens=15)[0].tolist()


def test_one_prefill_serves_several_continuations(model):
    ready = prefill(model, [tokens(40)])
    before = snapshot(ready.state)
    first = list(decode(model, ready, Sampling(seed=1), max_tokens=10))
    second = list(decode(model, ready, Sampling(seed=1), max_tokens=10))
    assert torch.cat(first).equal(torch.cat(second))
    assert all(a.equal(b) for x, y in zip(ready.state, before, strict=True) for a, b in zip(x, y, strict=True))
    three = ready._replace(
        logits=ready.logits.repeat(3, 1), state=reorder(ready.state, torch.zeros(3, dtype=torch.int64))
    )
    rows = torch.stack(list(decode(model, three, Sampling(seed=1), max_tokens=10)), 1)
    assert rows[0].equal(torch.cat(first))
    assert not rows[1].equal(rows[0])


def test_a_stop_token_ends_its_row_only(model):
    prompts = [tokens(9, seed=n) for n in range(4)]
    free = generate(model, prompts, GREEDY, max_tokens=30)
    stop = int(free[0][5])
    stopped = generate(model, prompts, GREEDY, max_tokens=30, stop=[stop])
    for full, cut in zip(free, stopped, strict=True):
        ids = full.tolist()
        assert cut.tolist() == ids[: ids.index(stop) if stop in ids else None]
    rows = torch.stack(list(decode(model, prefill(model, prompts), GREEDY, max_tokens=30, stop=[stop])), 1)
    assert (rows[0, 5:] == stop).all()
    steps = list(decode(model, prefill(model, prompts[:1]), GREEDY, max_tokens=30, stop=[stop]))
    assert len(steps) == free[0].tolist().index(stop) + 1


def test_memory_per_token_is_constant(model):
    ready = prefill(model, [tokens(10)])
    size = state_bytes(ready.state)
    assert state_bytes(prefill(model, [tokens(500)]).state) == size == model.double().state_bytes()


def test_prefill_reads_the_prompt_in_pieces(model, monkeypatch):
    widths = []
    hidden = LanguageModel.hidden
    monkeypatch.setattr(
        LanguageModel, "hidden", lambda self, ids, *a, **k: widths.append(ids.shape[1]) or hidden(self, ids, *a, **k)
    )
    prefill(model, [tokens(250)], at_once=100)
    assert widths == [100, 100, 50]


def test_text_is_streamed_and_ends_with_the_document(model):
    tokenizer = ByteTokenizer()
    text = "".join(stream_text(model, tokenizer, "Émile", GREEDY, max_tokens=50))
    prompt = torch.tensor([tokenizer.separator, *tokenizer.encode("Émile").tolist()])
    (ids,) = generate(model, [prompt], GREEDY, max_tokens=50, stop=[tokenizer.separator])
    assert text == tokenizer.decode(ids.numpy())


def test_no_tokens_is_no_text(model):
    assert generate(model, [tokens(4)], max_tokens=0)[0].tolist() == []
    assert list(stream_text(model, ByteTokenizer(), "a", max_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one prompt"),
        ([[]], ValueError, "prompt 0 must hold at least one token"),
        ([[1], torch.empty(0, dtype=torch.int64)], ValueError, "prompt 1 must hold at least one token"),
        ([[1, 257]], ValueError, r"prompt 0 must hold ids in \[0, 257\), got 1 to 257"),
        ([[-1, 3]], ValueError, "got -1 to 3"),
        ([torch.zeros(2, 3, dtype=torch.int64)], ValueError, r"token ids \[n\], got shape \[2, 3\]"),
        ([[0.5]], TypeError, "integer token ids, got torch.float32"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, error, message):
    with pytest.raises(error, match=message):
        prefill(model, prompts)


def test_an_empty_text_is_refused_before_anything_is_read(model):
    with pytest.raises(ValueError, match="prompt must hold some text, got an empty one"):
        stream_text(model, ByteTokenizer(), "", max_tokens=3)


def test_other_bad_numbers_are_refused(model):
    with pytest.raises(ValueError, match="max_tokens must be >= 0, got -1"):
        decode(model, prefill(model, [[1]]), max_tokens=-1)
    with pytest.raises(ValueError, match="at_once must be at least 1"):
        prefill(model, [[1]], at_once=0)


def test_a_diverged_model_is_named(model):
    broken = LanguageModel(model.config).double()
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits must be finite"):
        prefill(broken, [[1, 2]])

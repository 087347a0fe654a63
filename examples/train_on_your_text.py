"""Train a language model on your own text, come back to it, and let it write.

The text here is a made-up one, written to a file so that the example runs anywhere; put the path of yours in its place
(.txt, .jsonl, .jsonl.gz, or a folder of those). On the command line: deltanet train --data my.txt
"""

from dataclasses import replace
from pathlib import Path

from deltanet.inference import GREEDY, stream_text
from deltanet.training import DataConfig, default_run, load_model, read_metrics, train

text = Path("my.txt")
words = "the cat sat on the mat and the dog sat on the log and then the cat saw the dog".split(" ")  # noqa: SIM905
text.write_text(" ".join(words[i * i % len(words)] for i in range(20_000)))

run = default_run("nano")
config = replace(
    run,
    data=DataConfig(source=str(text), context=64),
    train=replace(
        run.train, steps=60, batch_size=8, micro_batch_size=8, warmup_steps=10, evaluate_every=30, sample_tokens=0
    ),
)
result = train(config, out="my_run")
print(f"{result.status} after {result.step} steps, {result.tokens:,} tokens")
print(f"validation: {result.bits_per_byte:.3f} bits per byte (8 before training)")

# Everything about the run lies in its folder; the same call with more steps goes on from there.
losses = [line["loss"] for line in read_metrics(Path("my_run")) if "loss" in line]
print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last")

trained = load_model("my_run")
print("the cat" + "".join(stream_text(trained.model, trained.tokenizer, "the cat", GREEDY, max_tokens=40)))
assert result.bits_per_byte < 3

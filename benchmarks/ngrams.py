"""What counting scores on RegBench: the letter that most often followed the last n tokens in the example so far.

    python benchmarks/ngrams.py --out benchmarks/results/regbench-ngrams.json

Where the last n tokens of the word, its beginning being one, did not come before, the last n - 1 decide, and so on: a back-off n-gram model, as
Akyürek et al. 2024 (arXiv 2401.12973) compare theirs with. Of letters that are as frequent the first seen counts. Takes a minute on a CPU;
the examples are the suite's test set. A model that has learned to look n tokens back stands where its row does.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltanet.data.synthetic import IGNORED, Examples, RegularLanguages

ORDERS = range(7)


def predict(examples: Examples, separator: int, back: int) -> Tensor:
    """The letters int64 `[N, T]` that counting predicts from up to `back` tokens; 0 where nothing is known or asked."""
    found = torch.zeros_like(examples.targets)
    for row, (tokens, targets) in enumerate(zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True)):
        last = max(t for t, target in enumerate(targets) if target != IGNORED)
        # By the tokens that came before, as many as their length: how often each letter followed. As if a separator stood in front.
        followed: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        word = (separator,)
        for t in range(last + 1):
            letter = tokens[t]
            if letter == separator:
                word = (separator,)
            else:
                for n in range(min(back, len(word)) + 1):
                    followed[word[len(word) - n :]][letter] += 1
                word = (*word, letter)[-max(back, 1) :]
            if targets[t] != IGNORED:
                known = (followed.get(word[len(word) - n :]) for n in range(min(back, len(word)), -1, -1))
                counts = next((counts for counts in known if counts), None)
                found[row, t] = 0 if counts is None else max(counts, key=counts.__getitem__)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    task = RegularLanguages(truncate=512)
    examples = task.sample(options.examples, seed=options.seed, split="test")
    rows = []
    for back in ORDERS:
        score = float(task.score(predict(examples, task.separator, back), examples))
        rows.append({"tokens": back, "score": 100 * score})
        print(f"up to {back} tokens back: {100 * score:.1f}%", flush=True)
    if options.out is not None:
        record = {"measure": "predictions that are allowed, %", "examples": options.examples, "seed": options.seed, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

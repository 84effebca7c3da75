"""Does a run of builtin:emoji draw what prompts say? A table for names that it was trained on, and
for those held out.

    python benchmarks/quality/text_retrieval.py RUN [--names 80] [--per-name 2] [--seed 0] [--out
    results.json]

Per group, images are drawn for the captions of NAMES names, and the most similar real pictures of
the group are found by features of EfficientNet, which no training saw. Groups: `training`: names
that were trained on in all styles;
`pair`: names of which one style is held out; `name`: names held out in all styles. Beside the run
stand: chance; the same images against shuffled captions; and `lookup`, the training picture whose
caption has the most similar pooled vector, which draws nothing. In the group `training` the lookup
finds the picture itself.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from diffussm_cli import runs
from diffussm_cli.config import config_from_dict, to_dict
from diffussm_cli.data.emoji import NAME, PAIR, TRAINING, read_emoji, split_emoji
from diffussm_cli.evaluation.extractors import load_extractor
from diffussm_cli.evaluation.text import retrieval
from diffussm_cli.machine.files import write_text
from diffussm_cli.sampling.sampler import open_sampler

SHOWN = ("top1", "top5", "category")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--names", type=int, default=80, help="names per group")
    parser.add_argument(
        "--per-name", type=int, default=2, help="images per name, each for another caption of it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image of each group")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, help="also write the numbers there, as JSON")
    arguments = parser.parse_args()

    trained = runs.find_run(arguments.run)
    changes = {f"sample.{k}": getattr(arguments, k) for k in ("guidance", "steps")}
    changes = {k: v for k, v in changes.items() if v is not None}
    sampling = config_from_dict(to_dict(trained.config), "RUN", fields=changes).sample
    sampler = open_sampler(trained, sampling, precision="fp32")
    extractor = load_extractor("efficientnet", None, sampler.device)
    emoji = read_emoji()
    part = split_emoji(emoji)
    groups = {}
    for group in (TRAINING, PAIR, NAME):
        groups[group] = measure(
            sampler,
            extractor,
            emoji,
            part,
            group,
            arguments.names,
            arguments.per_name,
            arguments.seed,
        )
        for source, values in groups[group].items():
            print(
                f"{group:9} {source:9}",
                *(f"{name} {100 * values[name]:5.1f}%" for name in SHOWN),
                flush=True,
            )
    if arguments.out:
        facts = {
            "run": str(arguments.run),
            "step": trained.step,
            "names": arguments.names,
            **vars(sampling),
        }
        write_text(arguments.out, json.dumps({**facts, "groups": groups}, indent=1) + "\n")


def measure(
    sampler, extractor, emoji, part, group, most, per_name, seed
) -> dict[str, dict[str, float]]:
    """Retrieval of the run, of shuffled captions, of the lookup and of chance, for one group of
    names.
    """
    known = set(emoji.names[part == group])
    if group == TRAINING:
        known -= set(emoji.names[part != TRAINING])
    names = np.random.default_rng(0).permutation(sorted(known))[:most]
    places = [np.flatnonzero(emoji.names == name)[0] for name in names]
    captions = [[c for c in emoji.captions[i] if c] for i in places]
    asked = [
        (name, texts[k % len(texts)])
        for k in range(per_name)
        for name, texts in zip(names, captions)
    ]
    names_asked, prompts = map(list, zip(*asked))
    candidates = np.flatnonzero(np.isin(emoji.names, names) & (part == group))

    drawn = [
        images
        for _, images in sampler.draw(range(seed, seed + len(prompts)), None, sampler.text(prompts))
    ]
    real = features(extractor, emoji.images[candidates])
    against = (real, emoji.names[candidates].tolist(), emoji.categories[candidates].tolist())
    pool = features(extractor, torch.cat(drawn).numpy())
    looked_up = features(extractor, emoji.images[lookup(sampler, emoji, part, prompts)])
    run = retrieval(pool, names_asked, *against)
    return {
        "run": run,
        # the neighbour is another name
        "shuffled": retrieval(pool, np.roll(names_asked, 1).tolist(), *against),
        "lookup": retrieval(looked_up, names_asked, *against),
        "chance": {name: run[f"chance_{name}"] for name in SHOWN},
    }


def lookup(sampler, emoji, part, prompts) -> np.ndarray:
    """The training picture whose caption is the most similar one to each prompt."""
    rows, captions = zip(
        *((i, c) for i in np.flatnonzero(part == TRAINING) for c in emoji.captions[i] if c)
    )
    texts = sampler.text.texts
    similarity = texts(prompts)[:, 0] @ texts(list(captions))[:, 0].T
    return np.array(rows)[similarity.argmax(1).numpy()]


def features(extractor, pixels: np.ndarray) -> torch.Tensor:
    """uint8 (n, C, H, W) -> pool features (n, d)."""
    return torch.cat(
        [extractor(torch.from_numpy(p)).pool for p in np.array_split(pixels, -(-len(pixels) // 64))]
    )


if __name__ == "__main__":
    main()

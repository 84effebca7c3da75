"""Batches are functions of (seed, step)."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import torch
from PIL import Image

from diffussm_cli.config import ModelConfig
from diffussm_cli.data.opening import open_source
from diffussm_cli.data.source import captions_of
from diffussm_cli.machine.processes import World
from diffussm_cli.training import batches as module
from diffussm_cli.training.batches import batches, image_seeds, indices_at, make_batch


def same(a, b):
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b))
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_every_epoch_visits_each_image_once_in_another_order():
    first, second = indices_at(0, 0, 10, 10), indices_at(0, 10, 10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)
    assert list(first) != list(indices_at(1, 0, 10, 10))


def test_positions_do_not_depend_on_how_they_are_asked_for():
    whole = indices_at(3, 0, 60, 7)  # across epochs
    parts = np.concatenate([indices_at(3, p, 4, 7) for p in range(0, 60, 4)])
    assert np.array_equal(whole, parts)


def test_resumed_batches_equal_uninterrupted_ones(tiny):
    config = tiny("train.steps=6")
    source = open_source(config)
    straight = list(batches(source, config, 0))
    resumed = list(batches(source, config, 4))
    assert len(straight) == 6
    assert same(straight[4], resumed[0])
    assert same(straight[5], resumed[1])
    assert not torch.equal(straight[0].noise, straight[1].noise)
    assert not torch.equal(straight[0].t, straight[1].t)


def test_labels_are_dropped_at_the_requested_rate(tiny):
    config = tiny("train.batch_size=1000", "train.label_dropout=0.3")
    batch = make_batch(open_source(config), config, 0)
    assert 250 < int((batch.y == 10).sum()) < 350
    unconditional = tiny("model.num_classes=0")
    assert make_batch(open_source(unconditional), unconditional, 0).y is None


def test_timesteps_cover_all_and_noise_is_normal(tiny):
    config = tiny("train.batch_size=4000", "diffusion.timesteps=10", "sample.steps=4")
    batch = make_batch(open_source(config), config, 0)
    assert batch.t.unique().tolist() == list(range(10))
    assert abs(float(batch.noise.std()) - 1) < 0.01


def test_timesteps_of_flow_are_functions_of_seed_step_and_place(tiny):
    """Of two processes each draws its part; other draws leave the images as they are."""
    flow = ("diffusion.objective=flow", "model.learn_sigma=false", "sample.sampler=euler")
    config = tiny(*flow, "diffusion.timesteps_drawn=logit_normal")
    source = open_source(config)
    whole = make_batch(source, config, 3)
    parts = [make_batch(source, config, 3, World(rank, 2)).t for rank in (0, 1)]
    assert whole.t.dtype == torch.float32
    assert torch.equal(torch.cat(parts), whole.t)
    assert len(whole.t.unique()) == 8
    assert torch.equal(make_batch(source, tiny(), 3).x_0, whole.x_0)


def test_seeds_of_images_do_not_collide():
    seeds = [s for a in range(10) for b in range(10) for s in image_seeds(a, b, 25)]
    assert len(set(seeds)) == len(seeds) == 2500
    assert all(0 <= s < 2**63 for s in seeds)


def test_parts_of_processes_make_up_the_batch(tiny, tmp_path):
    """Flips too, of images in memory and in files; of latents see tests/data/test_latents.py."""
    for i in range(10):
        Image.fromarray(np.arange(i, 64 + i, dtype=np.uint8).reshape(8, 8)).save(
            tmp_path / f"{i}.png"
        )
    for more in ([], [f"data.path={tmp_path}", "model.num_classes=0"]):
        config = tiny("data.flip=true", *more)
        source = open_source(config)
        whole = make_batch(source, config, 1)
        parts = [make_batch(source, config, 1, World(rank, 2)) for rank in range(2)]
        assert [len(p.t) for p in parts] == [4, 4]
        for name in ("x_0", "t", "noise", *(["y"] if config.model.num_classes else [])):
            assert torch.equal(
                torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)
            ), name


def test_process_draws_only_its_own_part(tiny, monkeypatch):
    """Of a batch of 8 on two processes, no more than 4 images are read, and noise is drawn for no
    more than 4.
    """
    config = tiny("data.flip=true")
    source, drawn, randn = open_source(config), [], torch.randn
    monkeypatch.setattr(
        torch, "randn", lambda *shape, **k: drawn.append(randn(*shape, **k)) or drawn[-1]
    )
    read = source.read
    monkeypatch.setattr(
        source, "read", lambda indices, generators: drawn_for(read, indices, generators, 4)
    )
    make_batch(source, config, 0, World(1, 2))
    assert sum(x.numel() for x in drawn) == 4 * 64


def drawn_for(read, indices, generators, n):
    assert len(indices) == len(generators) == n
    return read(indices, generators)


class AtOnce:
    """A pool that works when it is asked to."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_next_two_batches_are_requested_while_one_is_used(tiny, monkeypatch):
    made, make = [], module.make_batch
    monkeypatch.setattr(module, "helpers", AtOnce)
    monkeypatch.setattr(module, "make_batch", lambda *a: made.append(a[2]) or make(*a))
    config = tiny("train.steps=5")
    stream = batches(open_source(config), config, 0)
    asked = [list(made) for _ in stream]
    assert asked == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_batches_are_made_ahead(tiny, monkeypatch):
    """No more than three of them, and none beyond the end, whatever the thread has done when the
    reader stops.
    """
    config = tiny("train.steps=5")
    made = []
    make = module.make_batch
    monkeypatch.setattr(module, "make_batch", lambda *a: made.append(a[2]) or make(*a))
    stream = batches(open_source(config), config, 0)
    next(stream)
    stream.close()  # waits for the thread
    assert made[0] == 0
    assert made == list(range(len(made)))
    assert len(made) <= 3
    made.clear()
    assert len(list(batches(open_source(config), config, 2))) == 3
    assert made == [2, 3, 4]


def test_captions_are_drawn_last_and_dropped_at_the_requested_rate(captioned):
    config = captioned("train.batch_size=600", "train.label_dropout=0.3", "model.text_tokens=2")
    source = open_source(config)
    batch = make_batch(source, config, 0)
    without = make_batch(source, dataclasses.replace(config, model=ModelConfig(num_classes=0)), 0)
    assert same(dataclasses.replace(batch, text=None), without)
    assert batch.text.shape == (600, 3, 4)
    dropped = ~batch.text.flatten(1).any(1)
    assert 130 < int(dropped.sum()) < 230
    indices = indices_at(0, 0, 600, 12)
    times = {0: 0, 1: 0}
    for i, text in zip(indices[~dropped.numpy()], batch.text[~dropped]):
        (which,) = [
            k for k, own in enumerate(source.texts(source.captions_of(i))) if torch.equal(own, text)
        ]
        times[which] += 1
    assert min(times.values()) > 150
    moved = batch.each(lambda tensor: tensor + 1)
    assert torch.equal(moved.text, batch.text + 1)


def test_captions_of_previews_are_spread_over_source_and_fixed(captioned):
    source = open_source(captioned())
    shown = captions_of(source, 4).captions
    assert torch.equal(shown, captions_of(source, 4).captions)
    for i, text in zip((0, 3, 6, 9), shown):
        assert any(torch.equal(text, own) for own in source.texts(source.captions_of(i)))

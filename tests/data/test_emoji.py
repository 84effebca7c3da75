"""The built-in emoji: what is held out, and a file that is missing or of another kind."""

import numpy as np
import pytest
import torch

from diffussm_cli.data import builtin
from diffussm_cli.data.emoji import NAME, PAIR, TRAINING, emoji_file, read_emoji, split_emoji
from diffussm_cli.errors import ConfigError, DataError


def test_eighty_names_and_four_percent_of_the_rest_are_held_out(emoji):
    part = split_emoji(emoji)
    assert {p: int((part == p).sum()) for p in (TRAINING, PAIR, NAME)} == {
        TRAINING: 422,
        PAIR: 18,
        NAME: 160,
    }
    names = {p: set(emoji.names[part == p].tolist()) for p in (TRAINING, PAIR, NAME)}
    assert len(names[NAME]) == 80
    assert not names[NAME] & (names[TRAINING] | names[PAIR])
    assert len(names[PAIR]) == 18
    assert names[PAIR] < names[TRAINING]
    assert {"thing 7", "thing 8"} < names[TRAINING]  # they share their pictures


def test_split_is_reproducible_and_takes_both_styles(emoji):
    part = split_emoji(emoji)
    assert np.array_equal(part, split_emoji(read_emoji()))
    assert set(emoji.styles[part == PAIR]) == {"google", "twitter"}
    assert np.unique(emoji.names[part == NAME])[:3].tolist() == [
        "thing 0",
        "thing 102",
        "thing 105",
    ]


def test_name_of_one_style_is_held_out_as_name_or_not_at_all(emoji):
    half = emoji._replace(images=emoji.images[:300:2], names=emoji.names[:300:2])
    assert set(split_emoji(half)) == {TRAINING, NAME}


def test_names_that_share_a_picture_are_never_held_out(emoji):
    same = emoji._replace(images=np.repeat(emoji.images[:150], 4, 0))
    assert (split_emoji(same) == TRAINING).all()


def test_emoji_are_loaded_with_names_and_captions(emoji):
    train = builtin.load("emoji", (32, 32), 3)
    held_out = builtin.load("emoji", None, held_out=True)
    assert (len(train), len(held_out), train.class_names) == (422, 178, ("Flags", "Food"))
    for part, kept in ((train, [TRAINING]), (held_out, [PAIR, NAME])):
        places = np.flatnonzero(np.isin(split_emoji(emoji), kept))
        assert np.array_equal(part.images.numpy(), emoji.images[places])
        assert part.names == tuple(emoji.names[places].tolist())
        assert part.labels.tolist() == (emoji.categories[places] == "Food").tolist()
        expected = [(f"thing {i // 2}", "a thing")[: 1 if i % 4 else 2] for i in places]
        assert part.captions == tuple(expected)
    x, labels = train.read([0], [torch.Generator()])
    assert x.shape == (1, 3, 32, 32)
    assert labels.dtype == torch.int64


def test_bad_request_or_file_is_one_line_error(emoji):
    with pytest.raises(
        ConfigError, match="builtin:emoji is 32x32 with data.channels 3, not 32x32 with 1"
    ):
        builtin.load("emoji", (32, 32), 1)
    again = "emoji.npz does not hold emoji; run again: python tools/fetch_emoji.py"
    for change in (
        {"images": emoji.images[:9]},
        {"names": np.arange(600)},
        {"captions": emoji.captions[:, 0]},
    ):
        np.savez(emoji_file(), **emoji._asdict() | change)
        with pytest.raises(DataError, match=again):
            read_emoji()
    np.savez(emoji_file(), x=np.zeros(3))
    with pytest.raises(DataError, match=again):
        read_emoji()
    emoji_file().write_bytes(b"PK")
    with pytest.raises(DataError, match="emoji.npz: cannot be read as .npz"):
        read_emoji()
    emoji_file().unlink()
    with pytest.raises(
        DataError, match="builtin:emoji is not at .*emoji.npz; run: python tools/fetch_emoji.py"
    ):
        read_emoji()

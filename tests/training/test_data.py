"""How images that cannot be read are named."""

import pytest

from diffussm_cli.training.data import reasons_in_words

EMBED = "embed the files"
WORDS = {  # reasons, and the line about them
    "one image": ([("a", "is a path; embed the files")], "a: is a path; embed the files"),
    "one remedy": (
        [("a", f"is a path, 'x'; {EMBED}"), ("b", f"is a path, 'y'; {EMBED}")],
        "a: is a path, 'x'; b: is a path, 'y'; embed the files",
    ),
    "two remedies": (
        [("a", f"is a path; {EMBED}"), ("b", "is too large; make it smaller")],
        "a: is a path; embed the files; b: is too large; make it smaller",
    ),
    "a remedy of one": (
        [("a", f"is a path; {EMBED}"), ("b", "not a PNG")],
        "a: is a path; embed the files; b: not a PNG",
    ),
    "no remedy": ([("a", "not a PNG"), ("b", "not a JPEG")], "a: not a PNG; b: not a JPEG"),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_remedy_of_all_images_stands_once(case):
    reasons, line = WORDS[case]
    assert reasons_in_words(reasons) == line

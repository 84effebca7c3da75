"""Published figures beside ours."""

import pytest

from diffussm_cli.profiling import paper


def test_every_published_row_of_dit():
    """Within 0.3%, or within the rounding of the table's two decimals."""
    rows = list(paper.dit_rows())
    assert len(rows) == 13
    for row in rows:
        assert abs(row.difference) < 3e-3 or abs(row.ours - row.published) <= 5e-3, row


def test_training_compute_of_the_paper():
    rows = {row.name: row for row in paper.training_rows()}
    assert [round(rows[n].implied, 1) for n in ("xl-256", "dit-xl-256", "xl-512", "dit-xl-512")] == [
        280.3,
        118.9,
        1066.2,
        524.7,
    ]
    assert rows["xl-256"].difference == pytest.approx(295.66 / 280.3 - 1, abs=1e-3)
    assert rows["xl-512"].difference == pytest.approx(1182.43 / 1066.2 - 1, abs=1e-3)
    assert abs(rows["dit-xl-256"].difference) < 3e-3
    assert abs(rows["dit-xl-512"].difference) < 3e-3
    assert "2.5 times" in paper.sentence()


def test_differences_are_relative_to_what_was_printed():
    for row in paper.dit_rows():
        assert row.difference == row.ours / row.published - 1
    for row in paper.training_rows():
        assert row.ours == row.forward * row.images
        assert row.difference == row.ours / row.printed - 1

"""A few kills of kill_test.py, for every run of the tests: `pytest tests/test_kill.py`. More of them by hand."""

import pytest
from kill_test import kill_stages


@pytest.mark.slow
def test_killed_runs_end_as_whole_ones():
    """Killed anywhere, inside a save and inside the writing of the final weights, a run ends bit for bit as if left
    alone."""
    moments = kill_stages(["pretrain"], kills=3, seed=0, steps=8)["pretrain"]
    assert moments.total() >= 3
    assert moments["inside a save (final weights)"] >= 1, moments

"""A few kills of kill_test.py, for every run of the tests: `pytest tests/test_kill.py`. More of them by hand."""

import pytest

from tests.kill_test import STAGES, kill_stages


def test_killed_runs_end_as_whole_ones():
    """Killed anywhere, inside a save and inside the writing of the final weights, a run ends bit for bit as if left
    alone."""
    moments = kill_stages(["pretrain"], kills=3, seed=0, steps=8)["pretrain"]
    assert moments.total() >= 3
    assert moments["inside a save (final weights)"] >= 1, moments


@pytest.mark.slow
def test_so_do_those_of_every_stage():
    """With dropout, a MoE, recomputed activations, a reference, a teacher; compiled too."""
    stages = [stage for stage in STAGES if stage not in ("pretrain", "unlikelihood")]  # that is in its own file
    moments = kill_stages(stages, kills=2 * len(stages), seed=1, steps=8)
    assert all(moments[stage].total() >= 2 for stage in stages)

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
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_so_do_those_of_every_stage(compiled):
    """With dropout, a MoE, recomputed activations, a reference, a teacher."""
    stages = [stage for stage in STAGES if stage not in ("pretrain", "unlikelihood")]  # that is in its own file
    stages = [stage for stage in stages if stage.endswith("_compiled") == compiled]
    each = 1 if compiled else 2
    moments = kill_stages(stages, kills=each * len(stages), seed=1, steps=8)
    assert all(moments[stage].total() >= each for stage in stages)

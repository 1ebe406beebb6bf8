"""The plan's memory formula against what autograd really keeps, and the command's output."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.model import PRESETS, MiniMindConfig, MiniMindLM
from scripts.plan import MODES, activation_bytes, block_bytes, largest_batch, sizes_of, state_memory
from tests.helpers import next_token_loss

ROOT = Path(__file__).resolve().parent.parent


def kept_bytes(config: MiniMindConfig, batch: int, length: int, checkpointing: bool) -> int:
    """Of the distinct storages that a forward keeps for the backward, without the weights."""
    torch.manual_seed(0)
    model = MiniMindLM(config).train()
    model.activation_checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[torch.Tensor] = []
    ids = torch.randint(16, config.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        next_token_loss(model, ids, ids)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("batch, length", [(2, 64), (4, 192), (1, 384)])
def test_blocks_keep_what_the_formula_says(experts, batch, length):
    shape = dict(hidden_size=128, num_hidden_layers=3, intermediate_size=256, qk_norm=True, vocab_size=320)
    config = MiniMindConfig(**shape, num_experts=experts, num_shared_experts=experts // 4)
    deeper = MiniMindConfig(**shape | {"num_hidden_layers": 5}, num_experts=experts, num_shared_experts=experts // 4)
    measured = (kept_bytes(deeper, batch, length, False) - kept_bytes(config, batch, length, False)) / 2
    assert block_bytes(config, batch * length, False) == pytest.approx(measured, rel=0.2)


def test_checkpointed_blocks_keep_their_input():
    shape = dict(hidden_size=128, intermediate_size=256, vocab_size=320)
    three, five = (kept_bytes(MiniMindConfig(**shape, num_hidden_layers=n), 2, 64, True) for n in (3, 5))
    assert (five - three) / 2 == pytest.approx(2 * 64 * 128 * 4, rel=0.2)


def test_the_modes_hold_less_and_less():
    config = PRESETS["base"]
    sizes = sizes_of(config, "adamw")[1]
    states = {mode: state_memory(mode, sizes, 8, True) for mode in MODES}
    assert states["DDP"] > states["one GPU"] > states["ZeRO-1"] > states["ZeRO-2"] > states["ZeRO-3"]
    assert state_memory("ZeRO-3", sizes, 10**9, True) < 20 * sizes.largest_block
    assert sizes.optimizer == 8 * sizes.parameters  # two fp32 values each


def test_the_largest_batch_fits_and_one_more_does_not():
    config, free = PRESETS["nano"], 3e9
    batch = largest_batch(config, 512, free, True)
    assert activation_bytes(config, batch, 512, True, True) <= free
    assert activation_bytes(config, batch + 1, 512, True, True) > free
    assert largest_batch(config, 512, 0, True) == largest_batch(config, 512, -1e9, True) == 0


@pytest.mark.slow
def test_command(tmp_path):
    def plan(*flags):
        return subprocess.run([sys.executable, "scripts/plan.py", *flags], capture_output=True, text=True, cwd=ROOT)

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "' + "x" * 7987 + '"}\n')
    done = plan("--gpus", "8", "--price", "0.25", "--data_path", str(tmp_path / "data"), "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert all(f"\n{mode} " in done.stdout for mode in MODES)
    assert "4,000 tokens" in done.stdout
    done = plan("--data_path", str(tmp_path / "none"))
    assert done.returncode == 2 and "--data_path" in done.stderr and done.stderr.count("\n") == 1

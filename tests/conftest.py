"""Fixtures that several test files share."""

import os

import pytest
import torch

from model.model import MiniMindConfig, MiniMindLM


def pytest_collection_modifyitems(items):
    for item in items:
        if os.name != "posix" and item.get_closest_marker("posix"):
            item.add_marker(pytest.mark.skip(reason="needs a POSIX system"))


@pytest.fixture
def tiny():
    """tiny(**config) -> a small random model in eval mode; its logits are of order 1, its norm weights not all 1."""

    def build(seed: int = 0, **changes) -> MiniMindLM:
        shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        values = dict(intermediate_size=96, vocab_size=320, initializer_range=0.2)
        torch.manual_seed(seed)
        model = MiniMindLM(MiniMindConfig(**(shape | values | changes))).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 1:
                    p.uniform_(0.5, 1.5)
        return model

    return build

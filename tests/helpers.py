"""What several test files compute."""

import torch
from torch import Tensor

from trainer.speed import cross_entropy


def next_token_loss(model, input_ids: Tensor, labels: Tensor, **options) -> Tensor:
    """Cross-entropy with labels (B, T), -100 = none, and a MoE's balancing loss, as the train scripts write it."""
    out = model(input_ids, logits_at=labels != -100, **options)
    return cross_entropy(out.logits, labels[labels != -100]) + out.aux_loss


def shifted(input_ids: Tensor) -> Tensor:
    """Labels of every position: the token that follows, the first one again at the end."""
    return torch.roll(input_ids, -1, 1)

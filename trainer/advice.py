"""What a run says at its end: whether it has learnt at all, what is normal, what comes next.

The figures of the starter corpus are those of docs/experiments/quickstart.md and lifecycle.md.
"""

import math
from typing import NamedTuple

FEW_STEPS = 20
ENOUGH_STEPS = 60  # that the suggestion leads to
MOVED = 0.98  # a mean loss of the last ten steps above this share of that of the first ten has hardly moved


class Stage(NamedTuple):
    normal: str  # on the starter corpus
    own: str  # how to judge on data of one's own
    next: str


CHAT = "python eval_model.py --weight {name}"
FALLS = "the validation loss falls to the end"
STAGES = {
    "pretrain": Stage(
        "0.40 to 0.50 bits per byte (1.0 on a slow machine)",
        f"{FALLS}, from 8.8 of random weights to below 3; a small model goes on learning for days",
        "python train_full_sft.py --from_weight {name}",
    ),
    "full_sft": Stage(
        "0.02 to 0.04 bits per byte, 93 to 96 % of the held-out questions right",
        f"{FALLS}; if it rises while the training loss falls, take fewer epochs",
        CHAT,
    ),
    "lora": Stage(
        "a training loss below 0.1; about 70 % of the new questions right, the other skills stay",
        "the training loss falls well below where it began; if answers to all else change too, take fewer steps",
        "python eval_model.py --lora_name {name}",
    ),
    "dpo": Stage(
        "held-out pairs ranked right: 71 % before, 92 % after",
        "the loss falls from 0.69, the accuracy on held-out pairs rises; answers that get odd: fewer steps",
        CHAT,
    ),
    "distill": Stage(
        "0.89 bits per byte after 45 steps, 0.3 after 150; the same student from labels alone is 2 % behind",
        f"{FALLS}, and below that of a student with --alpha 1, which has no teacher",
        CHAT,
    ),
    "reason": Stage(
        "34 % of the problems solved without thinking, 95 % with it",
        f"{FALLS}; problems are learnt by heart in few epochs",
        "python eval_model.py --weight {name} --thinking 1",
    ),
    "unlikelihood": Stage(
        "the share of `repeats` in the log falls, the validation loss stays within a few per cent",
        "the share of `repeats` in the log falls, the validation loss stays within a few per cent",
        "python eval_model.py --model_mode 0 --weight {name}",
    ),
}


def advice(
    method: str, name: str, out_dir: str, own_data: bool, steps: int, rows: int, batch: int, first: list, last: list
) -> list[str]:
    """Lines about a run of `steps` steps on `rows` rows, `batch` of them a step, with the losses of its first and its
    last steps. name: of the weights or the adapter; out_dir: the flag, if the next command needs it."""
    lines = []
    fault = _learnt_little(steps, first, last)
    if fault:
        lines.append(f"note: {fault}: the model has hardly changed. {_more(rows, batch)}")
    known = STAGES.get(method.partition("/")[0])
    if known:
        normal = f"a good sign with data of your own: {known.own}" if own_data else f"normal here: {known.normal}"
        lines += [normal, f"next: {known.next.format(name=name)}{out_dir}"]
    return lines


def _learnt_little(steps: int, first: list[float], last: list[float]) -> str | None:
    if steps < FEW_STEPS:
        return f"only {steps} step{'s' * (steps != 1)}"
    if not first or not last:
        return None
    before, after = sum(first) / len(first), sum(last) / len(last)
    if after > MOVED * before:
        return f"the loss went from {before:.3f} to {after:.3f} only"
    return None


def _more(rows: int, batch: int) -> str:
    """Flags that give the model ENOUGH_STEPS on so few rows, in place of one step that holds each row many times."""
    smaller = min(batch, max(1, rows // 4))
    epochs = max(2, math.ceil(ENOUGH_STEPS * smaller / rows))
    fewer = f"--batch_size {smaller} --accumulation_steps 1 " if smaller < batch else ""
    return f"Train longer, for instance {fewer}--epochs {epochs} (with {rows} row{'s' * (rows != 1)} of --max_seq_len)"

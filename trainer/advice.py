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
REWARDED = "reward and held-out answers rise, what was known before stays; the loss says nothing"
NO_FALL = ("unlikelihood", "grpo", "ppo", "agent")  # whose losses need not fall
STAGES = {
    "pretrain": Stage(
        "0.6 to 0.9 bits per byte (1.0 on a slow machine)",
        f"{FALLS}, from 8.8 of random weights to below 3; a small model goes on learning for days",
        "python train_full_sft.py --from_weight {name}",
    ),
    "full_sft": Stage(
        "0.05 to 0.09 bits per byte (0.16 on a slow machine; 0.09 to 0.22 with --decay 0), 76 to 96 % of the held-out "
        "questions right",
        f"{FALLS}; if it rises while the training loss falls, take fewer epochs",
        CHAT,
    ),
    "lora": Stage(
        "a training loss below 0.1; about 70 % of the new questions right, the other skills stay",
        "the training loss falls well below where it began; if answers to all else change too, take fewer steps",
        "python eval_model.py --lora_name {name}",
    ),
    "dpo": Stage(
        "held-out pairs ranked right: 57 to 71 % before, 82 to 92 % after",
        "the loss falls from 0.69, the accuracy on held-out pairs rises; answers that get odd: fewer steps",
        CHAT,
    ),
    "distill": Stage(
        "1.2 bits per byte after its half minute; the same student from labels alone is 2 % behind",
        f"{FALLS}, and below that of a student with --alpha 1, which has no teacher",
        CHAT,
    ),
    "reason": Stage(
        "20 to 35 % of the problems solved at once, 70 to 95 % with thinking",
        f"{FALLS}; problems are learnt by heart in few epochs",
        "python eval_model.py --weight {name} --thinking 1",
    ),
    "grpo": Stage(REWARDED, REWARDED, "python eval_model.py --weight {name} --thinking 1"),
    "ppo": Stage(REWARDED, REWARDED, "python eval_model.py --weight {name} --thinking 1"),
    "agent": Stage(REWARDED, REWARDED, "python eval_model.py --weight {name} --tools 1"),
    "unlikelihood": Stage(
        "the share of `repeats` in the log falls, the validation loss stays within a few per cent",
        "the share of `repeats` in the log falls, the validation loss stays within a few per cent",
        "python eval_model.py --model_mode 0 --weight {name}",
    ),
}


class Outcome(NamedTuple):
    """Of a run, for advice()."""

    steps: int
    rows: int  # of the data, packed
    batch: int  # rows of a step
    first: list[float]  # losses of the first ten steps
    last: list[float]  # and of the last ten
    own_data: bool
    validated: bool
    limits: str = ""  # the flags that would end a run of more epochs


def advice(method: str, name: str, flags: str, outcome: Outcome) -> list[str]:
    """Lines for the end. name: of the weights or the adapter; flags: what the next command needs beside it."""
    lines = []
    fault = learnt_little(outcome, method not in NO_FALL)
    if fault:
        lines.append(f"note: {fault}: little can have been learnt. {_more(outcome)}")
    known = STAGES.get(method.partition("/")[0])
    if known and outcome.own_data:
        measure = "" if outcome.validated else "; --val_path FILE, rows kept apart, measures it"
        lines.append(f"a good sign with data of your own: {known.own}{measure}")
    elif known:
        lines.append(f"normal here: {known.normal}")
    return lines + [f"next: {known.next.format(name=name)}{flags}"] if known else lines


def learnt_little(outcome: Outcome, loss_falls: bool = True) -> str | None:
    """Why the run cannot have taught much; None if it may have. loss_falls: that it should, for what is taught."""
    steps, first, last = outcome.steps, outcome.first, outcome.last
    if steps < FEW_STEPS:
        return f"only {steps} step{'s' * (steps != 1)}"
    before, after = (sum(losses) / max(len(losses), 1) for losses in (first, last))
    if loss_falls and after > MOVED * before:
        return f"the loss went from {before:.3f} to {after:.3f} only"
    return None


def _more(outcome: Outcome) -> str:
    """Flags that give ENOUGH_STEPS on few rows, in place of a step that holds each row many times."""
    rows, batch = outcome.rows, outcome.batch
    smaller = min(batch, max(1, rows // 4))
    enough = math.ceil(ENOUGH_STEPS * smaller / rows)
    twice = math.ceil(2 * outcome.steps * batch / rows) if outcome.steps >= FEW_STEPS else 1
    epochs = max(enough, twice)
    fewer = f"--batch_size {smaller} " * (smaller < batch)
    without = f"; leave out {outcome.limits}" if outcome.limits else ""
    filled = f"the data fills {rows} row{'s' * (rows != 1)}{without}"
    return f"Train longer, for instance with {fewer}--epochs {epochs} ({filled})"

"""What the policy-gradient scripts share: rollouts as training batches, log-probabilities, advantages, exact KL.

batches = policy_batches(rollouts, {"advantages": ...}, "tokens", run)
for batch in run.accumulate(batches):
    log_probs, distribution, out = token_log_probs(run.model, batch)
"""

import torch
from torch import Tensor, nn

from dataset.lm_dataset import IGNORE
from dataset.packing import PADDING
from trainer.rollout import Rollout
from trainer.run import Run


def group_advantages(rewards: list[float], by_deviation: bool) -> list[float]:
    """R - mean of the group (Liu et al. 2025, arXiv:2503.20783); by_deviation: divided by the group's standard
    deviation (of a sample, plus 1e-4), as GRPO has it (Shao et al. 2024, arXiv:2402.03300)."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    centred = rewards - rewards.mean()
    if by_deviation and len(rewards) > 1:
        centred = centred / (rewards.std() + 1e-4)
    return centred.tolist()


def advantages_of(groups: list[list[Rollout]], by_deviation: bool) -> list[list[float]]:
    """Of each sampled token of each rollout, in the order of the groups: group_advantages() of its answer."""
    values = []
    for group in groups:
        of_members = group_advantages([rollout.reward for rollout in group], by_deviation)
        values += [[value] * rollout.sampled for value, rollout in zip(of_members, group, strict=True)]
    return values


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates (Schulman et al. 2015, arXiv:1506.02438) of the sampled tokens of one rollout,
    (T,): A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t; after the last token both are 0.
    Tokens that were not sampled are no steps: the estimates are carried over them."""
    advantages, following, value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        following = rewards[t] + gamma * value - values[t] + gamma * lam * following
        advantages[t], value = following, values[t]
    return advantages


def policy_batches(rollouts: list[Rollout], values: dict[str, list[list[float]]], weigh: str, run: Run) -> list[dict]:
    """Rollouts packed into batches of --rows rows of --max_seq_len tokens: all of one shape, as many on each
    process.

    values: for each rollout one number a sampled token, by name; "advantages" for instance. A batch has input_ids,
    labels and segment_ids (B, T) as SFT's, labels where the next token was sampled; and over its N labels, in the order
    of labels[labels != -100]: rollout_of (N,) int64, the number of the rollout in the batch; engine_log_probs (N,); and
    the values by name (N,) fp32. sampled (n,): their number by rollout. weigh: "tokens" or "sequences", the items of
    which a loss is the mean."""
    seq_len, rows = run.args.max_seq_len, run.args.rows
    batches = []
    lines: list[list[int]] = [[]]
    for number, rollout in enumerate(rollouts):  # next fit keeps the order, so that what is computed does not depend on
        if sum(len(rollouts[i].ids) for i in lines[-1]) + len(rollout.ids) > seq_len:  # how lengths are sorted
            lines.append([])
        lines[-1].append(number)
    lines = [line for line in lines if line]
    parts = [lines[at : at + rows] for at in range(0, len(lines), rows)]
    wanted = max(run.processes.gather(len(parts)))
    parts += [[]] * (wanted - len(parts))
    for part in parts:
        batches.append(_pack(rollouts, values, part, seq_len, rows))
        batches[-1]["weight"] = batches[-1]["tokens"] if weigh == "tokens" else len(batches[-1]["sampled"])
    return batches


def _pack(rollouts: list[Rollout], values: dict, lines: list[list[int]], seq_len: int, rows: int) -> dict:
    input_ids = torch.full((rows, seq_len), PADDING)
    labels = torch.full((rows, seq_len), IGNORE)
    segment_ids = torch.zeros(rows, seq_len, dtype=torch.int32)
    sampled, engine = [], []
    flat: dict[str, list[float]] = {name: [] for name in values}
    for row, line in enumerate(lines):
        at = 0
        for segment, number in enumerate(line, 1):
            rollout = rollouts[number]
            ids, trained = torch.tensor(rollout.ids), torch.tensor(rollout.trained)
            n = len(ids)
            input_ids[row, at : at + n], segment_ids[row, at : at + n] = ids, segment
            labels[row, at : at + n - 1] = torch.where(trained[1:], ids[1:], IGNORE)
            sampled.append(rollout.sampled)
            engine += rollout.log_probs
            for name in values:
                flat[name] += values[name][number]
            at += n
    counts = torch.tensor(sampled, dtype=torch.long)
    return {
        "input_ids": input_ids, "labels": labels, "segment_ids": segment_ids, "sampled": counts,
        "rollout_of": torch.repeat_interleave(torch.arange(len(counts)), counts),
        "engine_log_probs": torch.tensor(engine), "tokens": int(counts.sum()),
    } | {name: torch.tensor(numbers) for name, numbers in flat.items()}  # fmt: skip


def token_log_probs(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor, object]:
    """log pi of each sampled token (N,), of the whole vocabulary there (N, vocab), both fp32; what the model gave."""
    labels = batch["labels"]
    at = labels != IGNORE
    out = model(batch["input_ids"], segment_ids=batch["segment_ids"], logits_at=at)
    distribution = out.logits.float().log_softmax(-1)  # (N, vocab)
    return distribution.gather(-1, labels[at][:, None])[:, 0], distribution, out


def aggregate(losses: Tensor, batch: dict, how: str, constant: int) -> Tensor:
    """The mean loss of a batch from one number a token (N,): "token", over all tokens (DAPO; weigh tokens); "sequence",
    over the rollouts of their means (GRPO; weigh sequences); "constant", over the rollouts of their sums divided by
    `constant`, so that a long answer counts as much a token as a short one (Dr. GRPO; weigh sequences)."""
    if how == "token":
        return losses.sum() / max(len(losses), 1)
    share = constant if how == "constant" else batch["sampled"][batch["rollout_of"]]
    return (losses / share).sum() / max(len(batch["sampled"]), 1)


def sequence_mean(values: Tensor, batch: dict) -> Tensor:
    """The mean over its rollout for each token, values (N,) -> (N,), with gradient."""
    sums = values.new_zeros(len(batch["sampled"])).index_add(0, batch["rollout_of"], values)
    return (sums / batch["sampled"])[batch["rollout_of"]]


def kl_divergence(distribution: Tensor, reference: Tensor) -> Tensor:
    """KL(pi || pi_ref) at each token, exact, over the whole vocabulary: log-probabilities (N, vocab) -> (N,)."""
    return (distribution.exp() * (distribution - reference)).sum(-1)


@torch.no_grad()
def entropy(distribution: Tensor) -> Tensor:
    """Mean entropy in nats of log-probabilities (N, vocab); 0 of none."""
    return -(distribution.exp() * distribution).sum() / max(len(distribution), 1)

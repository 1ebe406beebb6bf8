"""Reinforcement learning by groups: several answers to one question; what the better ones did becomes likelier.

python train_grpo.py                                        # starter problems beyond those of train_reason.py
python train_grpo.py --data_path FILE.jsonl --val_path ...  # questions with "answers", "gt", ... (dataset/questions.py)
python eval_model.py --weight grpo --thinking 1

Settings known by a name:
  GRPO     --aggregate sequence --divide_by_deviation 1
  Dr. GRPO --aggregate constant --divide_by_deviation 0
  DAPO     --aggregate token --divide_by_deviation 1 --clip_high 0.28
  GSPO     --ratio sequence --aggregate sequence --divide_by_deviation 1 --clip_low 3e-4 --clip_high 4e-4
  CISPO    --objective cispo --aggregate token --divide_by_deviation 1 --weight_cap 5
In the first update of a rollout the ratio is 1: clipping and the cap act from the second on (--updates_per_rollout).
"""

import copy

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch

from dataset.lm_dataset import question_dataset
from trainer.arguments import arguments
from trainer.policy import (
    advantages_of,
    aggregate,
    entropy,
    kl_divergence,
    policy_batches,
    sequence_mean,
    token_log_probs,
)
from trainer.rewards import REWARDS
from trainer.rl import Figures, add_adapter, add_rollout_flags, check_rollout_flags, draw_rl_curves, fitting, start_of
from trainer.rollout import OneTurn, collect
from trainer.run import Run


def policy_objective(log_probs, old_log_probs, advantages, batch, args):
    """What is to be made large, for each token (N,), and the share of tokens whose gradient is cut off.

    With r = pi / pi_old of the token, or of its whole answer to the power of 1 / length (GSPO, Zheng et al. 2025,
    arXiv:2507.18071):
    grpo (Shao et al. 2024, arXiv:2402.03300; the clip is PPO's, Schulman et al. 2017, arXiv:1707.06347):
        min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    cispo (MiniMax 2025, arXiv:2506.13585): min(r, weight_cap) A log pi, in which only log pi has a gradient: tokens
        that have become much likelier count no more than the cap, and none is left out."""
    log_ratio = log_probs - old_log_probs
    if args.ratio == "sequence":
        # Its value is that of the answer, its gradient reaches each token through its own log-probability.
        log_ratio = sequence_mean(log_ratio, batch).detach() + log_probs - log_probs.detach()
    ratio = log_ratio.exp()
    if args.objective == "cispo":
        cut = ratio.detach() > args.weight_cap
        return ratio.detach().clamp(max=args.weight_cap) * advantages * log_probs, cut
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    cut = torch.where(advantages > 0, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low) & (advantages != 0)
    return torch.minimum(ratio * advantages, clipped * advantages), cut


def grpo_loss(model, batch, old_log_probs, reference, args):
    """Minus the objective, plus beta times the exact KL to the weights that the training began with; log-probabilities
    (N,) of the tokens, without gradient. old_log_probs None: this is the first update of a rollout, which is by the
    weights that sampled it."""
    log_probs, distribution, out = token_log_probs(model, batch)
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    objective, cut = policy_objective(log_probs, old_log_probs, batch["advantages"], batch, args)
    losses = -objective
    metrics = out.metrics | {"clipped": cut.float().sum() / max(len(cut), 1), "entropy": entropy(distribution)}
    if reference is not None:
        with torch.no_grad():
            _, distribution_ref, _ = token_log_probs(reference, batch)
        kl = kl_divergence(distribution if args.beta else distribution.detach(), distribution_ref)
        losses = losses + args.beta * kl
        metrics["kl"] = kl.detach().sum() / max(len(kl), 1)
    loss = aggregate(losses, batch, args.aggregate, args.max_new_tokens)
    return loss + out.aux_loss, metrics, log_probs.detach()


def parse_arguments():
    parser = arguments(
        "grpo", __doc__, from_weight="reason", optimizer="adamw", weight_decay=0.0, batch_size=32, decay=1.0,
        log_interval=1, compile="0",
    )  # fmt: skip
    add = add_rollout_flags(parser)
    parser.set_defaults(updates_per_rollout=2)
    add("--objective", choices=("grpo", "cispo"), default="grpo")
    add("--divide_by_deviation", type=int, choices=(0, 1), default=0, help="1 = advantages in units of their group's")
    add("--aggregate", choices=("token", "sequence", "constant"), default="token", help="every token "
        "counts the same, or every answer, or a token as 1 / max_new_tokens of an answer (default: token)")  # fmt: skip
    add("--ratio", choices=("token", "sequence"), default="token", help="of each token, or one of the whole answer")
    add("--clip_low", type=float, default=0.2, help="grpo: no gain below a ratio of 1 - this")
    add("--clip_high", type=float, default=0.2, help="grpo: no gain above a ratio of 1 + this")
    add("--weight_cap", type=float, default=5.0, help="cispo: the largest ratio itself, not its distance from 1")
    args = parser.parse_args()
    check_rollout_flags(args)
    if args.weight_cap <= 0 or args.clip_low < 0 or args.clip_high < 0:
        raise cli.UsageError("--weight_cap must be above 0, --clip_low and --clip_high at least 0")
    return args


def main():
    args = parse_arguments()
    run = Run(f"lora/{args.lora_name}" if args.lora_name else "grpo", args, minutes=4.0, learning_rate_factor=0.15)
    save = add_adapter(run)
    reference = copy.deepcopy(run.model).eval().requires_grad_(False)
    questions, held_out = run.rows(question_dataset, "reason_rl")
    play = OneTurn(run.tokenizer, REWARDS[args.reward], args)
    questions = fitting(questions, play, args, quiet=not run.processes.is_main)
    figures = Figures(run, held_out, OneTurn(run.tokenizer, REWARDS["right"], args))

    for draw in run.draws(questions):
        if run.validation_due:
            figures.validate()
        collected = collect(run, draw, play)
        figures.collected(collected)
        if not collected.figures["kept"]:
            run.skip("no group has answers of different worth")
            continue
        advantages = advantages_of(collected.groups, args.divide_by_deviation)
        weigh = "tokens" if args.aggregate == "token" else "sequences"
        batches = policy_batches(collected.rollouts, {"advantages": advantages}, weigh, run)
        old_log_probs = []
        for update in range(args.updates_per_rollout):
            for i, batch in enumerate(run.accumulate(batches)):
                old = old_log_probs[i] if update else None
                start = reference if args.beta or i == update == 0 else None  # without beta, only to tell
                loss, metrics, log_probs = grpo_loss(run.model, batch, old, start, args)
                run.backward(loss, batch)
                figures.batch(metrics, log_probs, batch, first=update == 0)
                old_log_probs += [log_probs] * (update == 0)
            run.update(figures.of_update())
    run.average_with(start_of(reference), args.start_share)
    figures.finish()
    run.finish(save)
    draw_rl_curves(run)


if __name__ == "__main__":
    cli.run(main)

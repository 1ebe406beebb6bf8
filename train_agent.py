"""An agent learns to use tools: it calls, reads the result, calls again; what led to right answers becomes likelier.

python train_agent.py                                       # starter tasks, from out/full_sft_*.pth
python train_agent.py --data_path agent_rl_math.jsonl       # {"conversations": [...], "gt": ["42"]}, MiniMind's too
python eval_model.py --weight agent --tools 1

No way to an answer is shown: a reward of 1 for a right last answer is all there is. The tools are the built-in ones:
calculator, dates and units.
"""

import argparse
import copy

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch

from dataset.lm_dataset import question_dataset
from trainer.arguments import arguments
from trainer.policy import advantages_of, aggregate, entropy, kl_divergence, policy_batches, token_log_probs
from trainer.rewards import REWARDS
from trainer.rl import Figures, add_adapter, add_rollout_flags, check_rollout_flags, draw_rl_curves, fitting, start_of
from trainer.rollout import collect
from trainer.run import Run
from trainer.tool_turns import ToolTurns, agent_tiers, with_our_tools

FOLLOWED = 40  # held-out questions that are asked on the way


def agent_loss(model, batch, old_log_probs, reference, args):
    """Minus the mean over all sampled tokens (N,) of min(r, weight_cap) A log pi (CISPO, MiniMax 2025,
    arXiv:2506.13585). The advantage A = R - mean of the group is the same for all tokens of all turns; r = pi / pi_old
    has no gradient. old_log_probs (N,): None at the first update of a rollout, which is by the weights that sampled it:
    then r is 1, and this is REINFORCE with the group's mean as its baseline. With a reference, plus beta times the
    exact KL to these weights.

    Tokens of the template and of results are no labels: they have no part in it."""
    log_probs, distribution, out = token_log_probs(model, batch)
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    ratio = (log_probs.detach() - old_log_probs).exp()
    losses = -ratio.clamp(max=args.weight_cap) * batch["advantages"] * log_probs
    cut = (ratio > args.weight_cap).float().sum() / max(len(ratio), 1)
    metrics = out.metrics | {"clipped": cut, "entropy": entropy(distribution)}
    if reference is not None:
        with torch.no_grad():
            _, distribution_ref, _ = token_log_probs(reference, batch)
        kl = kl_divergence(distribution, distribution_ref)
        losses = losses + args.beta * kl
        metrics["kl"] = kl.detach().sum() / max(len(kl), 1)
    return aggregate(losses, batch, "token", args.max_new_tokens) + out.aux_loss, metrics, log_probs.detach()


def parse_arguments():
    parser = arguments(
        "agent", __doc__, from_weight="full_sft", optimizer="adamw", weight_decay=0.0, batch_size=8, max_seq_len=1024,
        decay=1.0, log_interval=1, compile="0",
    )  # fmt: skip
    add = add_rollout_flags(parser)
    add("--weight_cap", type=float, default=5.0, help="the largest ratio itself, not its distance from 1")
    add("--failed_call_cost", type=float, default=0.0, help="off the reward for each call that gets an error back")
    parser.set_defaults(thinking=0, max_new_tokens=96, rows=4, measure=100)
    args = parser.parse_args()
    check_rollout_flags(args)
    if not args.weight_cap > 0 or not args.failed_call_cost >= 0:
        raise cli.UsageError("--weight_cap must be above 0, --failed_call_cost at least 0")
    return args


def main():
    args = parse_arguments()
    run = Run(f"lora/{args.lora_name}" if args.lora_name else "agent", args, minutes=4.0, learning_rate_factor=0.1)
    save = add_adapter(run)
    reference = copy.deepcopy(run.model).eval().requires_grad_(False) if args.beta else None
    kept = start_of(run.model)
    quiet = not run.processes.is_main
    questions, held_out = run.rows(question_dataset, "agent")
    play = ToolTurns(run.tokenizer, REWARDS[args.reward], args)
    questions = fitting(with_our_tools(questions, args.data_path, quiet), play, args, quiet)
    followed = held_out and held_out[:FOLLOWED]
    without_cost = argparse.Namespace(**vars(args) | {"failed_call_cost": 0.0})  # whether the answer is right, no more
    asking = ToolTurns(run.tokenizer, REWARDS["right"], without_cost)
    figures = Figures(run, followed, asking, agent_tiers(held_out, args))

    for draw in run.draws(questions):
        if run.validation_due:
            figures.validate()
        collected = collect(run, draw, play)
        figures.collected(collected)
        if not collected.figures["kept"]:
            run.skip("no group has answers of different worth")
            continue
        advantages = advantages_of(collected.groups, by_deviation=False)
        batches = policy_batches(collected.rollouts, {"advantages": advantages}, "tokens", run)
        old_log_probs = []
        for update in range(args.updates_per_rollout):
            for i, batch in enumerate(run.accumulate(batches)):
                old = old_log_probs[i] if update else None
                loss, metrics, log_probs = agent_loss(run.model, batch, old, reference, args)
                run.backward(loss, batch)
                figures.batch(metrics, log_probs, batch, first=update == 0)
                old_log_probs += [log_probs] * (update == 0)
            run.update(figures.of_update())
    run.average_with(kept, args.start_share)
    figures.finish()
    run.finish(save)
    draw_rl_curves(run)


if __name__ == "__main__":
    cli.run(main)

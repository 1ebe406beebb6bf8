"""Reinforcement learning with a critic (PPO): it learns what an answer is worth at each token; what turns out better
than that becomes likelier.

python train_ppo.py                                         # starter problems beyond those of train_reason.py
python train_ppo.py --data_path FILE.jsonl --val_path ...   # questions with "answers", "gt", ... (dataset/questions.py)
python eval_model.py --weight ppo --thinking 1

Schulman et al. 2017, arXiv:1707.06347. The critic is a copy of the model's trunk with one number as its output; it has
some steps to itself at first, and is thrown away at the end.
"""

import copy

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch
from torch import nn

from dataset.lm_dataset import IGNORE, question_dataset
from model import checkpoint
from trainer.arguments import arguments
from trainer.policy import aggregate, entropy, gae, kl_divergence, policy_batches, token_log_probs
from trainer.rewards import REWARDS
from trainer.rl import Figures, add_rollout_flags, check_rollout_flags, draw_rl_curves, fitting, start_of
from trainer.rollout import OneTurn, collect
from trainer.run import Run


class ActorCritic(nn.Module):
    """The policy and its critic as one module, which the processes share. Its output is the policy's and the values."""

    def __init__(self, policy):
        super().__init__()
        self.policy, self.critic, self.config = policy, copy.deepcopy(policy), policy.config
        self.head = nn.Linear(policy.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)  # everything is worth the same at first

    def forward(self, input_ids, segment_ids, logits_at):
        hidden, _ = self.critic.hidden_states(input_ids, segment_ids, logits_at)
        self.values = self.head(hidden)[:, 0].float()  # (N,)
        return self.policy(input_ids, segment_ids, logits_at)

    model = property(lambda self: self.policy.model)  # what is shared out or compiled block by block
    activation_checkpointing = property(
        lambda self: self.policy.activation_checkpointing,
        lambda self, value: [setattr(part, "activation_checkpointing", value) for part in (self.policy, self.critic)],
    )

    def num_parameters(self, active=False):
        return self.policy.num_parameters(active)


@torch.no_grad()
def judge(run, batches, rollouts, args):
    """Gives each batch the critic's old_values, advantages and returns of its tokens, (N,) each. The reward comes with
    the last token. Advantages are whitened over the tokens of all processes."""
    rollouts = iter(rollouts)
    for batch in batches:
        with run.autocast():
            run.model(**{name: batch[name].to(run.device) for name in ("input_ids", "segment_ids")},
                      logits_at=(batch["labels"] != IGNORE).to(run.device))  # fmt: skip
        values = plain(run.model).values.cpu()
        advantages = []
        for part in values.split(batch["sampled"].tolist()):
            rewards = torch.zeros_like(part)
            rewards[-1] = next(rollouts).reward
            advantages.append(gae(rewards, part, args.gamma, args.lam))
        batch["old_values"], batch["advantages"] = values, torch.cat([*advantages, values[:0]])
        batch["returns"] = batch["advantages"] + values
    total = run.processes.total
    n = max(total(sum(batch["tokens"] for batch in batches)), 1)
    mean = total(sum(batch["advantages"].sum().item() for batch in batches)) / n
    variance = total(sum((batch["advantages"] - mean).square().sum().item() for batch in batches)) / n
    for batch in batches:
        batch["advantages"] = (batch["advantages"] - mean) / (variance**0.5 + 1e-8)


def plain(model):
    """Without what shares it among processes."""
    return getattr(model, "module", model)


def clipped_objective(log_probs, old_log_probs, advantages, clip):
    """min(r A, clip(r, 1 - clip, 1 + clip) A) for each token (N,), and which of them have no gradient any more."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    cut = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.minimum(ratio * advantages, clipped * advantages), cut


def value_loss(values, old_values, returns, clip):
    """Half the squared error of each value (N,), or that of one moved no further than `clip` if it is larger."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def ppo_loss(model, batch, old_log_probs, reference, args, warming_up):
    """The mean over the tokens of: minus the objective, plus beta times the exact KL to the start, plus value_weight
    times the critic's loss, which is all there is while it warms up."""
    log_probs, distribution, out = token_log_probs(model, batch)
    old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs
    objective, cut = clipped_objective(log_probs, old_log_probs, batch["advantages"], args.clip)
    losses = -objective
    of_critic = value_loss(plain(model).values, batch["old_values"], batch["returns"], args.value_clip)
    count = max(len(cut), 1)
    metrics = {"clipped": cut.float().sum() / count, "entropy": entropy(distribution)}
    metrics |= {"value_loss": of_critic.detach().sum() / count} | out.metrics
    if reference is not None:
        with torch.no_grad():
            _, distribution_ref, _ = token_log_probs(reference, batch)
        kl = kl_divergence(distribution if args.beta else distribution.detach(), distribution_ref)
        losses, metrics["kl"] = losses + args.beta * kl, kl.detach().sum() / count
    losses = (0.0 if warming_up else 1.0) * losses + args.value_weight * of_critic
    return aggregate(losses, batch, "token", 1) + out.aux_loss, metrics, log_probs.detach()


def parse_arguments():
    parser = arguments(
        "ppo", __doc__, from_weight="reason", optimizer="adamw", weight_decay=0.0, batch_size=64, decay=1.0,
        log_interval=1, compile="0",
    )  # fmt: skip
    add = add_rollout_flags(parser)
    parser.set_defaults(group_size=4, updates_per_rollout=3)
    add("--clip", type=float, default=0.2, help="no gain from a ratio further than this from 1")
    add("--value_clip", type=float, default=0.2, help="no gain from a value further than this from the old one")
    add("--value_weight", type=float, default=0.5, help="of the critic's loss beside the policy's")
    add("--gamma", type=float, default=1.0, help="what a reward one token later is worth")
    add("--lam", type=float, default=0.95, help="GAE: 1 = what came of it, 0 = what the critic says of the next token")
    add("--critic_warmup", type=int, default=3, help="rollouts that teach the critic alone")
    args = parser.parse_args()
    check_rollout_flags(args)
    if args.lora_name:
        raise cli.UsageError("--lora_name: the critic is a whole model; use train_grpo.py for an adapter")
    if not (0 <= args.gamma <= 1 and 0 <= args.lam <= 1):
        raise cli.UsageError("--gamma and --lam must be between 0 and 1")
    return args


def main():
    args = parse_arguments()
    run = Run("ppo", args, minutes=4.0, learning_rate_factor=0.15)
    reference = copy.deepcopy(run.model).eval().requires_grad_(False)
    run.model = ActorCritic(run.model)
    kept = start_of(run.model)
    questions, held_out = run.rows(question_dataset, "reason_rl")
    play = OneTurn(run.tokenizer, REWARDS[args.reward], args)
    questions = fitting(questions, play, args, quiet=not run.processes.is_main)
    figures = Figures(run, held_out, OneTurn(run.tokenizer, REWARDS["right"], args))

    for draw in run.draws(questions):
        warming_up = run.progress.step < args.critic_warmup * args.updates_per_rollout
        if run.validation_due:
            figures.validate()
        collected = collect(run, draw, play, compare=False)
        figures.collected(collected)
        batches = policy_batches(collected.rollouts, {}, "tokens", run)
        judge(run, batches, collected.rollouts, args)
        old_log_probs = []
        for update in range(args.updates_per_rollout):
            for i, batch in enumerate(run.accumulate(batches)):
                old = old_log_probs[i] if update else None
                start = reference if args.beta or i == update == 0 else None  # without beta, only to tell
                loss, metrics, log_probs = ppo_loss(run.model, batch, old, start, args, warming_up)
                run.backward(loss, batch)
                figures.batch(metrics, log_probs, batch, first=update == 0)
                old_log_probs += [log_probs] * (update == 0)
            run.update(figures.of_update())
    plain(run.model).values = None  # with their graph they cannot be copied
    run.average_with(kept, args.start_share)
    figures.finish()

    def save(path, model, meta, tokenizer):
        checkpoint.save(path, model.policy, meta, tokenizer=tokenizer)

    run.finish(save)
    draw_rl_curves(run)


if __name__ == "__main__":
    cli.run(main)

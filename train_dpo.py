"""Direct preference optimization: from pairs of answers the model learns which kind is preferred.

python train_dpo.py                                              # starter pairs, from out/full_sft_*.pth
python train_dpo.py --data_path FILE.jsonl --max_seq_len 1024    # {"chosen": [...], "rejected": [...]} lines
python train_dpo.py --loss ipo | --loss simpo | --label_smoothing 0.1 | --length_normalize
"""

import copy
import math
from functools import partial

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch
import torch.nn.functional as F

from dataset.lm_dataset import IGNORE, preference_dataset
from trainer.arguments import arguments
from trainer.run import Run


def answer_log_probs(model, batch):
    """log pi(y|x) of each answer y, the sum over its own tokens: (pairs, 2), chosen and rejected, fp32 (in bf16 a sum
    of a hundred is off by more than two answers differ); log pi of the whole vocabulary at each of their tokens,
    (N, vocab); and what the model gave."""
    labels, answer_of = batch["labels"], batch["answer_of"]  # (B, T) both; -100 and -1 outside of the answers
    has_label = labels != IGNORE
    out = model(batch["input_ids"], segment_ids=batch["segment_ids"], logits_at=has_label)
    log_probs = out.logits.float().log_softmax(-1)  # (N, vocab)
    of_label = log_probs.gather(-1, labels[has_label][:, None])[:, 0]  # (N,)
    sums = of_label.new_zeros(batch["answer_lengths"].numel()).index_add(0, answer_of[has_label], of_label)
    return sums.view(-1, 2), log_probs, out


def preference_loss(policy_log_probs, reference_log_probs, lengths, args):
    """Loss of each pair (pairs,) and the implicit rewards r (pairs, 2), from log-probabilities and numbers of tokens of
    the chosen answer w and the rejected one l, (pairs, 2).

    DPO (Rafailov et al. 2023, arXiv:2305.18290): r = beta * log(pi(y|x) / pi_ref(y|x)), loss = -log sigmoid(r_w - r_l).
    cDPO (Mitchell 2023): with probability label_smoothing the pair is the wrong way round. IPO (Azar et al. 2023,
    arXiv:2310.12036): (h - 1 / (2 beta))^2 with h the difference of log-ratios, here, as in trl, per token. SimPO (Meng
    et al. 2024, arXiv:2405.14734): no reference, per token, and a margin of gamma."""
    if args.loss == "simpo":
        rewards = args.beta * policy_log_probs / lengths
        margins = rewards[:, 0] - rewards[:, 1] - args.simpo_gamma
    else:
        log_ratios = policy_log_probs - reference_log_probs
        rewards = args.beta * log_ratios
        if args.length_normalize or args.loss == "ipo":
            log_ratios = log_ratios / lengths
        h = log_ratios[:, 0] - log_ratios[:, 1]
        if args.loss == "ipo":
            return (h - 1 / (2 * args.beta)) ** 2, rewards
        margins = args.beta * h
    epsilon = args.label_smoothing
    return -(1 - epsilon) * F.logsigmoid(margins) - epsilon * F.logsigmoid(-margins), rewards


def dpo_loss(model, batch, reference_model, args):
    """Mean of preference_loss() over the pairs. reference_model: the weights that the training began with; None for a
    loss that has no reference."""
    policy_log_probs, log_probs, out = answer_log_probs(model, batch)
    reference_log_probs, metrics = None, out.metrics
    if reference_model is not None:
        with torch.no_grad():
            reference_log_probs, log_probs_ref, _ = answer_log_probs(reference_model, batch)
        if not model.training:  # KL(pi || pi_ref) per token of the answers, over the whole vocabulary
            metrics = metrics | {"kl": (log_probs.exp() * (log_probs - log_probs_ref)).sum(-1).mean()}
    losses, rewards = preference_loss(policy_log_probs, reference_log_probs, batch["answer_lengths"], args)
    metrics = metrics | preference_metrics(policy_log_probs.detach(), rewards.detach())
    return losses.mean() + out.aux_loss, metrics


def preference_metrics(log_probs, rewards):
    return {
        "accuracy": (log_probs[:, 0] > log_probs[:, 1]).float().mean(),  # ranks the pair right by itself
        "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).float().mean(),  # against the reference
        "reward_margin": (rewards[:, 0] - rewards[:, 1]).mean(),
        "chosen_reward": rewards[:, 0].mean(),
        "rejected_reward": rewards[:, 1].mean(),
        "chosen_log_prob": log_probs[:, 0].mean(),
        "rejected_log_prob": log_probs[:, 1].mean(),
    }


def parse_arguments():
    parser = arguments("dpo", __doc__, from_weight="full_sft", batch_size=8)
    add = parser.add_argument_group("preference").add_argument
    add("--beta", type=float, default=0.1, help="the smaller, the further the model may move from where it began")
    add("--loss", choices=("dpo", "ipo", "simpo"), default="dpo")
    add("--label_smoothing", type=float, default=0.0, help="share of the pairs that may be the wrong way round (cDPO)")
    add("--length_normalize", action="store_true", help="dpo: log-ratios per token, so that long answers gain nothing")
    add("--simpo_gamma", type=float, help="simpo: the margin (default: 0.5)")
    args = parser.parse_args()
    idle = {"--label_smoothing": args.label_smoothing and args.loss == "ipo"}
    idle |= {"--length_normalize": args.length_normalize and args.loss != "dpo"}
    idle |= {"--simpo_gamma": args.simpo_gamma is not None and args.loss != "simpo"}
    for flag in (flag for flag, given in idle.items() if given):
        raise cli.UsageError(f"{flag} does nothing with --loss {args.loss}: leave it out")
    args.simpo_gamma = 0.5 if args.simpo_gamma is None else args.simpo_gamma
    if not 0 < args.beta < math.inf or not 0 <= args.label_smoothing < 0.5:
        raise cli.UsageError("--beta must be above 0, --label_smoothing at least 0 and below 0.5")
    return args


def main():
    args = parse_arguments()
    run = Run("dpo", args, minutes=1.0, learning_rate_factor=0.08)
    # Before steps(), which may share the model out among processes and compile it.
    reference_model = None if args.loss == "simpo" else copy.deepcopy(run.model).eval().requires_grad_(False)
    train_rows, val_rows = run.rows(preference_dataset, "dpo")
    loss_fn = partial(dpo_loss, reference_model=reference_model, args=args)

    for micro_batches in run.steps(train_rows):
        if run.validation_due:
            run.validate(loss_fn, val_rows)
        for batch in micro_batches:
            loss, metrics = loss_fn(run.model, batch)
            run.backward(loss, batch)
        run.update(metrics)
    run.validate(loss_fn, val_rows)
    run.finish()


if __name__ == "__main__":
    cli.run(main)

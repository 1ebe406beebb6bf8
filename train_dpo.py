"""Direct preference optimization: from pairs of answers the model learns which kind is preferred.

python train_dpo.py                                              # starter pairs, from out/full_sft_*.pth
python train_dpo.py --data_path FILE.jsonl --max_seq_len 1024    # {"chosen": [...], "rejected": [...]} lines
python train_dpo.py --loss ipo | --loss simpo | --label_smoothing 0.1 | --length_normalize
"""

import copy

import torch
import torch.nn.functional as F

import cli
from dataset.chat import load_tokenizer
from dataset.lm_dataset import IGNORE, preference_dataset
from trainer import trainer
from trainer.arguments import arguments


def answer_log_probs(model, batch):
    """log pi(y|x) of each answer, the sum over its own tokens: (pairs, 2), chosen and rejected; the number of those
    tokens, (pairs, 2); and the log-probabilities of the whole vocabulary at each of them, (N, vocab). All fp32: in bf16
    a sum of a hundred log-probabilities is off by more than two answers differ.

    A pair is two neighbouring segments of a packed row; padding and prompts have no label, so they are never summed."""
    labels, segments = batch["labels"], batch["segment_ids"].long()
    answer = labels != IGNORE  # (B, T)
    out = model(batch["input_ids"], segment_ids=segments, logits_at=answer)
    log_probs = out.logits.float().log_softmax(-1)  # (N, vocab)
    of_label = log_probs.gather(-1, labels[answer][:, None])[:, 0]  # (N,)

    B, S = len(labels), int(segments.max()) // 2 * 2
    place = (torch.arange(B, device=labels.device)[:, None] * S + segments - 1)[answer]  # (N,) which answer it is of
    sums = of_label.new_zeros(B * S).index_add(0, place, of_label)
    lengths = of_label.new_zeros(B * S).index_add(0, place, torch.ones_like(of_label))
    exists = (segments.max(1).values[:, None] > torch.arange(S, device=labels.device)).flatten()  # rows hold 1 to S / 2
    return sums[exists].view(-1, 2), lengths[exists].view(-1, 2), log_probs, out


def preference_loss(policy, reference, lengths, args):
    """Loss of each pair (pairs,) and the implicit rewards r (pairs, 2), from log-probabilities (pairs, 2).

    DPO (Rafailov et al. 2023, arXiv:2305.18290): r = beta * log(pi(y|x) / pi_ref(y|x)), loss = -log sigmoid(r_w - r_l).
    cDPO (Mitchell 2023): with probability label_smoothing the pair is the wrong way round. IPO (Azar et al. 2023,
    arXiv:2310.12036): (h - 1 / (2 beta))^2 with h the difference of log-ratios per token. SimPO (Meng et al. 2024,
    arXiv:2405.14734): no reference, per token, and a margin of gamma."""
    if args.loss == "simpo":
        rewards = args.beta * policy / lengths
        margins = rewards[:, 0] - rewards[:, 1] - args.simpo_gamma
    else:
        log_ratios = policy - reference
        rewards = args.beta * log_ratios
        if args.length_normalize or args.loss == "ipo":
            log_ratios = log_ratios / lengths
        margins = args.beta * (log_ratios[:, 0] - log_ratios[:, 1])
    if args.loss == "ipo":
        return (margins / args.beta - 1 / (2 * args.beta)) ** 2, rewards
    epsilon = args.label_smoothing
    return -(1 - epsilon) * F.logsigmoid(margins) - epsilon * F.logsigmoid(-margins), rewards


def make_loss_fn(reference, args):
    def loss_fn(model, batch):
        policy, lengths, log_probs, out = answer_log_probs(model, batch)
        with torch.no_grad():  # pi_ref: the weights that the training began with
            at_start, _, reference_log_probs, _ = answer_log_probs(reference, batch)
            kl = (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1).mean()
        losses, rewards = preference_loss(policy, at_start, lengths, args)
        loss, rewards, policy = losses.mean(), rewards.detach(), policy.detach()
        metrics = {
            "accuracy": (policy[:, 0] > policy[:, 1]).float().mean(),  # ranks the pair right by itself
            "reward_accuracy": (rewards[:, 0] > rewards[:, 1]).float().mean(),  # against the reference
            "reward_margin": (rewards[:, 0] - rewards[:, 1]).mean(),
            "chosen_reward": rewards[:, 0].mean(),
            "rejected_reward": rewards[:, 1].mean(),
            "chosen_log_prob": policy[:, 0].mean(),
            "rejected_log_prob": policy[:, 1].mean(),
            "kl": kl,  # KL(pi || pi_ref) per token of the answers
        }
        return trainer.with_balance(out, loss, metrics)

    return loss_fn


def main():
    parser = arguments("dpo", __doc__, from_weight="full_sft", batch_size=8)
    add = parser.add_argument_group("preference").add_argument
    add("--beta", type=float, default=0.1, help="how dear it is to leave the reference")
    add("--loss", choices=("dpo", "ipo", "simpo"), default="dpo")
    add("--label_smoothing", type=float, default=0.0, help="share of the pairs that may be the wrong way round (cDPO)")
    add("--length_normalize", action="store_true", help="log-ratios per token, so that long answers are not favoured")
    add("--simpo_gamma", type=float, default=0.5, help="margin of SimPO")
    args = parser.parse_args()
    if not args.beta > 0 or not 0 <= args.label_smoothing < 0.5:
        raise cli.UsageError("--beta must be above 0, --label_smoothing at least 0 and below 0.5")
    run = trainer.setup("dpo", args, minutes=1.0, rate=0.05)
    reference = copy.deepcopy(run.model).eval().requires_grad_(False)
    tokenizer = load_tokenizer()
    train_rows, val_rows = trainer.datasets(args, "dpo", preference_dataset, tokenizer)

    trainer.train(run, make_loss_fn(reference, args), train_rows, val_rows, tokenizer)


if __name__ == "__main__":
    cli.run(main)

"""White-box distillation: a small student learns the teacher's whole distribution, not only the right token.

python train_distill.py                # a student of hidden_size 128 from nothing, the teacher is out/full_sft_*.pth
python train_distill.py --teacher FILE_OR_FOLDER --from_weight pretrain --alpha 0.5 --temperature 2 --kl reverse

Black-box distillation, when only the teacher's answers can be seen: scripts/ask_teacher.py, then train_full_sft.py.
"""

import math
from functools import partial

import cli  # first: it takes Ctrl-C while the rest is imported

# isort: split
import torch

from dataset.lm_dataset import IGNORE, sft_dataset
from model import checkpoint
from model.adapters import fingerprint
from trainer.arguments import arguments
from trainer.run import Run
from trainer.speed import cross_entropy


def distillation_loss(student, teacher, temperature, kl):
    """T^2 * KL between softmax(teacher / T) and softmax(student / T), logits (N, vocab), mean over N (Hinton et al.
    2015, arXiv:1503.02531). forward: KL(teacher || student), the student covers all that the teacher might say;
    reverse: KL(student || teacher), it keeps to what the teacher says most (Gu et al. 2023, arXiv:2306.08543)."""
    log_s = (student.float() / temperature).log_softmax(-1)
    log_t = (teacher.float() / temperature).log_softmax(-1)
    log_p, log_q = (log_t, log_s) if kl == "forward" else (log_s, log_t)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).sum() / max(len(log_p), 1)


def distill_loss(model, batch, teacher, args):
    """alpha * cross-entropy with the labels + (1 - alpha) * distillation, over the tokens of the answers."""
    labels = batch["labels"]  # (B, T)
    has_label = labels != IGNORE
    inputs = {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"], "logits_at": has_label}
    out = model(**inputs)  # logits (N, vocab)
    of_labels = cross_entropy(out.logits, labels[has_label])
    loss, metrics = args.alpha * of_labels, out.metrics | {"cross_entropy": of_labels.detach()}
    if args.alpha < 1:
        with torch.no_grad():
            teacher_logits = teacher(**inputs).logits
        divergence = distillation_loss(out.logits, teacher_logits, args.temperature, args.kl)
        loss, metrics = loss + (1 - args.alpha) * divergence, metrics | {"divergence": divergence.detach()}
    return loss + out.aux_loss, metrics


def load_teacher(out_dir, name, run):
    """The teacher, frozen; refused if its tokens are not the student's."""
    path = checkpoint.find_weights(out_dir, name)
    teacher, _ = checkpoint.load(path, run.device)
    if teacher.config.vocab_size != run.config.vocab_size:
        raise checkpoint.CheckpointError(
            f"--teacher {path} has another vocabulary ({teacher.config.vocab_size} tokens; the student has "
            f"{run.config.vocab_size}): its probabilities cannot be compared; use scripts/ask_teacher.py"
        )
    tokenizer = checkpoint.tokenizer_of(path, run.args.tokenizer)
    tokenizer.require_same(run.tokenizer, f"--teacher {path}", "the student")
    return teacher.requires_grad_(False)


def parse_arguments():
    parser = arguments("distill", __doc__)
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", default="full_sft", help="a stage in --out_dir, a .pth, or a Hugging Face folder; dense or MoE")
    add("--alpha", type=float, default=0.0, help="share of the labels in the loss; 1 = no teacher")
    add("--temperature", type=float, default=1.0, help="above 1, unlikely tokens count more")
    add("--kl", choices=("forward", "reverse"), default="forward")
    args = parser.parse_args()
    if not 0 <= args.alpha <= 1 or not 0 < args.temperature < math.inf:
        raise cli.UsageError("--alpha must be between 0 and 1, --temperature above 0")
    if args.from_weight == "none" and not (args.preset or args.hidden_size):
        args.hidden_size = 128
    return args


def main():
    args = parse_arguments()
    run = Run("distill", args, minutes=2.0)
    teacher = load_teacher(args.out_dir, args.teacher, run)
    run.inputs["teacher"] = fingerprint(teacher)
    train_rows, val_rows = run.rows(sft_dataset, "sft")
    loss_fn = partial(distill_loss, teacher=teacher, args=args)

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

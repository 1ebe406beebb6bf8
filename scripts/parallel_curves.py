"""The same short pretraining by one process and by two under each engine: all loss curves must lie on each other.

python scripts/parallel_curves.py --picture docs/parallel_curves.png -- --max_seq_len 64 --learning_rate 3e-4

What follows -- goes to train_pretrain.py; one process gets twice the --batch_size. On the CPU. Prints how far each
curve is from the first: rounding differs, and a learning rate near the highest possible doubles that with every step.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from _path import ROOT

from cli import ArgumentParser
from trainer.report import read_log

ENGINES = {"ddp": [], "fsdp2": ["--fsdp"]} | {
    f"zero{n}": ["--deepspeed", str(ROOT / f"configs/zero{n}.json")] for n in (1, 2, 3)
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of each of the two processes")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("flags", nargs="*", help="of train_pretrain.py")
    args = parser.parse_args()
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        common = ["--steps", str(args.steps), "--log_interval", "1", "--compile", "0", "--device", "cpu"]
        common += ["--dtype", "fp32", "--optimizer", "adamw", "--val_tokens", "1", "--out_dir", folder, *args.flags]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        runs = {"one process": ([sys.executable], 2 * args.batch_size, [])}
        runs |= {f"two, {name}": (torchrun, args.batch_size, flags) for name, flags in ENGINES.items()}
        for name, (launcher, batch_size, flags) in runs.items():
            command = [*launcher, str(ROOT / "train_pretrain.py"), "--batch_size", str(batch_size), *flags, *common]
            done = subprocess.run([*command, "--save_weight", name], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"error: {name} ended with {done.returncode}:\n{done.stderr}")
            [log] = Path(folder).glob(f"{name}_*.jsonl")
            rows = [row for row in read_log(log) if "loss" in row]
            losses[name] = [row["loss"] for row in rows]
    first, *others = losses
    differences = {name: [abs(a - b) for a, b in zip(losses[name], losses[first], strict=True)] for name in others}
    for name, values in differences.items():
        print(f"{name}: largest difference of the loss from one process {max(values):.1e} in {len(values)} steps")
    if args.picture:
        draw_curves([row["tokens"] for row in rows], losses, differences, args.picture)


def draw_curves(tokens: list[int], losses: dict, differences: dict, picture: Path) -> None:
    """The curves, each thinner than the one it lies on, and below how far each is from the first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), dpi=90, sharex=True, height_ratios=(2, 1))
    for i, (name, values) in enumerate(losses.items()):
        above.plot(tokens, values, label=name, linewidth=1.6 * (len(losses) - i) - 0.6, color=f"C{i}")
    for i, values in enumerate(differences.values(), 1):
        below.semilogy(tokens, values, color=f"C{i}", marker=".", linewidth=1, nonpositive="mask")
    above.set_title("The same pretraining by one process and by two (CPU, fp32)")
    above.set_ylabel("training loss")
    above.legend()
    below.set_ylabel("difference from\none process")
    below.set_xlabel("tokens trained on")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture)
    Image.open(picture).quantize(64).save(picture, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()

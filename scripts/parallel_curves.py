"""The same short pretraining by one process and by two under each engine: all loss curves must lie on each other.

python scripts/parallel_curves.py --steps 40 --picture docs/parallel_curves.png -- --preset nano --batch_size 4

What follows -- goes to train_pretrain.py; one process gets twice the batch. On the CPU. Prints the largest difference.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.arguments import ArgumentParser  # noqa: E402
from trainer.report import compare_curves, read_log  # noqa: E402

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
    with tempfile.TemporaryDirectory() as folder:
        logs = []
        common = ["--steps", str(args.steps), "--log_interval", "1", "--compile", "0", "--device", "cpu"]
        common += ["--dtype", "fp32", "--optimizer", "adamw", "--out_dir", folder, *args.flags]
        runs = {"one_process": [sys.executable, "--batch_size", 2 * args.batch_size]}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        runs |= {name: [*torchrun, "--batch_size", args.batch_size, *flags] for name, flags in ENGINES.items()}
        for name, parts in runs.items():
            at = parts.index("--batch_size")
            command = [*parts[:at], str(ROOT / "train_pretrain.py"), *map(str, parts[at:]), *common]
            subprocess.run([*command, "--save_weight", name], check=True, stderr=subprocess.DEVNULL)
            [log] = Path(folder).glob(f"{name}_*.jsonl")
            logs.append(log)
        curves = [[row["loss"] for row in read_log(log) if "loss" in row] for log in logs]
        for log, curve in zip(logs[1:], curves[1:], strict=True):
            largest = max(abs(a - b) for a, b in zip(curve, curves[0], strict=True))
            print(f"{log.stem}: largest difference of the loss from one process {largest:.2e} in {len(curve)} steps")
        if args.picture:
            args.picture.parent.mkdir(exist_ok=True)
            compare_curves(logs, "loss", "training loss", args.picture)


if __name__ == "__main__":
    main()

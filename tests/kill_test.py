"""Runs killed with SIGKILL at random moments, and in the middle of saving, end bit for bit like runs left alone.

    python -m tests.kill_test --kills 50                       # all stages in turn; about five seconds a kill
    python -m tests.kill_test --kills 10 --stages lora,dpo --seed 7

Each stage is trained once without interruption. Then it is started, killed and resumed until it has taken its share of
the kills, and finished; no file may ever be half written, and weights, metrics log (but for what a clock measures) and
sample order must be equal. Of three kills one falls anywhere, one waits for the temporary file of whatever is saved
next, and one for that of the final weights. The last line is one JSON object; the exit status is 1 if anything
differed.
"""

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from dataset.lm_dataset import CACHE_DIR

ROOT = Path(__file__).resolve().parent.parent

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
TINY = "--max_seq_len 32 --batch_size 2 --dtype fp32 --device cpu --log_interval 2 --accumulation_steps 2"
SHAPE = "--hidden_size 64 --num_hidden_layers 2"
# name: script, data, whether the base is a MoE, further flags
STAGES = {
    "pretrain": ("train_pretrain.py", "text", 0, f"{SHAPE} --compile 0"),
    "pretrain_moe": ("train_pretrain.py", "text", 1, f"{SHAPE} --compile 0 --optimizer adamw --keep 3"),
    "sft": ("train_full_sft.py", "chat", 1, "--from_weight {base} --compile 0 --activation_checkpointing 1"),
    "lora": ("train_lora.py", "chat", 0, "--from_weight {base} --compile 0 --lora_dropout 0.2"),
    "dpo": ("train_dpo.py", "pairs", 0, "--from_weight {base} --compile 0 --max_seq_len 64"),
    "lora_compiled": ("train_lora.py", "chat", 0, "--from_weight {base} --compile 1 --lora_dropout 0.2"),
    "sft_compiled": ("train_full_sft.py", "chat", 0, "--from_weight {base} --compile 1"),
}
AIMS = (None, ".", ".pth.")  # of one kill after the other: part of the temporary file's name that it waits for
CLOCK = ("seconds", "tokens_per_second", "mfu")


def write_data(folder: Path) -> dict[str, Path]:
    """Small files of each kind, in which no two lines are alike."""
    generator, words = random.Random(0), "the cat sat on a mat 小猫 看 雨 and 3 + 4 = 7 in old house 今天 天气".split()

    def text(n: int) -> str:
        return " ".join(generator.choices(words, k=n))

    def chat(n: int) -> list[dict]:
        return [{"role": "user", "content": text(3)}, {"role": "assistant", "content": text(n)}]

    rows = {
        "text": [{"text": text(12)} for _ in range(60)],
        "chat": [{"conversations": chat(1 + i % 12)} for i in range(60)],
        "pairs": [{"chosen": one, "rejected": [one[0], chat(4)[1]]} for one in map(chat, [2, 3, 5] * 20)],
    }
    paths = {name: folder / f"kill{os.getpid()}-{name}.jsonl" for name in rows}
    for name, lines in rows.items():
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return paths


def run_script(argv: list[str], log: Path) -> None:
    """In a child: a train script that also notes the samples it takes, in <log>.order."""
    descriptor = os.open(f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    torch.set_num_threads(1)
    from trainer import speed, trainer

    to_device, save = trainer._to_device, trainer._save_resume
    taken: list[str] = []

    def noting(batch: dict, device: torch.device) -> dict:
        if sys._getframe(1).f_code.co_name != "validate":
            tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
            taken.append(str(hash(tuple(tuple(t.flatten().tolist()) for t in tensors))))
        return to_device(batch, device)

    def saving(run, progress, *rest) -> None:
        with open(f"{log}.order", "a", encoding="utf-8") as file:
            file.write(json.dumps([progress.step, taken]) + "\n")
        taken.clear()
        save(run, progress, *rest)

    trainer._to_device, trainer._save_resume = noting, saving
    trainer.matmul_peak = partial(speed.matmul_peak, size=64, repeat=1)  # a second of every start, for a figure only
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def sample_order(log: Path) -> dict[int, list[str]]:
    """The samples of each step; a step that was computed again must have had the same ones."""
    order: dict[int, list[str]] = {}
    for line in Path(f"{log}.order").read_text(encoding="utf-8").splitlines():
        step, samples = json.loads(line)
        assert order.setdefault(step, samples) == samples, f"step {step} saw other samples the second time"
    return order


def metrics(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[dict], list[str]]:
    """Weights, metrics log and the names of the files of a finished run."""
    [path] = out.rglob("*.pth")
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*"))
    return torch.load(path, weights_only=True)["model"], metrics(path.with_suffix(".jsonl")), files


def files_in(out: Path) -> list[Path]:
    """Those that are there; unlike rglob, it does not mind folders that a running process is just removing."""
    return [Path(folder, name) for folder, _, names in os.walk(out) for name in names]


def kill_somewhere(process, out: Path, generator: random.Random, aim: str | None) -> str | None:
    """SIGKILL the process after a random time, or from then on while a file of the aim is written, the final weights
    at any time; where it was, None if it ended."""
    start, began, after = time.monotonic(), time.time(), None
    wait = 0 if aim == ".pth." else generator.uniform(0, 0.9)
    while process.is_alive():
        found = files_in(out)
        writing = [path.name for path in found if path.name.startswith(".") and path.suffix == ".tmp"]
        begun = any(path.suffix == ".jsonl" and path.stat().st_mtime > began for path in found)  # each start writes it
        after = after or (time.monotonic() if begun else None)
        if after and time.monotonic() - after >= wait and (aim is None or any(aim in name for name in writing)):
            if aim:
                time.sleep(generator.uniform(0, 0.004))  # not always at the first byte
            process.kill()
            process.join()
            left = [path.name for path in out.rglob(".*.tmp")]
            kinds = {"resume state": ".state_", "final weights": ".pth.", "log": ".jsonl"}
            found = [kind for kind, part in kinds.items() if any(part in name for name in left)]
            return f"inside a save ({found[0] if found else left[0]})" if left else "outside a save"
        if time.monotonic() - start > 120:
            process.kill()
            raise RuntimeError("a run neither ended nor saved within two minutes")
        time.sleep(0.0005)
    return None


def check_stage(name: str, kills: int, steps: int, folder: Path, generator: random.Random) -> Counter:
    """Kill one stage this many times; how often at which kind of moment. AssertionError if the end differs."""
    script, kind, moe, more = STAGES[name]
    data = write_data(folder)

    def start(argv: list[str], log: Path):
        process = CONTEXT.Process(target=run_script, args=([str(ROOT / script), *argv], log))
        process.start()
        return process

    def finish(argv: list[str], log: Path) -> None:
        process = start(argv, log)
        process.join(250)
        error = Path(f"{log}.err").read_text(encoding="utf-8")
        assert process.exitcode == 0, f"exit status {process.exitcode}: {error[-2000:]}"

    base = folder / "base.pth"
    if "{base}" in more:
        from model import checkpoint
        from model.model import MiniMindConfig, MiniMindLM

        torch.manual_seed(0)
        shape = dict(hidden_size=64, num_hidden_layers=2, intermediate_size=192, qk_norm=True, num_experts=4 * moe)
        checkpoint.save(base, MiniMindLM(MiniMindConfig(**shape, num_experts_per_tok=1)))
    flags = [*TINY.split(), "--use_moe", moe, "--steps", steps, "--save_interval", 1, "--val_interval", 5]
    flags += ["--data_path", data[kind], "--val_path", data[kind], *more.format(base=base).split()]
    flags = [str(flag) for flag in flags]
    whole, parts = folder / "whole", folder / "parts"
    finish([*flags, "--out_dir", str(whole)], folder / "whole_log")
    expected, order = outcome(whole), sample_order(folder / "whole_log")

    moments: Counter = Counter()
    hits = ends = 0
    resume = [*flags, "--out_dir", str(parts), "--from_resume", "1"]
    while hits < kills:
        process = start(resume, folder / "parts_log")
        moment = kill_somewhere(process, parts, generator, aim := AIMS[hits % len(AIMS)])
        if moment:
            moments[moment] += 1
            hits += aim is None or moment.startswith("inside")  # one that came too late is aimed again
            for file in [*parts.rglob("*.pth"), *parts.rglob("*.pt")]:  # complete or absent
                torch.load(file, weights_only=True)
        else:  # it came to its end: compare, and begin again
            compare(folder, parts, expected, order)
            ends += 1
            assert ends < 5 + kills, "kills find no file that is being written"
            shutil.rmtree(parts)
            Path(f"{folder / 'parts_log'}.order").unlink()
    finish(resume, folder / "parts_log")
    compare(folder, parts, expected, order)
    return moments


def compare(folder: Path, parts: Path, expected: tuple, order: dict[int, list[str]]) -> None:
    weights, log, files = outcome(parts)
    assert weights.keys() == expected[0].keys()
    assert all(torch.equal(weights[key], expected[0][key]) for key in weights), "weights differ"
    assert log == expected[1], "metrics logs differ"
    assert files == expected[2], f"files left: {files}"
    assert sample_order(folder / "parts_log") == order, "other samples, or in another order"


def kill_stages(stages: list[str], kills: int, seed: int, steps: int = 16) -> dict[str, Counter]:
    """Share the kills out over the stages."""
    CONTEXT.set_forkserver_preload(["torch", "datasets", "matplotlib.pyplot", "trainer.trainer", "dataset.lm_dataset"])
    os.environ |= {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    moments = {}
    try:
        for i, name in enumerate(stages):
            share = kills // len(stages) + (i < kills % len(stages))
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                moments[name] = check_stage(name, share, steps, Path(folder), random.Random(f"{seed} {name}"))
            found = ", ".join(f"{n} {moment}" for moment, n in sorted(moments[name].items()))
            print(f"{name}: {share} kills ({found}): equal; {time.monotonic() - start:.0f} s", flush=True)
    finally:
        for path in CACHE_DIR.glob(f"*kill{os.getpid()}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=7)
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = kill_stages(args.stages.split(","), args.kills, args.seed)
    total = sum(moments.values(), Counter())
    print(json.dumps({"kills": total.total(), "moments": dict(total), "differing": 0}))


if __name__ == "__main__":
    main()

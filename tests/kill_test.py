"""Runs killed with SIGKILL at random moments, and in the middle of saving, end bit for bit like runs left alone.

    python -m tests.kill_test --kills 50                       # all stages in turn; about three seconds a kill
    python -m tests.kill_test --kills 10 --stages lora,dpo --seed 7

Each stage is trained once without interruption. Then it is started, killed and resumed until it has taken its share of
the kills, and finished; now and then a second run is started on its files, and must be refused at once. No file may
ever be half written, and weights, figures and metrics log (but for what a clock
measures) must be equal. Of three kills one falls after any step, one waits for the temporary file of whatever is saved
next, and one for that of the final weights. The last line is one JSON object; the exit status is 1 if anything
differed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.processes import Script, assert_same, files_in, one_error, small_data, small_weights, state_step

TINY = "--max_seq_len 32 --batch_size 2 --dtype fp32 --device cpu --log_interval 2 --accumulation_steps 2"
TINY = f"{TINY} --compile 0 --save_interval 1 --val_interval 5"
SHAPE = "--hidden_size 64 --num_hidden_layers 2"
# name: script, data, further flags
STAGES = {
    "pretrain": ("train_pretrain.py", "text", SHAPE),
    "pretrain_moe": ("train_pretrain.py", "text", f"{SHAPE} --use_moe 1 --optimizer adamw --keep 3"),
    "sft": ("train_full_sft.py", "chat", "--from_weight {moe} --activation_checkpointing 1"),
    "lora": ("train_lora.py", "chat", "--from_weight {dense} --lora_dropout 0.2"),
    "dpo": ("train_dpo.py", "pairs", "--from_weight {dense} --max_seq_len 64"),
    "distill": ("train_distill.py", "chat", f"{SHAPE} --teacher {{moe}} --alpha 0.3"),
    "reason": ("train_reason.py", "chat", "--from_weight {moe}"),
    "unlikelihood": ("train_unlikelihood.py", "text", "--from_weight {dense} --ngram 2"),
    "lora_compiled": ("train_lora.py", "chat", "--from_weight {dense} --compile 1 --lora_dropout 0.2"),
    "sft_compiled": ("train_full_sft.py", "chat", "--from_weight {dense} --compile 1"),
}
AIMS = (None, ".", ".pth.")  # of one kill after the other: part of the temporary file's name that it waits for
KINDS = {"resume state": ".state_", "final weights": ".pth.", "log": ".jsonl"}


def is_half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def kill_somewhere(running: Script, out: Path, step: int, generator: random.Random, aim: str | None) -> str | None:
    """SIGKILL the process soon after it has saved this step, or from then on while a file of the aim is written, the
    final weights at any time; where it was, None if it ended. By steps and not by the clock, for most of so short a
    run goes by before its first step."""
    start, began = time.monotonic(), time.time()
    while running.alive():
        found = files_in(out)
        writing = [path.name for path in found if is_half_written(path)]
        begun = any(path.suffix == ".jsonl" and _modified(path) > began for path in found)  # each start writes it
        due = begun and (aim == ".pth." or max(map(state_step, found)) >= step)
        if due and (aim is None or any(aim in name for name in writing)):
            time.sleep(generator.uniform(0, 0.004 if aim else 0.03))  # not always at the first byte
            running.kill()
            left = [path.name for path in files_in(out) if is_half_written(path)]
            kinds = [kind for kind, part in KINDS.items() if any(part in name for name in left)]
            return f"inside a save ({kinds[0] if kinds else left[0]})" if left else "outside a save"
        if time.monotonic() - start > 120:
            running.kill()
            raise RuntimeError("a run neither ended nor saved within two minutes")
        time.sleep(0.0005)
    return None


def refuse_a_second(running: Script, folder: Path, job: list, out: Path) -> None:
    """Start the job on the files of a run that has begun and stands still meanwhile: one line, and nothing changed."""
    began, [process] = time.time(), running.processes
    while running.alive() and not any(path.suffix == ".jsonl" and _modified(path) > began for path in files_in(out)):
        time.sleep(0.0005)
    if not running.alive():
        return
    os.kill(process.pid, signal.SIGSTOP)
    try:
        before = {path: _modified(path) for path in files_in(out)}
        if any(path.suffix == ".lock" for path in before):  # else it has just come to its end
            one_error(Script(folder, job).wait(), 2, "--save_weight", "--out_dir")
            assert before == {path: _modified(path) for path in files_in(out)}
    finally:
        os.kill(process.pid, signal.SIGCONT)


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def check_stage(job: list[str], whole: Path, kills: int, steps: int, folder: Path, generator: random.Random) -> Counter:
    """Kill one stage this many times; how often at which kind of moment. AssertionError if it does not end as in the
    folder `whole`."""
    moments: Counter = Counter()
    hits = ends = 0
    parts = folder / "parts"
    resume = [*job, "--out_dir", parts, "--from_resume", 1]
    while hits < kills:
        running, aim = Script(folder, resume), AIMS[hits % len(AIMS)]
        if aim is None:
            refuse_a_second(running, folder, resume, parts)
        moment = kill_somewhere(running, parts, generator.randrange(1, steps), generator, aim)
        if moment:
            moments[moment] += 1
            hits += aim is None or moment.startswith("inside")  # one that came too late is aimed again
            for file in [*parts.rglob("*.pth"), *parts.rglob("*.pt")]:  # complete or absent
                torch.load(file, weights_only=True)
        else:  # it came to its end: compare, and begin again
            running.succeed()
            compare(whole, parts)
            ends += 1
            assert ends < 5 + kills, "kills find no file that is being written"
            shutil.rmtree(parts)
    Script(folder, resume).succeed()
    compare(whole, parts)
    return moments


def compare(whole: Path, parts: Path) -> None:
    [expected] = whole.rglob("*.pth")
    assert_same(expected, parts / expected.relative_to(whole))
    files, left = (sorted(str(file.relative_to(out)) for file in out.rglob("*")) for out in (whole, parts))
    assert left == files


def kill_stages(stages: list[str], kills: int, seed: int, steps: int = 16) -> dict[str, Counter]:
    """Share the kills out over the stages."""
    moments, jobs = {}, {}
    with tempfile.TemporaryDirectory() as name, small_data(Path(name)) as data:
        folder = Path(name)
        models = small_weights(folder)
        for stage in stages:
            script, kind, more = STAGES[stage]
            jobs[stage] = [script, *TINY.split(), "--steps", steps, "--data_path", data[kind], "--val_path", data[kind]]
            jobs[stage] += more.format(**models).split()
        Script(folder, *([*job, "--out_dir", folder / "whole" / stage] for stage, job in jobs.items())).succeed()
        for i, (stage, job) in enumerate(jobs.items()):
            share = kills // len(stages) + (i < kills % len(stages))
            start, generator = time.monotonic(), random.Random(f"{seed} {stage}")
            (folder / stage).mkdir()
            moments[stage] = check_stage(job, folder / "whole" / stage, share, steps, folder / stage, generator)
            found = ", ".join(f"{n} {moment}" for moment, n in sorted(moments[stage].items()))
            print(f"{stage}: {share} kills ({found}): equal; {time.monotonic() - start:.0f} s", flush=True)
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=len(STAGES))
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = kill_stages(args.stages.split(","), args.kills, args.seed)
    total = sum(moments.values(), Counter())
    print(json.dumps({"kills": total.total(), "moments": dict(total), "differing": 0}))


if __name__ == "__main__":
    main()

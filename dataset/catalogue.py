"""Data that others publish and our stages train on or are measured by: what for, how large, under which licence, where.

entry = find_entry("pretrain_mini")         # or pretrain_t2t_mini.jsonl; UnknownName says what replaced an old name

Sizes are those that the publishers state. What counts, bytes and checksums, is in the hub's listing when a file is
fetched (hubs.py).
"""

import difflib
from dataclasses import dataclass
from pathlib import PurePosixPath

MINIMIND = {"huggingface": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
MIXED = "mixed sources: Apache-2.0 and CC-BY-NC-2.0 (not for commercial use)"


class UnknownName(Exception):
    """No entry has this name; the message says which one is meant, or what replaced it."""


@dataclass(frozen=True)
class Entry:
    """Files of one repository that belong together."""

    name: str
    files: str  # pattern of their paths in the repository, as in fnmatch
    use: str  # the stages, and the script that reads them
    rows: str
    size: str  # as published
    licence: str
    repositories: dict[str, str]  # hub: owner/name
    note: str = ""
    folder: str = ""  # below the folder of downloads
    unpack: str = ""  # how, if it is to be unpacked: unpacking.py


def _minimind(name: str, file: str, use: str, rows: str, size: str, note: str = "") -> Entry:
    return Entry(name, file, use, rows, size, MIXED, MINIMIND, note)


def _benchmark(name: str, files: str, unpack: str, rows: str, licence: str, **repositories: str) -> Entry:
    return Entry(name, files, "scripts/evaluate.py", rows, "", licence, repositories, folder=name, unpack=unpack)


TRAINING = (
    _minimind("pretrain_mini", "pretrain_t2t_mini.jsonl", "pretrain (train_pretrain.py)", "text", "1.2 GB",
              "the one to begin with; --max_seq_len about 768"),
    _minimind("pretrain", "pretrain_t2t.jsonl", "pretrain (train_pretrain.py)", "text", "10 GB",
              "--max_seq_len about 380"),
    _minimind("sft_mini", "sft_t2t_mini.jsonl", "SFT (train_full_sft.py, train_lora.py, train_distill.py, "
              "train_reason.py)", "conversations", "1.6 GB",
              "the one to begin with; has tool calls and thinking; --max_seq_len about 768"),
    _minimind("sft", "sft_t2t.jsonl", "SFT (as sft_mini)", "conversations", "14 GB"),
    _minimind("dpo", "dpo.jsonl", "DPO (train_dpo.py)", "chosen, rejected", "53 MB"),
    _minimind("rlaif", "rlaif.jsonl", "RL (train_ppo.py, train_grpo.py)", "conversations", "24 MB",
              "the last answer is blank: the model gives it"),
    _minimind("agent_rl", "agent_rl.jsonl", "RL with tools (train_agent.py)", "conversations, gt", "86 MB"),
    _minimind("agent_rl_math", "agent_rl_math.jsonl", "RL with tools (train_agent.py)", "conversations, gt", "18 MB"),
    _minimind("lora_exam", "lora_exam.jsonl", "LoRA (train_lora.py)", "conversations", "",
              "taken from C-Eval's test questions and from MMLU: after it, these two measure nothing"),
)  # fmt: skip

NC = "CC-BY-NC-SA-4.0 (not for commercial use)"
BENCHMARKS = (
    _benchmark("ceval", "ceval-exam.zip", "zip", "52 subjects, four choices", NC,
               huggingface="ceval/ceval-exam", modelscope="modelscope/ceval-exam"),
    _benchmark("cmmlu", "cmmlu_v1_0_1.zip", "zip", "67 subjects, four choices", NC,
               huggingface="haonan-li/cmmlu", modelscope="modelscope/cmmlu"),
    _benchmark("mmlu", "all/[dt]e*.parquet", "subjects", "57 subjects, four choices", "MIT",
               huggingface="cais/mmlu", modelscope="cais/mmlu"),
    _benchmark("arc_easy", "ARC-Easy/test*.parquet", "splits", "questions, four choices", "CC-BY-SA-4.0",
               huggingface="allenai/ai2_arc", modelscope="allenai/ai2_arc"),
    _benchmark("hellaswag", "data/validation*.parquet", "splits", "texts, four endings", "MIT",
               huggingface="Rowan/hellaswag", modelscope="evalscope/hellaswag"),
    _benchmark("piqa", "*validation*.parquet", "splits", "goals, two solutions", "see its page",
               huggingface="baber/piqa"),
    _benchmark("gsm8k", "main/*.parquet", "splits", "problems with worked answers", "MIT",
               huggingface="openai/gsm8k", modelscope="AI-ModelScope/gsm8k"),
    _benchmark("blimp", "*/*.parquet", "folders", "67 paradigms of sentence pairs", "CC-BY-4.0",
               huggingface="nyu-mll/blimp"),
    _benchmark("zhoblimp", "*.[jp][sa]*", "folders", "118 paradigms of sentence pairs", "see its page",
               huggingface="Junrui1202/zhoblimp"),
)  # fmt: skip

ENTRIES = {entry.name: entry for entry in TRAINING + BENCHMARKS}

# Names in tutorials of 2024 and 2025: the entry that has taken their place ("" = none), and what else to say.
FORMER = {
    "pretrain_data.csv": ("pretrain_mini", ""),
    "pretrain_hq.jsonl": ("pretrain_mini", ""),
    "tokenizer_train.jsonl": ("pretrain_mini", "train_tokenizer.py takes any of the files"),
    "sft_mini_512.jsonl": ("sft_mini", ""),
    "sft_512.jsonl": ("sft", ""),
    "sft_1024.jsonl": ("sft", ""),
    "sft_2048.jsonl": ("sft", ""),
    "sft_data_single.csv": ("sft_mini", ""),
    "sft_data.csv": ("sft_mini", ""),
    "r1_mix_1024.jsonl": ("sft_mini", "which has answers with thinking"),
    "rlaif-mini.jsonl": ("rlaif", ""),
    "lora_identity.jsonl": ("", "train_lora.py without --data_path has an identity to learn"),
    "lora_medical.jsonl": ("", "any conversations of yours do: train_lora.py --data_path FILE"),
}
TOKENS = "a file of token ids of 2024: train_pretrain.py makes its own from text"  # pretrain_data_6400.bin and the like


def find_entry(name: str) -> Entry:
    """The entry of this name, or whose file this is. Raises UnknownName."""
    lower = name.lower()
    by_file = {entry.files: entry for entry in TRAINING}
    by_file |= {PurePosixPath(file).stem: entry for file, entry in by_file.items()}
    if found := ENTRIES.get(lower) or by_file.get(lower):
        return found
    if lower.endswith(".bin"):
        raise UnknownName(f"{name}: {TOKENS}; take pretrain_mini")
    former = FORMER | {PurePosixPath(file).stem: became for file, became in FORMER.items()}
    if lower in former:
        became, remark = former[lower]
        text = f"take {became} ({ENTRIES[became].files}) instead" if became else "nothing has taken its place"
        raise UnknownName(f"{name} is no longer published: {text}{'; ' * bool(remark)}{remark}")
    near = difflib.get_close_matches(lower, [*ENTRIES, *by_file], 1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UnknownName(
        f"{name}: no such name{meant}; --list shows them; other files as a URL, hf:OWNER/NAME/FILE or "
        "modelscope:OWNER/NAME/FILE"
    )

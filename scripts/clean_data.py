"""Cleans data for training: repairs rows, takes out bad ones, duplicates and benchmark questions, and reports on all.

python scripts/clean_data.py raw.jsonl books/ 'shards/*.jsonl.zst' --out clean.jsonl --removed removed.jsonl
python scripts/clean_data.py --rules
"""

import json
import os
import time
from pathlib import Path

import _path  # noqa: F401

import cli
from cli import ArgumentParser
from dataset import clean_rows, filters, repair
from dataset.clean_files import Job, clean_files
from dataset.clean_report import markdown, rules_table, summary, write_json
from dataset.files import DataError
from dataset.overlap import texts_of_file
from dataset.tables import SAMPLES, STAGES, TABLES, Source, data_files, ending, guess_kind


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.rules:
        print(rules_table())
        return
    job = job_of(parser, args)
    started = time.monotonic()
    report = clean_files(job)
    seconds = time.monotonic() - started
    stem = job.out.with_suffix("").with_suffix("") if job.out.suffix in (".gz", ".zst") else job.out.with_suffix("")
    write_json(Path(f"{stem}.report.json"), report)
    Path(f"{stem}.report.md").write_text(markdown(report), encoding="utf-8")
    print(summary(report))
    read = sum(source["bytes"] for source in report["sources"].values())
    print(
        f"{seconds:.1f} s, {read / 1e6 / seconds:.1f} MB/s with {job.num_proc} processes; {stem}.report.md has the rest"
    )


def arguments() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="files, folders or globs: JSONL and JSON of any "
                        "of the known formats, CSV, TSV, Parquet, plain text; plain, .gz or .zst")  # fmt: skip
    parser.add_argument("--out", type=Path, help="the clean rows: .jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--removed", type=Path, metavar="FILE", help="the rows that were taken out, each with its rule")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE", help="this share of the documents goes "
                        "to NAME.val.jsonl beside --out: always the same ones (default: 0)")  # fmt: skip
    parser.add_argument("--num_proc", type=int, default=min(os.cpu_count() or 1, 16), help="processes (default: one a "
                        "core); the output does not depend on it")  # fmt: skip
    add = parser.add_argument_group("what the rows are").add_argument
    add("--kind", choices=["auto", *STAGES], default="auto", help="format of the rows (default: by the first ones)")
    add("--sample_by", choices=SAMPLES, default="line", help="what of a plain text is a row (default: line)")
    add("--text_column", metavar="NAME", help="the column of a table that is the text, if not text or content")
    add = parser.add_argument_group("rules: --rules lists them").add_argument
    add("--rules", action="store_true", help="print all rules with their thresholds and where these come from")
    add("--off", default="", metavar="NAMES", help="rules to leave out, with commas between them")
    add(
        "--set", action="append", default=[], metavar="RULE=VALUE", help="another threshold; may be given several times"
    )
    add("--languages", default=",".join(filters.LANGUAGES), help=f"to keep (default: {','.join(filters.LANGUAGES)})")
    add("--simplify", action="store_true", help="traditional Chinese to simplified (needs opencc)")
    add("--blocked", type=Path, metavar="FILE", help="words of which there must not be many, one a line")
    add = parser.add_argument_group("against other data").add_argument
    add("--against", nargs="+", default=[], metavar="FILE", help="earlier output, whose rows shall not come again")
    add("--questions", nargs="+", default=[], metavar="FILE", help="benchmarks: rows that hold a question go")
    return parser


def job_of(parser: ArgumentParser, args) -> Job:
    """What the arguments ask for."""
    if not args.files or not args.out:
        parser.error("give the files to clean, and --out FILE")
    if not args.out.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        parser.error(f"--out {args.out}: must end in .jsonl, .jsonl.gz or .jsonl.zst")
    if not 0 <= args.holdout < 1:
        parser.error(f"--holdout {args.holdout:g}: a share, from 0 to below 1")
    if args.num_proc < 1:
        parser.error(f"--num_proc {args.num_proc}: must be at least 1")
    names = clean_rows.all_rules()
    off = [name for name in args.off.split(",") if name]
    if unknown := [name for name in off if name not in names]:
        parser.error(f"--off {unknown[0]}: no such rule; --rules lists them")
    languages = args.languages.split(",")
    if unknown := [name for name in languages if name not in filters.LANGUAGES]:
        parser.error(f"--languages {unknown[0]}: known are {', '.join(filters.LANGUAGES)}")
    if args.simplify:
        from model.export.optional import need

        need("opencc", "--simplify")
    files, against = data_files(args.files), data_files(args.against)
    for path in (args.out, args.removed):
        if path and path.exists() and any(path.samefile(file) for file in (*files, *against) if file.exists()):
            parser.error(f"{path}: is read, so it cannot be written too; give another name")
    source = Source(files[0], args.sample_by, args.text_column)
    kind = guess_kind(files[0], source.lines(), source.unit) if args.kind == "auto" else args.kind
    repairs = [name for name in {**repair.TEXT_REPAIRS, **repair.ROW_REPAIRS} if name not in off]
    repairs = [name for name in repairs if name not in repair.OPTIONAL or args.simplify]
    settings = filters.Settings(STAGES[kind], languages, off, limits_of(parser, args.set), blocked_words(args.blocked))
    questions = [text for file in data_files(args.questions) for text in questions_of(file)]
    plan = clean_rows.Plan(settings, repairs, off, questions)
    return Job(
        plan, files, args.out, args.removed, args.holdout, against, args.num_proc, args.sample_by, args.text_column
    )


def limits_of(parser: ArgumentParser, given: list[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in filters.RULES and name != "near":
            parser.error(f"--set {text}: no such threshold; --rules lists them")
        try:
            limits[name] = float(value)
        except ValueError:
            parser.error(f"--set {text}: {value!r} is no number")
    return limits


def blocked_words(path: Path | None):
    if path is None:
        return None
    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it must be UTF-8, a word a line") from None
    return filters.blocked_pattern([word.strip() for word in words])


def questions_of(path: Path) -> list[str]:
    """The questions of a benchmark's file: of each row all texts."""
    texts = list(texts_of_file(path))
    if ending(path) in TABLES:  # where MMLU's, which name no columns, have their first question
        _, line = next(Source(path).lines(), (1, b"{}"))
        texts.append("\n".join(json.loads(line)))
    return texts


if __name__ == "__main__":
    cli.run(main)

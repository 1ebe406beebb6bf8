"""The report of scripts/clean_data.py in words, and the table of its rules."""

import json
from pathlib import Path

from dataset import dedup, filters
from dataset.checks import printable
from dataset.clean_files import writing
from dataset.clean_rows import COPIES, FAULTS, OVERLAP
from dataset.repair import OPTIONAL, ROW_REPAIRS, TEXT_REPAIRS, has_ftfy


def rules_table() -> str:
    """All rules, as printed by --rules."""
    lines = ["Repairs (the row stays):"]
    for name, what in (TEXT_REPAIRS | ROW_REPAIRS).items():
        lines.append(f"  {name:<17} {what}{' (only with --simplify)' * (name in OPTIONAL)}")
    lines.append("\nRules (the row goes); thresholds by language:")
    for name, what in FAULTS.items():
        lines.append(f"  {name:<17} {what}")
    for rule in filters.RULES.values():
        limits = ", ".join(f"{language} {limit:g}" for language, limit in rule.limits.items())
        kind = {"all": "", "sft": "conversations: ", "pretrain": "texts: "}[rule.kinds]
        lines.append(f"  {rule.name:<17} {kind}{rule.what}: {limits} [{rule.source}]")
    for name, what in (OVERLAP | COPIES).items():
        lines.append(f"  {name:<17} {what}")
    return "\n".join(lines)


def write_json(path: Path, report: dict) -> None:
    with writing(path):
        path.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def summary(report: dict) -> str:
    """What a person wants to know at once."""
    lines = []
    rows, kept = (sum(source[key] for source in report["sources"].values()) for key in ("rows", "kept"))
    for name, source in report["sources"].items():
        lines.append(f"{name} ({source['format']}): {source['rows']:,} rows, {source['kept']:,} kept")
    lines.append(f"kept {kept:,} of {rows:,} rows ({kept / max(rows, 1):.1%})")
    for title, counts in (("repaired", report["repaired"]), ("removed", _counts(report))):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for path, output in report["output"].items():
        lines.append(f"{path}: {output['rows']:,} rows, {output['bytes'] / 1e6:,.1f} MB")
    if not has_ftfy():
        lines.append("note: without ftfy (pip install ftfy) rows of broken encodings go, where it would mend many")
    return "\n".join(lines)


def _counts(report: dict) -> dict[str, int]:
    return {rule: entry["rows"] for rule, entry in report["removed"].items()}


def markdown(report: dict) -> str:
    """The report as a page: what was kept of each source, what each rule did, with examples."""
    parts = [f"# Cleaning report\n\nRows: {report['kind']}. {_settings(report)}"]
    head = "| source | format | rows | MB | kept | MB kept |\n| --- | --- | ---: | ---: | ---: | ---: |\n"
    sources = report["sources"].items()
    parts.append(head + "\n".join(f"| {_cell(name)} | {_figures(source)} |" for name, source in sources))
    parts.append("| output | rows | MB | sha256 of the text |\n| --- | ---: | ---: | --- |\n" + "\n".join(
        f"| {_cell(path)} | {output['rows']:,} | {output['bytes'] / 1e6:.2f} | {output['sha256_of_text']} |"
        for path, output in report["output"].items()))  # fmt: skip
    parts.append("Languages: " + ", ".join(f"{name} {count:,}" for name, count in report["languages"].items()))
    if report["repaired"]:
        repaired = "\n".join(f"| {_cell(name)} | {count:,} |" for name, count in report["repaired"].items())
        parts.append(f"## Repaired\n\n| what | rows |\n| --- | ---: |\n{repaired}")
    if report["removed"]:
        parts.append("## Removed\n\n| rule | rows | MB | what |\n| --- | ---: | ---: | --- |\n" + "\n".join(
            f"| {rule} | {entry['rows']:,} | {entry['bytes'] / 1e6:.2f} | {_cell(entry['what'])} |"
            for rule, entry in report["removed"].items()))  # fmt: skip
        names = list(report["removed"])
        rows = "\n".join(
            f"| {_cell(name)} | " + " | ".join(f"{source['removed'].get(rule, 0):,}" for rule in names) + " |"
            for name, source in report["sources"].items()
        )
        parts.append(f"| source | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}\n{rows}")
        parts.append("## Examples of what was removed\n\n" + "\n".join(
            f"- **{rule}**, {example['where']}: {printable(example['why'], 150)}\n  `{_code(example['row'])}`"
            for rule, entry in report["removed"].items() for example in entry["examples"]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _figures(source: dict) -> str:
    sizes = (f"{source['rows']:,}", f"{source['bytes'] / 1e6:.2f}", f"{source['kept']:,}")
    return " | ".join([source["format"], *sizes, f"{source['kept_bytes'] / 1e6:.2f}"])


def _settings(report: dict) -> str:
    texts = [f"Languages kept: {', '.join(report['languages_kept'])}."]
    texts += [f"Rules left out: {', '.join(report['rules_off'])}."] if report["rules_off"] else []
    limits = report["thresholds_set"]
    texts += [f"Thresholds: {', '.join(f'{name} {limit:g}' for name, limit in limits.items())}."] if limits else []
    texts += [f"Held out: {report['holdout']:.2%} of the documents, by hash."] if report["holdout"] else []
    texts += [f"Compared with {', '.join(report['against'])}."] if report["against"] else []
    texts += [f"Benchmark questions: {report['questions']:,}."] if report["questions"] else []
    texts += [f"Near duplicates from a similarity of {limits.get('near', dedup.NEAR):g} on."]
    return " ".join(texts)


def _cell(text: str) -> str:
    return printable(text, 300).replace("|", "\\|")


def _code(text: str) -> str:
    return printable(text, 160).replace("`", "'")

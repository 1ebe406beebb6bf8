"""Fetches the data that others publish: MiniMind's files, benchmarks, any file of a hub, any URL.

python scripts/download_data.py --list
python scripts/download_data.py pretrain_mini sft_mini          # into data/; run again, it goes on where it was
python scripts/download_data.py hf:OWNER/NAME/FILE.jsonl https://example.org/corpus.jsonl.zst
python scripts/download_data.py --check                         # whether what is there is what was published

Hugging Face (or HF_ENDPOINT) and ModelScope are asked at the same time, and the first that answers is taken. Sizes and
checksums are those of its listing. A file has its name only once it is whole.
"""

import argparse
import datetime
import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

import _path  # noqa: F401
from filelock import FileLock

import cli
from cli import ROOT, ArgumentParser, UsageError
from dataset import catalogue
from dataset.catalogue import BENCHMARKS, ENTRIES, FORMER, TOKENS, TRAINING, Entry, UnknownName
from dataset.files import DataError
from dataset.hubs import Hub, answers, hugging_face, model_scope
from dataset.transfer import Download, RemoteFile, digest_of, human
from dataset.unpacking import unpack

RECORD = "downloads.json"  # in the folder of downloads: where each file is from, and its SHA-256
CACHE_FACTOR = 1.5  # the tokens that a training makes of a file, in files: ids, where rows begin, and some to spare
PAGES = re.compile(r"https://(?:huggingface\.co|hf-mirror\.com)/datasets/([^/]+/[^/]+)/(?:blob|resolve)/main/(.+)")


@dataclass
class Wish:
    """What one argument stands for."""

    given: str
    places: list[tuple[Hub, str]]  # hubs and repositories that may have it; none for a URL
    pattern: str  # of the files there; the URL itself
    entry: Entry | None = None


def arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="of --list, a URL, hf:OWNER/NAME/FILE or modelscope:OWNER/NAME/FILE; "
        "with --check: names or files")  # fmt: skip
    add("--list", action="store_true", help="show what there is: for what, how large, under which licence")
    add("--check", action="store_true", help="read the files that are there again and compare them")
    add("--hub", default="auto", metavar="NAME", help="huggingface, modelscope, or the URL of a mirror of Hugging Face "
        "(default: the first that answers)")  # fmt: skip
    add("--out_dir", type=Path, default=ROOT / "data", metavar="FOLDER", help="default: data")
    add("--replace", action="store_true", help="fetch again what is there and is another file")
    add("--timeout", type=float, default=30, help="seconds without an answer (default: 30)")
    add("--retries", type=int, default=8, help="attempts in a row that bring nothing new (default: 8)")
    args = parser.parse_args()
    if not args.timeout > 0 or args.retries < 0:
        parser.error("--timeout must be above 0, --retries at least 0")
    if args.hub not in ("auto", "huggingface", "modelscope") and not args.hub.startswith(("http://", "https://")):
        parser.error(f"--hub {args.hub}: give huggingface, modelscope or the URL of a mirror")
    if not (args.names or args.list or args.check):
        parser.error("give names, such as pretrain_mini sft_mini")
    return args


# ------------------------------------------------------------------------------------------------ what is meant


def hubs_of(args: argparse.Namespace) -> list[Hub]:
    if args.hub == "auto":
        return [hugging_face(), model_scope()]
    named = {"huggingface": hugging_face, "modelscope": model_scope}
    return [named[args.hub]()] if args.hub in named else [Hub("huggingface", args.hub.rstrip("/"))]


def _hugging_face_of(args: argparse.Namespace) -> Hub:
    """Where Hugging Face is asked: at the mirror of --hub URL, if one is given."""
    return hubs_of(args)[0] if args.hub.startswith("http") else hugging_face()


def wish_of(name: str, args: argparse.Namespace) -> Wish:
    """UsageError for what is nothing that can be fetched."""
    if page := PAGES.fullmatch(name.partition("?")[0]):
        hub, host = _hugging_face_of(args), urlsplit(name)
        if args.hub == "auto" and not os.environ.get("HF_ENDPOINT") and host.hostname != "huggingface.co":
            hub = Hub("huggingface", f"{host.scheme}://{host.netloc}")  # the page of a mirror
        return Wish(name, [(hub, page[1])], glob.escape(unquote(page[2])))
    scheme, _, rest = name.partition(":")
    if scheme in ("http", "https"):
        if not urlsplit(name).hostname or not _file_name(name):
            raise UsageError(f"{name}: an address that ends in no file name")
        return Wish(name, [], quote(name, safe="%/:?#[]@!$&'()*+,;=~"))
    if scheme in ("hf", "modelscope"):
        owner, _, path = rest.partition("/")
        repository, _, path = path.partition("/")
        if not (owner and repository and path) or ".." in path.split("/"):
            raise UsageError(f"{name}: give {scheme}:OWNER/NAME/FILE")
        return Wish(
            name,
            [(_hugging_face_of(args) if scheme == "hf" else model_scope(), f"{owner}/{repository}")],
            glob.escape(path),
        )
    try:
        entry = catalogue.find_entry(name)
    except UnknownName as error:
        raise UsageError(str(error)) from None
    places = [(hub, entry.repositories[hub.kind]) for hub in hubs_of(args) if hub.kind in entry.repositories]
    if not places:
        raise UsageError(f"{name} is not on --hub {args.hub}; it is on {' and '.join(entry.repositories)}")
    return Wish(name, places, entry.files, entry)


def _file_name(url: str) -> str:
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    return "" if "/" in name or name in (".", "..") else name


def found(wish: Wish, args: argparse.Namespace) -> Iterator[tuple[str, str | None, list[RemoteFile]]]:
    """(where, token, files) of each place that has it, the fastest first."""
    if not wish.places:
        yield urlsplit(wish.pattern).netloc, None, [RemoteFile(wish.pattern)]
        return
    for hub, files in answers(wish.places, wish.pattern, args.timeout):
        yield hub.name, hub.token, files


def target(wish: Wish, file: RemoteFile, out_dir: Path) -> Path:
    """Where a file is put. A repository's folders are kept for benchmarks, whose files share names."""
    if wish.entry is None or not wish.entry.folder:
        return out_dir / (PurePosixPath(file.path).name if file.path else _file_name(file.url))
    parts = PurePosixPath(file.path).parts
    if ".." in parts or file.path.startswith("/"):
        raise DataError(f"{file.url}: its path {file.path} leads out of the folder")
    return out_dir.joinpath(wish.entry.folder, *parts)


# ------------------------------------------------------------------------------------------------ fetching


def fetch(wish: Wish, args: argparse.Namespace) -> None:
    """From the first place that can give all of it."""
    if wish.entry:
        print(f"{wish.entry.name}: {wish.entry.use}; licence: {wish.entry.licence}", file=sys.stderr)
        if wish.entry.note:
            print(f"  {wish.entry.note}", file=sys.stderr)
    failure = None
    for where, token, files in found(wish, args):
        if failure:
            print(f"note: {failure}", file=sys.stderr)
        try:
            fetch_from(wish, where, token, files, args)
            return
        except DataError as error:
            failure = error
    raise failure or DataError(f"{wish.given}: no hub has it")


def fetch_from(wish: Wish, where: str, token: str | None, files: list[RemoteFile], args: argparse.Namespace) -> None:
    paths = [target(wish, file, args.out_dir) for file in files]
    wanted = [(file, path) for file, path in zip(files, paths, strict=True) if not is_there(file, path, args)]
    require_space(wanted, args.out_dir)
    if wanted:
        size = sum(file.size or 0 for file, _ in wanted)
        what = wanted[0][1].name if len(wanted) == 1 else f"{len(wanted)} files"
        print(f"{what} from {where}{f', {human(size)}' if size else ''}", file=sys.stderr)
    for file, path in wanted:
        digest = Download(file, path, token=token, retries=args.retries, timeout=args.timeout).run()
        remember(wish, file, path, digest, args.out_dir)
        checked = "as the hub lists it" if file.checksum else "there is no listing to compare with"
        if len(files) < 4:
            print(f"{path}  {human(path.stat().st_size)}  sha256 {digest} ({checked})")
    if len(files) >= 4:
        print(f"{os.path.commonpath(paths)}  {len(files)} files, all as the hub lists them")
    if wish.entry and wish.entry.unpack:
        folder = args.out_dir / wish.entry.folder
        made = unpack(wish.entry.unpack, paths, folder)
        unpacked = f", {len(made):,} files unpacked" if made else ""
        print(f"{folder}{unpacked}: python scripts/evaluate.py --data {args.out_dir} --tasks {wish.entry.name}")


def is_there(file: RemoteFile, path: Path, args: argparse.Namespace) -> bool:
    """Whether the very file is there; DataError if another one is, unless --replace is given."""
    if not path.exists():
        return False
    size = path.stat().st_size
    if file.size in (None, size) and file.checksum and digest_of(path, file).matches():
        print(f"{path} is there, as the hub lists it", file=sys.stderr)
        return True
    if args.replace:
        return False
    what = f"has {size:,} bytes, the hub's {file.size:,}" if file.size not in (None, size) else "has other bytes"
    if not file.checksum:
        what = "nothing is known to compare it with"
    raise UsageError(f"{path} is there already, and {what}: --replace fetches it again")


def require_space(wanted: list[tuple[RemoteFile, Path]], out_dir: Path) -> None:
    """DataError if they do not all fit; a note if the tokens that a training makes of them would not."""
    missing = sum(max((file.size or 0) - part_size(path), 0) for file, path in wanted)
    out_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out_dir).free
    if missing > free:
        raise UsageError(
            f"{out_dir} needs {human(missing)} more, and {human(free)} are free: free some, or give another --out_dir"
        )
    tokens = CACHE_FACTOR * sum(file.size or 0 for file, _ in wanted)
    if missing + tokens > free:
        print(f"note: a training makes up to {human(tokens)} of tokens of it, and {human(free - missing)} will be "
              "free: --cache_dir puts them elsewhere", file=sys.stderr)  # fmt: skip


def part_size(path: Path) -> int:
    part = path.with_name(path.name + ".part")
    return part.stat().st_size if part.exists() else 0


def read_record(out_dir: Path) -> dict[str, dict]:
    try:
        record = json.loads((out_dir / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def remember(wish: Wish, file: RemoteFile, path: Path, digest: str, out_dir: Path) -> None:
    facts = {"from": wish.given, "url": file.url, "size": path.stat().st_size, "sha256": digest}
    facts |= {"listed": file.checksum is not None, "date": datetime.date.today().isoformat()}
    facts |= {"licence": wish.entry.licence} if wish.entry else {}
    with FileLock(out_dir / f".{RECORD}.lock"):
        record = read_record(out_dir) | {path.relative_to(out_dir).as_posix(): facts}
        half = out_dir / f".{RECORD}.tmp"
        half.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(half, out_dir / RECORD)


# ------------------------------------------------------------------------------------------------ checking


def check(args: argparse.Namespace) -> None:
    """Reads what is there again. DataError at the end if something is not as it was published."""
    record, bad, good = read_record(args.out_dir), [], 0
    files = list(to_check(args, record))
    if not files:
        raise UsageError(f"{args.out_dir}: nothing was fetched into it; give --out_dir, or names")
    for path, size, checksum, source in files:
        fault = fault_of(path, RemoteFile("", size, checksum))
        print(f"{'BAD ' if fault else 'ok  '} {path}  {fault or f'{human(size)}, as {source}'}")
        bad += [path.name] if fault else []
        good += not fault
    if bad:
        raise DataError(f"{', '.join(bad)}: not as published; run the same command without --check to fetch")


def fault_of(path: Path, wanted: RemoteFile) -> str:
    if not path.exists():
        return (
            f"not there, {human(part_size(path))} of {human(wanted.size)} have come" if part_size(path) else "not there"
        )
    size = path.stat().st_size
    if size != wanted.size:
        return f"{size:,} bytes, it should be {wanted.size:,}"
    return "" if digest_of(path, wanted).matches() else "its bytes are not those that were published"


def to_check(args: argparse.Namespace, record: dict) -> Iterator[tuple[Path, int, str, str]]:
    """(path, size, checksum, who says so): of the record of downloads, else of a hub's listing."""

    def recorded(name: str) -> tuple[Path, int, str, str]:
        facts = record[name]
        source = "the hub listed it" if facts["listed"] else "it was when it came"
        return args.out_dir / name, facts["size"], f"sha256:{facts['sha256']}", f"{source} ({facts['date']})"

    for name in args.names or record:
        path = Path(name).resolve()
        inside = (
            path.relative_to(args.out_dir.resolve()).as_posix() if path.is_relative_to(args.out_dir.resolve()) else name
        )
        names = [key for key in record if key in (name, inside) or record[key]["from"] == name]
        if names:
            yield from map(recorded, names)
            continue
        wish = wish_of(name, args)
        if not wish.places:
            raise UsageError(f"{name} was not fetched into {args.out_dir}: there is nothing to compare it with")
        for where, _, files in found(wish, args):
            for file in files:
                if not file.checksum:
                    raise DataError(f"{where} lists no checksum of {file.path}: there is nothing to compare it with")
                yield target(wish, file, args.out_dir), file.size, file.checksum, f"{where} lists it"
            break


# ------------------------------------------------------------------------------------------------ the list


def show_list() -> None:
    for title, entries in (("training data", TRAINING), ("benchmarks", BENCHMARKS)):
        print(f"{title}\n")
        for entry in entries:
            print(f"  {entry.name:<14} {entry.size or '?':>7}  {entry.use}; rows: {entry.rows}")
            if entry.note:
                print(f"{'':26}{entry.note}")
            if entries is BENCHMARKS:
                where = ", ".join(f"{hub}: {repository}" for hub, repository in entry.repositories.items())
                print(f"{'':26}{where}; licence: {entry.licence}")
        if entries is TRAINING:
            where = ", ".join(f"{hub}: {repository}" for hub, repository in TRAINING[0].repositories.items())
            print(f"\n  {where}\n  licence of all: {TRAINING[0].licence}\n")
    print("\nSizes as published (? = not stated); bytes and checksums are asked of the hub when a file is fetched.")
    print("\nnames in older tutorials\n")
    for name, (became, remark) in FORMER.items():
        now = f"now {became} ({ENTRIES[became].files})" if became else "no longer published"
        print(f"  {name:<21} {now}{'; ' * bool(remark)}{remark}")
    print(f"  {'*.bin':<21} {TOKENS}")


def main() -> None:
    args = arguments()
    if args.list:
        show_list()
        return
    if args.check:
        check(args)
        return
    wishes = [wish_of(name, args) for name in args.names]
    for wish in wishes:
        fetch(wish, args)


if __name__ == "__main__":
    cli.run(main)

"""What a data file is, by its first bytes, and its rows as lines of UTF-8: JSONL, plain or compressed, in UTF-8, UTF-16
or GB18030; a JSON array; JSON objects over several lines. Anything else is refused with what it is and what to do.

file = DataFile("rows.json.gz"); file.kind; for number, line in file.lines(): ...
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dataset import parquet

MAX_LINE = 64 << 20  # bytes; a longer line is not a row, and would have to be held in memory whole
HEAD = 1 << 20  # bytes that a file is known by
BUFFER = 1 << 20
BLANKS = re.compile("[ \\t\\r\\n\\ufeff]*")
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)  # from the disk, or to unpack


class DataError(Exception):
    """A data file cannot be used; the message names the file, the fault and the remedy. Scripts print it and exit 1."""


class DataFile:
    """A file of rows. `kind`: what it is, [] for JSONL in UTF-8. `unit`: what lines() counts: "line" or "row".

    DataError names a file that is missing or no file of rows, and what to do.
    """

    def __init__(self, path: str | Path):
        self.path, self.kind, self.unit, self._raw = Path(path), [], "line", None
        self._done = 0  # bytes of a Parquet file
        try:
            if self.path.is_dir():
                raise DataError(_folder(self.path))
            if self.path.exists() and not self.path.is_file():
                raise DataError(f"{path}: not a file; give the path of one JSONL file")
            with open(self.path, "rb") as raw:
                self.packed = _compression(raw.read(16))
            head = self._head(unpack=False)
            if head.startswith(b"PAR1"):
                self._look_at_parquet()
                return
            if remedy := _other_format(self.path, head):
                raise DataError(f"{path}: {remedy}")
            self._look()
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; check the path") from None
        except UNREADABLE as error:
            raise self._unreadable(error) from None

    def _look(self) -> None:
        """Finds the encoding and the layout of the rows."""
        head = self._head()
        if self.packed and (remedy := _other_format(self.path, head)):
            raise DataError(f"{self.path}: {remedy}; it lies in the {self.packed} file")
        self.encoding = encoding_of(head)
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        text = decoder.decode(head).removeprefix("\ufeff")
        self.layout = _layout(text, whole=len(head) < HEAD)
        if self.layout == "lines" and (remedy := _not_json(self.path, text, self.encoding)):
            first = f"unpack this {self.packed} file first; it holds " if self.packed else ""
            raise DataError(f"{self.path}: {first}{remedy}")
        self.text_size = self._text_size(len(head))
        self.kind = [self.packed] * bool(self.packed)
        self.kind += [self.encoding.upper()] * (self.encoding != "utf-8")
        if self.layout != "lines":
            self.unit = "row"
            self.kind.append("JSON array" if self.layout == "array" else "JSON objects over several lines")

    def _look_at_parquet(self) -> None:
        self.layout, self.packed, self.encoding, self.kind, self.unit = "parquet", "", "utf-8", ["Parquet"], "row"
        self.text_size = parquet.text_size(self.path)

    def _head(self, unpack: bool = True) -> bytes:
        with open(self.path, "rb") as raw:
            return (self._unpacked(raw) if unpack else raw).read(HEAD)

    def _text_size(self, head: int) -> int:
        """Bytes of the text, about: those of a compressed file are known by its beginning."""
        size = self.path.stat().st_size
        if not self.packed or head < HEAD:
            return head if self.packed else size
        with open(self.path, "rb") as raw:
            self._unpacked(raw).read(HEAD)
            return size * HEAD // max(raw.tell(), 1)

    def _unpacked(self, raw: io.BufferedReader) -> io.BufferedIOBase:
        return io.BufferedReader(_opener(self.packed)(raw), BUFFER) if self.packed else raw

    @property
    def position(self) -> int:
        """Bytes of the file, compressed as it is, that lines() has read."""
        if self.layout == "parquet":
            return self._done
        return self._raw.tell() if self._raw and not self._raw.closed else 0

    def lines(self, after: int = 0, position: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields (number from 1, bytes in UTF-8 with the line end). Only byte 0x0A ends a line; one is cut at MAX_LINE.
        Of an array or of objects over several lines, a row is a line. Memory does not grow with the file.
        after: the number of lines that are left out at the beginning; position: what it was after them."""
        begin = after if position and not self.kind else 0  # plain lines: those before need not be read
        number = begin
        try:
            if self.layout == "parquet":
                for number, (line, share) in enumerate(parquet.lines(self.path), 1):
                    self._done = int(share * self.path.stat().st_size)
                    if number > after:
                        yield number, line
                return
            with open(self.path, "rb") as self._raw:
                self._raw.seek(position if begin else 0)
                stream = self._unpacked(self._raw)
                lines = self._lines(stream) if self.layout == "lines" else self._values(stream)
                for number, line in enumerate(lines, begin + 1):
                    if number > after:
                        yield number, line
        except UNREADABLE as error:
            raise self._unreadable(error, number) from None

    def _unreadable(self, error: Exception, number: int = 0) -> DataError:
        where = f" after {self.unit} {number}" if number else ""
        if isinstance(error, UnicodeDecodeError):
            name = self.encoding.upper()
            return DataError(f"{self.path}: not {name}{where}, as its beginning is; save it as UTF-8 and run again")
        if isinstance(error, OSError) and error.strerror and error.errno:
            return DataError(f"{self.path}: cannot be read: {error.strerror}")
        what = f"the {self.packed or 'Parquet'} data is cut off or damaged{where} ({error})"
        return DataError(f"{self.path}: {what}; download or copy the file again")

    def _lines(self, stream: io.BufferedIOBase) -> Iterator[bytes]:
        if self.encoding.startswith("utf-") and self.encoding != "utf-8":
            text = io.TextIOWrapper(stream, self.encoding, newline="\n")
            for number in itertools.count(1):
                if not (line := text.readline(MAX_LINE)):
                    return
                yield (line.removeprefix("\ufeff") if number == 1 else line).encode("utf-8", "surrogatepass")
        while line := stream.readline(MAX_LINE):
            rest = line
            while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_LINE)
            yield _from_gb18030(line) if self.encoding == "gb18030" else line

    def _values(self, stream: io.BufferedIOBase) -> Iterator[bytes]:
        """The values of an array, or one after the other, each as a line. A broken one ends in DataError, for what
        follows it cannot be told apart; one that the file's end cuts off is yielded without a line end."""
        text, scan, before = _Text(self, stream), json.JSONDecoder().raw_decode, 0
        array, separated = self.layout == "array", True
        if array:
            text.next()
            text.at += 1
        while True:
            char = text.next()
            if not separated and char == ",":
                text.at, separated = text.at + 1, True
                char = text.next()
            elif not separated and char not in ("]", ""):
                raise text.broken(before, "no comma before it")
            if char == "":
                if array:
                    yield b"["  # its closing bracket is cut off
                return
            if array and char == "]":
                text.at += 1
                if text.next():
                    raise text.broken(before, "more text after the array's end")
                return
            try:
                _, end = scan(text.text, text.at)
            except (ValueError, RecursionError) as error:
                if text.more(before):
                    continue
                if not isinstance(error, json.JSONDecodeError) or not runs_out(error):
                    raise text.broken(before, f"not JSON: {error}") from None
                yield text.text[text.at :].encode("utf-8", "surrogateescape")
                return
            if end == len(text.text) and text.more(before):
                continue  # a number may go on
            yield text.text[text.at : end].replace("\n", " ").encode("utf-8", "surrogateescape") + b"\n"
            before, text.at, separated = before + 1, end, not array


class _Text:
    """The text of a stream from `at` on, as much of it as has been asked for."""

    def __init__(self, file: DataFile, stream: io.BufferedIOBase):
        self.file, self.stream = file, stream
        errors = "surrogateescape" if file.encoding == "utf-8" else "strict"  # the bytes come back for parse_line()
        self.decoder = codecs.getincrementaldecoder(file.encoding)(errors)
        self.text, self.at, self.line, self.ended = "", 0, 1, False  # line: of the beginning of `text`

    def next(self) -> str:
        """The next character that is not blank; "" at the end."""
        while (at := BLANKS.match(self.text, self.at).end()) == len(self.text):
            self.at = at
            if not self.more():
                return ""
        self.at = at
        return self.text[at]

    def more(self, before: int = 0) -> bool:
        """Reads on: at least as much as there is, so that reading a long value again and again stays linear."""
        if self.ended:
            return False
        if len(self.text) - self.at > MAX_LINE:
            raise self.broken(before, f"over {MAX_LINE >> 20} MB long, or not JSON")
        self.line += self.text.count("\n", 0, self.at)
        data = self.stream.read(max(BUFFER, len(self.text) - self.at))
        self.ended = not data
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, self.ended), 0
        return True

    def broken(self, before: int, why: str) -> DataError:
        where = f"row {before + 1}, which begins in line {self.line + self.text.count(chr(10), 0, self.at)}"
        return DataError(f"{self.file.path}: {where}: {why}; mend the file, or write it as JSONL, an object a line")


def with_path(text: str, path: Path, kind: list[str]) -> str:
    """The remedy of a fault, in which the commands say FILE, for this file of this kind."""
    if "JSON array" in kind:
        text = text.replace("jq -c '", "jq -c '.[] | ")
    return text.replace("FILE > NEW", f"{shlex.quote(str(path))} > NEW")


def runs_out(error: json.JSONDecodeError) -> bool:
    """Whether the text is the beginning of JSON: what is wrong with it is its end."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip()) - 5


# ------------------------------------------------------------------------------------------------ compression

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _compression(head: bytes) -> str:
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), "")


def unpacked(raw: io.BufferedReader) -> io.BufferedIOBase:
    """What a file that stands at its beginning holds: itself, or what it is if it is not compressed."""
    packed = _compression(raw.read(16))
    raw.seek(0)
    return io.BufferedReader(_opener(packed)(raw), BUFFER) if packed else raw


def _opener(name: str) -> Callable:
    """Of a file in this compression: the stream of what it holds."""
    if name == "zstd":
        import pyarrow  # the standard library has it from Python 3.14 on

        return lambda raw: pyarrow.CompressedInputStream(raw, "zstd")
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[name]


# ------------------------------------------------------------------------------------------------ encodings

BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16, whose mark they begin with
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# The commonest characters of Chinese: about a third of any text, and hardly any of what other encodings look like.
COMMON = set(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没"
    "动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手"
    "应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条"
    "平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听"
    "白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运"
)
THREE_BYTES = re.compile(rb"[\xe1-\xef][\x80-\xbf]{2}")


def encoding_of(head: bytes) -> str:
    """What the file's beginning is written in; "utf-8" also where it cannot be told, and then lines are faulty."""
    for mark, name in BOMS.items():
        if head.startswith(mark):
            return name
    if head[:2] in (b"{\0", b"[\0"):
        return "utf-16-le"
    if head[:2] in (b"\0{", b"\0["):
        return "utf-16-be"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
        return "utf-8"
    except UnicodeDecodeError:
        return "gb18030" if _is_gb18030(head) else "utf-8"


def _is_gb18030(head: bytes) -> bool:
    """Without doubt: it can be decoded, what it says is Chinese, and hardly a line is Chinese in UTF-8."""
    lines = [line for line in head.split(b"\n") if not line.isascii()]
    others = [line for line in lines if not (THREE_BYTES.search(line) and _is_utf8(line))]
    if len(others) < 0.9 * len(lines):
        return False
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(b"\n".join(others))
    except UnicodeDecodeError:
        return False
    chinese = re.findall("[\u3400-\u9fff]", text)
    kana = len(re.findall("[\u3040-\u30ff]", text))  # Japanese EUC shares their codes with GB18030
    return sum(char in COMMON for char in chinese) >= max(0.12 * len(chinese), 1) and kana < len(chinese)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


def _from_gb18030(line: bytes) -> bytes:
    """The line in UTF-8; as it is if it cannot be GB18030, or is UTF-8 in the midst of it."""
    if line.isascii() or (THREE_BYTES.search(line) and _is_utf8(line)):
        return line
    try:
        return line.decode("gb18030").encode("utf-8")
    except UnicodeDecodeError:
        return line


# ------------------------------------------------------------------------------------------------ layout


def _layout(text: str, whole: bool) -> str:
    """ "lines", "array" or "objects" (each over several lines), by the beginning of the file, or the `whole` of it."""
    start = text.lstrip()
    first, _, rest = start.partition("\n")
    if start.startswith("[") and not start[1:].lstrip().startswith("]"):
        return "lines" if _value(first) is not None and rest.strip() else "array"
    if not start.startswith("{") or not rest.strip() or _value(first) is not None:
        return "lines"
    try:
        _, end = json.JSONDecoder().raw_decode(start)
        return "objects" if "\n" in start[:end].strip() else "lines"
    except json.JSONDecodeError as error:
        return "objects" if not whole and runs_out(error) else "lines"
    except RecursionError:
        return "lines"


def _value(line: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------ what is no data

MAGICS = {
    b"ARROW1": "Arrow",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
    b"7z\xbc\xaf": "a 7z archive; unpack it (7z x FILE) and give the JSONL file in it",
    b"Rar!": "a RAR archive; unpack it (unrar x FILE) and give the JSONL file in it",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GGUF": "weights (GGUF), not data",
    b"\x7fELF": "a program",
}


def _folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if re.search(r"\.jsonl?(\.\w+)?$", entry.name))
    there = f"; in it there are {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else ""
    return f"{path}: a folder, not a file{there}; give the path of one JSONL file"


def _other_format(path: Path, head: bytes) -> str | None:
    """What a file that is no text is, and what to do; None if nothing is known of it."""
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        size = f" of {int(size[1]):,} bytes" if size else ""
        return f"a Git LFS pointer to a file{size}, not the file: run git lfs pull in its repository, or download it"
    if head.startswith(b"PAR1"):  # inside a compressed one: Parquet has to be read from its end
        return "a parquet file; unpack it first, for it is compressed in itself"
    if head.startswith(b"ARROW1"):
        return "an arrow file; write it as JSONL: " + _python(
            f"import datasets; datasets.load_dataset('arrow', data_files='{path}')['train']", path
        )
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head[257:262] == b"ustar":
        return f"a tar archive; unpack it (tar -xf {path}) and give the JSONL file in it"
    for magic, what in MAGICS.items():
        if head.startswith(magic):
            return what if ";" in what else f"{what}; give a JSONL file"
    return None


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "a damaged zip archive; download it again"
    if "xl/workbook.xml" in names:
        code = f"import pandas; pandas.read_excel('{path}')"
        return "an Excel workbook; write it as JSONL: " + _python(code, path, pandas=True)
    if "word/document.xml" in names:
        return "a Word document; save its text as JSONL"
    if any(name.endswith("data.pkl") for name in names):
        return "weights (a PyTorch file), not data; give a JSONL file"
    data = [name for name in names if re.search(r"\.jsonl?$", name)]
    there = f" {data[0]}" if data else " the JSONL file"
    return f"a zip archive; unpack it (unzip {path}) and give{there} in it"


def _python(code: str, path: Path, pandas: bool = False) -> str:
    options = "orient='records', lines=True, force_ascii=False" if pandas else "force_ascii=False"
    return f"python -c \"{code}.to_json('{path.with_suffix('.jsonl')}', {options})\""


def _not_json(path: Path, text: str, encoding: str) -> str | None:
    """What a text without a single JSON object at its beginning is, and what to do; None if it may be JSONL."""
    lines = [line.strip() for line in itertools.islice(text.split("\n"), 200) if line.strip()]
    if not lines or any(line.startswith(("{", "[", '"{')) for line in lines) or any(map(_is_value, lines)):
        return None
    if re.match(r"<(!doctype|html|head|body|\?xml|!--|\w+[ >])", lines[0], re.IGNORECASE):
        what = "a page of HTML or XML, not the data (an error, or a login?)"
        return f"{what}; download the file itself; of huggingface.co, with /resolve/ for /blob/ in its address"
    if "\0" in text:
        return "a binary file, not JSONL; give a JSONL file"
    if (separator := _separator(path, lines)) is not None:
        what = "TSV" if separator == "\t" else "CSV"
        options = r", sep='\t'" * (separator == "\t") + f", encoding='{encoding}'" * (encoding != "utf-8")
        code = f"import pandas; pandas.read_csv('{path}'{options})"
        return f"{what}, not JSONL; convert it: " + _python(code, path, pandas=True)
    code = "import json, sys; sys.stdout.reconfigure(encoding='utf-8'); "
    code += "[print(json.dumps({'text': line.strip()}, ensure_ascii=False)) for line in open(sys.argv[1], "
    code += f"encoding='{encoding}') if line.strip()]"
    command = f'python -c "{code}" {path} > {path.with_suffix(".jsonl")}'
    return f"plain text, not JSONL; to make each of its lines a row: {command}"


def _is_value(line: str) -> bool:
    """Whether the line is JSON of some sort: a wrong row, but a row."""
    return _value(line) is not None or line == "null"


def _separator(path: Path, lines: list[str]) -> str | None:
    if path.suffix.lower() in (".csv", ".tsv"):
        return "\t" if "\t" in lines[0] else ","
    for separator in "\t,":
        cells = next(csv.reader(lines[:1], delimiter=separator), [])
        if len(cells) > 1 and all(re.fullmatch(r"\s*[\w .-]{1,40}\s*", cell) for cell in cells) and len(lines) > 1:
            if all(separator in line for line in lines[:5]):
                return separator
    return None

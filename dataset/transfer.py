"""One file over HTTP: it goes on where a killed process or a cut line left it, and is put in place only when its length
and its checksum are right.

digest = Download(RemoteFile(url, size, "sha256:..."), path).run()      # DataError says what is wrong and what to do

The standard library, and no hub's client: huggingface_hub 2.4 begins a file anew in each process and does not check its
SHA-256, hf-xet passes HF_ENDPOINT by, and modelscope-hub knows neither mirrors nor plain URLs.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from dataset.files import DataError

BLOCK = 1 << 20
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what may pass
LONGEST_PAUSE = 30  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class RemoteFile:
    """Where a file is, and what is known of it beforehand. checksum: "sha256:HEX", or "git:HEX", the SHA-1 that git
    gives a file, where a hub has no other."""

    url: str
    size: int | None = None
    checksum: str | None = None
    path: str = ""  # in its repository


def human(size: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


# ------------------------------------------------------------------------------------------------ HTTP


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows them, 308 as 307, and takes a token to no other host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        request = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if request and urlsplit(request.full_url)[:2] != urlsplit(req.full_url)[:2]:
            request.headers.pop("Authorization", None)
        return request

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def open_url(url: str, headers: dict[str, str], timeout: float, token: str | None = None) -> http.client.HTTPResponse:
    """The reply to a GET. The token is shown only to a server that asks for one."""
    opener = urllib.request.build_opener(_Redirects)
    headers = {"User-Agent": "minimind", "Accept-Encoding": "identity"} | headers
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403) or not token:
            raise
        error.close()
        headers["Authorization"] = f"Bearer {token}"
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)


def explain(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}".strip()
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason) or type(error).__name__


# ------------------------------------------------------------------------------------------------ checksums


class Digest:
    """SHA-256 of what passes by, and the checksum that is wanted if that is another one."""

    def __init__(self, checksum: str | None, size: int | None):
        self.wanted, self.sha256, self.git = checksum, hashlib.sha256(), None
        if checksum and checksum.startswith("git:"):
            self.git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)

    def update(self, block: bytes) -> None:
        self.sha256.update(block)
        if self.git:
            self.git.update(block)

    def matches(self) -> bool:
        """True too where nothing is known to compare with."""
        found = f"git:{self.git.hexdigest()}" if self.git else f"sha256:{self.sha256.hexdigest()}"
        return self.wanted in (None, found)


def digest_of(path: Path, remote: RemoteFile) -> Digest:
    """Of a file that is there, with progress. OSError if it cannot be read."""
    digest, size = Digest(remote.checksum, remote.size), path.stat().st_size
    meter = Meter(f"checking {path.name}", size)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            meter.show(file.tell())
    meter.end()
    return digest


class Meter:
    """Progress on standard error: a line that is redrawn on a terminal, one every ten seconds elsewhere."""

    def __init__(self, name: str, total: int | None):
        self.name, self.total, self.tty = name, total, sys.stderr.isatty()
        self.every = 0.2 if self.tty else 10.0
        self.samples: deque[tuple[float, int]] = deque(maxlen=50)  # of the last ten seconds, to tell the speed
        self.due, self.shown = time.monotonic() + max(self.every, 1), False

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not self.samples or now - self.samples[-1][0] >= 0.2:
            self.samples.append((now, done))
        if now < self.due:
            return
        self.due, self.shown = now + self.every, True
        seconds, moved = now - self.samples[0][0], done - self.samples[0][1]
        speed = moved / max(seconds, 1e-9)
        parts = [human(done)]
        if self.total:
            bar = int(20 * done / self.total)
            parts = [
                f"[{'#' * bar}{'.' * (20 - bar)}] {done / self.total:4.0%}",
                f"{human(done)} of {human(self.total)}",
            ]
        parts.append(f"{human(speed)}/s")
        if self.total and speed > 0:
            left = int((self.total - done) / speed)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        line = f"{self.name}  {'  '.join(parts)}"
        print(f"\r\033[K{line}" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        print(f"\r\033[K{text}" if self.tty else text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.tty and self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ a file


class Download:
    """Brings a file to `path`. What has come so far is PATH.part, and PATH.part.json says of which file it is the
    beginning.

    retries: attempts in a row that bring nothing new, before it gives up. timeout: seconds without a byte."""

    def __init__(
        self, remote: RemoteFile, path: Path, *, token: str | None = None, retries: int = 8, timeout: float = 30
    ):
        self.remote, self.path, self.token, self.retries, self.timeout = remote, path, token, retries, timeout
        self.part, self.note = (path.with_name(path.name + suffix) for suffix in (".part", ".part.json"))
        self.done, self.size, self.version = 0, remote.size, None  # version: a strong ETag
        self.begun_by_others = self.ended = False

    def run(self) -> str:
        """Returns the SHA-256 in hex. DataError if the file cannot be had; what has come is kept unless it is wrong."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise DataError(f"{self.path} is being fetched by another process: wait for its end") from None
        self.meter = Meter(self.path.name, self.size)
        try:
            self._take_up()
            while True:
                self._receive_all()
                if self._in_place():
                    return self.digest.sha256.hexdigest()
        except OSError as error:
            if error.errno in FULL:
                text = f"no space left for {self.path}: {human(self.done)} of it are kept; free some and run again"
                raise DataError(text) from None
            raise
        finally:
            self.meter.end()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)  # while it is held
            lock.release()

    # -------------------------------------------------------------------------------- what is there

    def _take_up(self) -> None:
        """Go on from a part if it is surely of this file: listed with the same checksum, or with a version that the
        server is asked for."""
        self.digest = Digest(self.remote.checksum, self.size)
        if not self.part.exists():
            return
        try:
            was = json.loads(self.note.read_text(encoding="utf-8"))
            was = was if isinstance(was, dict) else {}
        except (OSError, ValueError):
            was = {}
        same_url = was.get("url") == self.remote.url
        if self.remote.checksum:
            same = (was.get("checksum"), was.get("size")) == (self.remote.checksum, self.size)
        else:
            same = same_url and was.get("version") is not None
            self.size = self.size or was.get("size")
        length = self.part.stat().st_size
        if not same or (self.size is not None and length > self.size):
            self._anew("what is there is no part of the file as it is now" if length else "")
            return
        self.version = was.get("version") if same_url else None
        self.done, self.begun_by_others = length, bool(length)
        if length:
            self.meter.say(f"{self.path.name}: going on after {human(length)}")
            known = RemoteFile(self.remote.url, self.size, self.remote.checksum)
            self.digest = digest_of(self.part, known)

    def _anew(self, why: str) -> None:
        if why:
            self.meter.say(f"{self.path.name}: {why}: it is fetched from the beginning")
        self.part.unlink(missing_ok=True)
        self.done, self.size, self.version = 0, self.remote.size, None
        self.begun_by_others = self.ended = False
        self.digest = Digest(self.remote.checksum, self.size)

    def _remember(self) -> None:
        facts = {"url": self.remote.url, "size": self.size, "checksum": self.remote.checksum, "version": self.version}
        half = self.note.with_name(self.note.name + ".tmp")
        half.write_text(json.dumps(facts), encoding="utf-8")
        os.replace(half, self.note)

    # -------------------------------------------------------------------------------- the line

    def _receive_all(self) -> None:
        """Until nothing is missing; a cut line is taken up again."""
        furthest, failures = self.done, 0
        while not self.ended and (self.size is None or self.done < self.size):
            pause, error = 0.0, None
            try:
                self._receive()
            except (OSError, http.client.HTTPException) as caught:
                if getattr(caught, "errno", None) in FULL and not isinstance(caught, urllib.error.URLError):
                    raise
                error, pause = caught, self._pause_after(caught)
            if self.done > furthest:
                furthest, failures, pause = self.done, 0, 0.0
                continue
            if self.ended or (error is None and self.done == self.size):
                continue
            failures += 1
            if failures > self.retries:
                why = explain(error) if error else "the server's file keeps changing"
                raise DataError(
                    f"{self.remote.url}: {why}, {failures} times in a row; {human(self.done)} are kept: run again to "
                    "go on, or try another --hub"
                ) from None
            pause = min(pause or 2.0 ** (failures - 2), LONGEST_PAUSE) if failures > 1 else pause
            if error and pause >= 2:
                self.meter.say(f"{self.path.name}: {explain(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)

    def _pause_after(self, error: Exception) -> float:
        """Seconds that the server asks for, 0 if it does not. DataError for what will not pass."""
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == 416 and self.done:
                total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                if total and int(total[1]) == self.done and self.version and self.size in (None, self.done):
                    self.ended, self.size = True, self.done
                else:
                    self._anew("the server has no such part of it")
                return 0.0
            if error.code not in AGAIN:
                self._refused(error)
            wait = error.headers.get("Retry-After", "")
            return min(float(wait), LONGEST_PAUSE) if wait.isdecimal() else 0.0
        if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
            raise DataError(f"{self.remote.url}: its certificate is not valid ({explain(error)})") from None
        return 0.0

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        remedy = "check the address"
        if error.code in (401, 403):
            remedy = "it wants an account: accept its conditions on its page, and set HF_TOKEN"
        elif error.code in (404, 410):
            remedy = "there is no such file: check the name"
        raise DataError(f"{self.remote.url}: {explain(error)}; {remedy}") from None

    def _receive(self) -> None:
        """One request: the rest of the file, or all of it. Returns early where the server has another file by now."""
        headers = {}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
            if self.version:
                headers["If-Range"] = self.version
        with open_url(self.remote.url, headers, self.timeout, self.token) as reply:
            if not self._agrees(reply):
                return
            self._require_space()
            self._remember()
            with open(self.part, "ab") as file:
                while block := reply.read1(BLOCK):
                    file.write(block)
                    file.flush()  # what has come outlives a kill
                    self.digest.update(block)
                    self.done += len(block)
                    self.meter.show(self.done)
                    if self.size is not None and self.done > self.size:
                        break
            if self.size is None:
                self.ended, self.size = True, self.done
            elif self.done < self.size:
                raise ConnectionError("the line was cut")

    def _agrees(self, reply: http.client.HTTPResponse) -> bool:
        """Whether what comes now continues what is there; notes the length and the version of the file."""
        etag = reply.headers.get("ETag", "")
        version = etag if etag.startswith('"') else None  # a weak one does not speak of bytes
        length = reply.headers.get("Content-Length", "")
        total = self.done + int(length) if length.isdecimal() else None
        if self.done and reply.status == 206:
            spoken = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", ""))
            if spoken and spoken[2] != "*":
                total = int(spoken[2])
            changed = (self.version and version and version != self.version) or (total or self.size) != self.size
            if changed or not spoken or int(spoken[1]) != self.done:
                self._anew("the file has changed on the server" if changed else "the server sends another part")
                return False
        elif self.done:
            changed = self.version and version != self.version
            self._anew("the file has changed on the server" if changed else "the server cannot send the rest alone")
            total = int(length) if length.isdecimal() else None
        self._require_a_file(reply, total)
        self.size = total if self.size is None else self.size
        self.meter.total, self.version = self.size, version or self.version
        return True

    def _require_a_file(self, reply: http.client.HTTPResponse, total: int | None) -> None:
        if total is not None and self.remote.size not in (None, total):
            raise DataError(
                f"{self.remote.url}: the server announces {total:,} bytes, the hub's listing {self.remote.size:,}: it "
                "is not that file; try another --hub"
            )
        page = reply.headers.get_content_type() == "text/html" and not self.path.name.endswith((".html", ".htm"))
        if page and not self.remote.checksum:
            raise DataError(f"{self.remote.url}: this is a web page, not a file: give the address of its download")

    def _require_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        missing = (self.size or 0) - self.done
        if missing > free:
            raise DataError(
                f"{self.path} needs {human(missing)} more, and {human(free)} are free: free some, or give another "
                "--out_dir"
            )

    # -------------------------------------------------------------------------------- the end

    def _in_place(self) -> bool:
        """Whether the file was right and is in its place now; False: it is to be fetched once more."""
        if self.done != self.size or not self.digest.matches():
            fault = f"{self.remote.url}: the {self.done:,} bytes that came are not those that the hub lists"
            if self.begun_by_others:
                self._anew("the bytes are not those that the hub lists")
                return False
            self.part.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)
            raise DataError(f"{fault} (checksum); nothing is kept: run again, or try another --hub")
        if not self.part.exists():  # an empty file
            self.part.touch()
        with open(self.part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.part, self.path)
        self.note.unlink(missing_ok=True)
        return True

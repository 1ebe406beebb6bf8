"""Hugging Face, its mirrors and ModelScope: which files a data set has, with size and checksum, and their addresses.

for hub, files in answers([(hub, "owner/name"), ...], "*.jsonl"): ...      # the hubs that answer, the fastest first
"""

import fnmatch
import http.client
import json
import os
import queue
import re
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urljoin, urlsplit

from dataset.files import DataError
from dataset.transfer import RemoteFile, explain, open_url

MOST_PAGES = 1000
PAGE = 100


@dataclass(frozen=True)
class Hub:
    """kind: whose addresses it has, "huggingface" or "modelscope"."""

    kind: str
    endpoint: str

    @property
    def name(self) -> str:
        return urlsplit(self.endpoint).netloc

    @property
    def token(self) -> str | None:
        """HF_TOKEN, for the hub that it is of, and never unencrypted over a network."""
        parts = urlsplit(self.endpoint)
        safe = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
        ours = self.kind == "huggingface" and self.endpoint == hugging_face().endpoint
        return os.environ.get("HF_TOKEN") or None if safe and ours else None


def hugging_face() -> Hub:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return Hub("huggingface", (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/"))


def model_scope() -> Hub:
    return Hub("modelscope", (os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn").rstrip("/"))


def address(hub: Hub, repository: str, path: str) -> str:
    """Of a file in a data set."""
    if hub.kind == "huggingface":
        return f"{hub.endpoint}/datasets/{quote(repository)}/resolve/main/{quote(path)}"
    query = urlencode({"Source": "SDK", "Revision": "master", "FilePath": path, "View": "False"})
    return f"{hub.endpoint}/api/v1/datasets/{quote(repository)}/repo?{query}"


def listing(hub: Hub, repository: str, timeout: float) -> list[RemoteFile]:
    """All files of a data set. DataError if the hub does not have it or does not answer."""
    pages = _hugging_face_pages if hub.kind == "huggingface" else _model_scope_pages
    try:
        return [
            _remote(hub, repository, row) for page in pages(hub, repository, timeout) for row in page if _is_file(row)
        ]
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403, 404):
            account = "" if error.code == 404 else ", or it wants an account: accept its conditions and set HF_TOKEN"
            raise DataError(f"{hub.name}: {explain(error)}: no data set {repository}{account}") from None
        raise DataError(f"{hub.name}: {explain(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{hub.name}: {explain(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{hub.name}: its listing of {repository} is not as expected") from None


def _hugging_face_pages(hub: Hub, repository: str, timeout: float) -> Iterator[list[dict]]:
    url: str | None = f"{hub.endpoint}/api/datasets/{quote(repository)}/tree/main?recursive=true"
    for _ in range(MOST_PAGES):
        with open_url(url, {}, timeout, hub.token) as reply:
            yield json.load(reply)
            following = re.search(r'<([^>]+)>;\s*rel="next"', reply.headers.get("Link", ""))
        if not following:
            return
        url = urljoin(url, following[1])
        if urlsplit(url).netloc != hub.name:  # a mirror that hands on another's answer
            url = hub.endpoint + url[url.index("/api/") :]


def _model_scope_pages(hub: Hub, repository: str, timeout: float) -> Iterator[list[dict]]:
    for number in range(1, MOST_PAGES):
        query = urlencode({"Revision": "master", "Recursive": "True", "PageNumber": number, "PageSize": PAGE})
        with open_url(f"{hub.endpoint}/api/v1/datasets/{quote(repository)}/repo/tree?{query}", {}, timeout) as reply:
            body = json.load(reply)
        if body.get("Code", 200) != 200:
            raise DataError(f"{hub.name}: {body.get('Message') or 'no answer'}: {repository}")
        data = body["Data"]
        rows = data if isinstance(data, list) else data.get("Files") or []
        yield rows
        if len(rows) < PAGE:
            return


def _is_file(row: dict) -> bool:
    return (row.get("type") or row.get("Type")) not in ("directory", "tree")


def _remote(hub: Hub, repository: str, row: dict) -> RemoteFile:
    """A row of a listing; a checksum that has not the form of one is none."""
    path = row.get("path") or row["Path"]
    if hub.kind == "huggingface":
        large = row.get("lfs") or {}
        size, found = large.get("size", row["size"]), f"sha256:{large['oid']}" if large else f"git:{row.get('oid')}"
    else:
        size, found = row["Size"], f"sha256:{row.get('Sha256')}"
    known = re.fullmatch("sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", found.lower())
    return RemoteFile(address(hub, repository, path), int(size), known and known[0], path)


def matching(hub: Hub, repository: str, pattern: str, timeout: float) -> list[RemoteFile]:
    """The files whose path has this form, in order. DataError if there are none."""
    files = listing(hub, repository, timeout)
    found = [file for file in files if fnmatch.fnmatchcase(file.path, pattern)]
    if not found:
        names = ", ".join(sorted(file.path for file in files)[:6])
        raise DataError(f"{hub.name}: {repository} has no {pattern}; there are {names or 'no files'}")
    return sorted(found, key=lambda file: file.path)


def answers(places: list[tuple[Hub, str]], pattern: str, timeout: float) -> Iterator[tuple[Hub, list[RemoteFile]]]:
    """(hub, its files of this pattern), in the order in which the hubs answer, all asked at the same time. DataError
    if none has them, with what each one said."""
    came: queue.SimpleQueue[tuple[Hub, list[RemoteFile] | Exception]] = queue.SimpleQueue()

    def ask(hub: Hub, repository: str) -> None:
        try:
            came.put((hub, matching(hub, repository, pattern, timeout)))
        except Exception as error:  # is told, or raised again, by the main thread
            came.put((hub, error))

    for place in places:
        threading.Thread(target=ask, args=place, daemon=True).start()  # daemon: nobody waits for a hub that is silent
    failures, answered = [], False
    for _ in places:
        hub, files = came.get()
        if isinstance(files, DataError):
            failures.append(str(files))
        elif isinstance(files, Exception):
            raise files
        else:
            answered = True
            yield hub, files
    if not answered:
        raise DataError(f"no hub has it: {'; '.join(failures)}. A mirror: --hub URL, or HF_ENDPOINT")

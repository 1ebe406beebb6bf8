"""scripts/download_data.py against a server that does all that goes wrong: `pytest tests/test_download.py`."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from dataset.catalogue import BENCHMARKS, ENTRIES, FORMER, MINIMIND, UnknownName, find_entry
from dataset.files import DataError
from dataset.hubs import Hub, answers, listing
from dataset.transfer import Download, RemoteFile
from tests.faulty_server import FaultyServer, Reply
from tests.processes import ROOT, Done, one_error

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")


@pytest.fixture
def server():
    with FaultyServer({"file.jsonl": DATA}) as running:
        yield running


def remote(server: FaultyServer, listed: bool = True, path: str = "file.jsonl") -> RemoteFile:
    """As a listing describes it, or as a plain URL."""
    import hashlib

    data = server.files[path]
    known = (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") if listed else (None, None)
    return RemoteFile(f"{server.url}/{path}", *known, path)


def get(file: RemoteFile, folder: Path, **options) -> bytes:
    """What is in place afterwards, with nothing left beside it."""
    path = folder / "file.jsonl"
    Download(file, path, **{"retries": 1, "timeout": 5} | options).run()
    assert os.listdir(folder) == ["file.jsonl"]
    return path.read_bytes()


def part(folder: Path) -> Path:
    return folder / "file.jsonl.part"


def script(*argv, env: dict | None = None, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "download_data.py"), *map(str, argv)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen(command, env=os.environ | (env or {}), **pipes, **options)


def run(*argv, env: dict | None = None) -> Done:
    process = script(*argv, env=env)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


# ------------------------------------------------------------------------------------------------ lines that are cut


@pytest.mark.parametrize("listed", [True, False])
def test_a_cut_line_is_taken_up_where_it_was(server, tmp_path, listed):
    server.plan = [Reply(cut=100_000), Reply(cut=50_000), Reply()]
    assert get(remote(server, listed), tmp_path) == DATA
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert [("If-Range" in headers) for _, headers in server.requests] == [False, True, True]


def test_a_stalled_line_is_taken_up(server, tmp_path):
    server.plan = [Reply(cut=200_000, stall=True), Reply()]
    assert get(remote(server), tmp_path, timeout=0.3) == DATA
    assert server.ranges == [None, "bytes=200000-"]


def test_it_gives_up_and_goes_on_another_time(server, tmp_path):
    server.plan = [Reply(cut=100_000), Reply(status=503, headers={"Retry-After": "0"})]
    with pytest.raises(DataError, match="503.*2 times in a row.*100 kB"):
        get(remote(server), tmp_path)
    assert part(tmp_path).read_bytes() == DATA[:100_000]
    server.plan = [Reply()]
    assert get(remote(server), tmp_path) == DATA
    assert server.ranges[-1] == "bytes=100000-"


def test_what_came_from_one_hub_goes_on_from_another(server, tmp_path):
    """By the checksum that both list; a file without one is another file elsewhere."""
    for listed, asked in ((True, "bytes=100000-"), (False, None)):
        server.plan = [Reply(cut=100_000), Reply(status=503)]
        with pytest.raises(DataError):
            get(remote(server, listed), tmp_path)
        server.plan = [Reply()]
        elsewhere = remote(server, listed)
        elsewhere = RemoteFile(elsewhere.url.replace("127.0.0.1", "localhost"), elsewhere.size, elsewhere.checksum)
        assert get(elsewhere, tmp_path) == DATA
        assert server.ranges[-1] == asked
        (tmp_path / "file.jsonl").unlink()


# ------------------------------------------------------------------------------------------------ a changed file


@pytest.mark.parametrize("reply", [Reply(), Reply(if_range=False), Reply(ranges=False)])
@pytest.mark.parametrize("listed", [True, False])
def test_a_file_that_changed_is_not_joined_to_the_old_part(server, tmp_path, listed, reply):
    """A server that keeps to If-Range, one that does not know it, and one that sends the whole file for a part."""
    server.plan = [Reply(cut=100_000), Reply(status=503)]
    with pytest.raises(DataError):
        get(remote(server, listed), tmp_path)
    server.files["file.jsonl"] = OTHER
    server.plan = [reply]
    assert get(remote(server, listed), tmp_path) == OTHER


def test_a_file_that_changes_during_the_download(server, tmp_path):
    """Without a listing it is fetched anew; one that is no more what was listed is refused."""
    for listed in (False, True):
        server.files["file.jsonl"], server.plan = DATA, [Reply(cut=100_000), Reply()]
        file, answer = remote(server, listed), server.answer

        def change(handler, answer=answer):
            answer(handler)
            server.files["file.jsonl"] = OTHER

        server.answer = change
        if listed:
            with pytest.raises(DataError, match="not those that the hub lists"):
                get(file, tmp_path)
            assert not part(tmp_path).exists() and not (tmp_path / "file.jsonl").exists()
        else:
            assert get(file, tmp_path) == OTHER
            (tmp_path / "file.jsonl").unlink()
        server.answer = answer


def test_a_server_that_cannot_send_a_part(server, tmp_path):
    server.plan = [Reply(cut=100_000), Reply(ranges=False)]
    assert get(remote(server), tmp_path) == DATA
    server.plan = [Reply(cut=100_000, etag=False), Reply(etag=False, ranges=False)]
    (tmp_path / "file.jsonl").unlink()
    assert get(remote(server, listed=False), tmp_path) == DATA


def test_a_part_without_its_note_is_not_trusted(server, tmp_path):
    part(tmp_path).write_bytes(b"x" * 1000)
    assert get(remote(server), tmp_path) == DATA
    assert server.ranges == [None]


def test_a_whole_part_needs_no_byte_more(server, tmp_path):
    """Killed between the last byte and the renaming: with a checksum at once, without one by the server's 416."""
    for listed, requests in ((True, 0), (False, 1)):
        server.requests.clear()
        file = remote(server, listed)
        server.plan = [Reply(cut=299_999), Reply(status=503)]
        with pytest.raises(DataError):
            get(file, tmp_path)
        part(tmp_path).write_bytes(DATA)
        server.requests.clear()
        server.plan = [Reply()]
        assert get(file, tmp_path) == DATA
        assert len(server.requests) <= requests
        (tmp_path / "file.jsonl").unlink()


# ------------------------------------------------------------------------------------------------ lies


def test_wrong_bytes_are_never_put_in_place(server, tmp_path):
    server.plan = [Reply(wrong=True)]
    with pytest.raises(DataError, match="not those that the hub lists"):
        get(remote(server), tmp_path)
    assert os.listdir(tmp_path) == []


def test_wrong_bytes_in_an_old_part_are_fetched_again(server, tmp_path):
    server.plan = [Reply(cut=100_000), Reply(status=503)]
    with pytest.raises(DataError):
        get(remote(server), tmp_path)
    part(tmp_path).write_bytes(b"?" * 100_000)
    server.plan = [Reply()]
    assert get(remote(server), tmp_path) == DATA


@pytest.mark.parametrize("length", [200_000, 400_000])
def test_a_wrong_length(server, tmp_path, length):
    """Against the listing at once; without one, a file that ends before its length is never put in place."""
    server.plan = [Reply(length=length)]
    with pytest.raises(DataError, match=f"{length:,} bytes.*300,000"):
        get(remote(server), tmp_path)
    if length > len(DATA):
        with pytest.raises(DataError):
            get(remote(server, listed=False), tmp_path, retries=0)
        assert not (tmp_path / "file.jsonl").exists()


def test_chunks_without_a_length(server, tmp_path):
    server.plan = [Reply(no_length=True)]
    assert get(remote(server, listed=False), tmp_path) == DATA


def test_a_web_page_is_no_file(server, tmp_path):
    server.plan = [Reply(headers={"Content-Type": "text/html; charset=utf-8"})]
    with pytest.raises(DataError, match="web page"):
        get(remote(server, listed=False), tmp_path)


def test_more_than_the_disk_holds_is_refused_before_the_first_byte(server, tmp_path):
    server.plan = [Reply(length=10**16)]
    with pytest.raises(DataError, match="are free"):
        get(remote(server, listed=False), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, status):
    server.plan = [Reply(status=status)]
    with pytest.raises(DataError, match=str(status)):
        get(remote(server), tmp_path, retries=5)
    assert len(server.requests) == 1


def test_an_empty_file(server, tmp_path):
    server.files["file.jsonl"] = b""
    for listed in (True, False):
        assert get(remote(server, listed), tmp_path) == b""
        (tmp_path / "file.jsonl").unlink()


# ------------------------------------------------------------------------------------------------ redirects and tokens


def test_the_token_goes_to_the_hub_alone(server, tmp_path):
    """It is shown when the hub asks for it, and not to the host that it redirects to."""
    server.token = "secret"
    file = remote(server)
    file = RemoteFile(f"{server.url}/hop/file.jsonl", file.size, file.checksum)
    assert get(file, tmp_path, token="secret") == DATA
    shown = [headers.get("Authorization") for _, headers in server.requests]
    assert shown == [None, "Bearer secret", None] and server.requests[-1][0] == "/cdn/file.jsonl"
    (tmp_path / "file.jsonl").unlink()
    with pytest.raises(DataError, match="HF_TOKEN"):
        get(file, tmp_path)


def test_a_range_survives_a_redirect(server, tmp_path):
    server.plan = [Reply(cut=100_000), Reply()]
    file = remote(server)
    assert get(RemoteFile(f"{server.url}/hop/file.jsonl", file.size, file.checksum), tmp_path) == DATA
    assert "bytes=100000-" in server.ranges


# ------------------------------------------------------------------------------------------------ hubs


def test_listings_of_both_hubs(server):
    """All pages, no folders; the checksum of git for a file that Hugging Face keeps in git."""
    server.files |= {"two/b c.jsonl": b"2", "small.json": b"{}", "four.jsonl": b"4" * 9}
    for kind in ("huggingface", "modelscope"):
        files = {file.path: file for file in listing(Hub(kind, server.url), "a/b", 5)}
        assert {path: file.size for path, file in files.items()} == {p: len(d) for p, d in server.files.items()}
        git = kind == "huggingface"
        assert files["small.json"].checksum.startswith("git:" if git else "sha256:")
        assert files["file.jsonl"].checksum == remote(server).checksum


def test_a_checksum_of_git_is_checked(server, tmp_path):
    server.files["small.json"] = b'{"a": 1}'
    [file] = [f for f in listing(Hub("huggingface", server.url), "a/b", 5) if f.path == "small.json"]
    assert get(file, tmp_path) == b'{"a": 1}'
    (tmp_path / "file.jsonl").unlink()
    server.plan = [Reply(wrong=True)]
    with pytest.raises(DataError):
        get(file, tmp_path)


def test_the_hub_that_answers_is_taken(server):
    """A hub that is silent or refuses does not hold up the other."""
    with FaultyServer({"other.jsonl": b""}) as other:
        places = [(Hub("huggingface", "http://127.0.0.1:9"), "a/b"), (Hub("modelscope", server.url), "c/d")]
        assert [hub.kind for hub, _ in answers(places, "*.jsonl", 5)] == ["modelscope"]
        places[1] = (Hub("modelscope", other.url), "c/d")
        with pytest.raises(DataError, match=r"refused.*has no file\.jsonl; there are other\.jsonl"):
            list(answers(places, "file.jsonl", 5))


def test_names():
    """New, by file, old; each old name leads to an entry or says why not."""
    assert find_entry("pretrain_mini") is find_entry("pretrain_t2t_mini.jsonl") is find_entry("pretrain_t2t_mini")
    for name, (became, _) in FORMER.items():
        with pytest.raises(UnknownName, match=became or "nothing"):
            find_entry(name)
        assert not became or became in ENTRIES
    for name in ("pretrain_data_6400.bin", "pretrain_hq", "pretrain_mimi"):
        with pytest.raises(UnknownName, match="pretrain_mini"):
            find_entry(name)


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def hubs(server):
    """One server as both hubs, with MiniMind's file."""
    server.files["pretrain_t2t_mini.jsonl"] = DATA
    return {"HF_ENDPOINT": server.url, "MODELSCOPE_ENDPOINT": server.url}


@pytest.mark.posix
def test_killed_and_started_again(server, hubs, tmp_path):
    """kill -9 in the middle, then the same command: only what is missing is fetched."""
    server.plan = [Reply(cut=200_000, stall=True), Reply()]
    command = ["pretrain_mini", "--out_dir", tmp_path, "--timeout", 60]
    first = script(*command, env=hubs)
    came = tmp_path / "pretrain_t2t_mini.jsonl.part"
    while not came.exists() or came.stat().st_size < 200_000:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "pretrain_t2t_mini.jsonl").exists()
    done = run(*command, env=hubs)
    assert done.code == 0, done.err
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == DATA
    assert server.ranges == [None, "bytes=200000-"] and "CC-BY-NC" in done.err
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"pretrain_t2t_mini.jsonl", "downloads.json"}

    server.requests.clear()
    again = run(*command, env=hubs)
    assert again.code == 0 and server.ranges == [] and "is there" in again.err


def test_check(server, hubs, tmp_path):
    """Offline against the record, with the hub where there is none."""
    path = tmp_path / "pretrain_t2t_mini.jsonl"
    assert run("pretrain_mini", f"{server.url}/file.jsonl", "--out_dir", tmp_path, env=hubs).code == 0
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    done = run("--check", "--out_dir", tmp_path, env=nowhere)
    assert done.code == 0 and done.out.count("ok ") == 2, done
    path.write_bytes(DATA[:-1] + b"?")
    done = run("--check", "pretrain_mini", "--out_dir", tmp_path, env=nowhere)
    one_error(done, 1, path.name)
    path.write_bytes(DATA[:-1])
    (tmp_path / "downloads.json").unlink()
    done = run("--check", "pretrain_mini", "--out_dir", tmp_path, env=hubs)
    one_error(done, 1, path.name)
    assert "299,999" in done.out and "300,000" in done.out

    refused = run("pretrain_mini", "--out_dir", tmp_path, env=hubs)
    one_error(refused, 2, "--replace", "299,999")
    assert path.stat().st_size == 299_999
    assert run("pretrain_mini", "--out_dir", tmp_path, "--replace", env=hubs).code == 0
    assert path.read_bytes() == DATA


def test_any_file_of_a_hub_and_an_archive(server, hubs, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("val/law_val.csv", "id,question\n")
        content.writestr("../outside.txt", "no")
    server.files |= {"ceval-exam.zip": archive.getvalue(), "part [1].jsonl": b"x"}
    out = tmp_path / "in" / "out"
    server.files["语 料.jsonl"] = b"y"
    names = ["ceval", "hf:a/b/part [1].jsonl", f"{server.url}/语 料.jsonl", "--hub", "huggingface"]
    done = run(*names, "--out_dir", out, env=hubs)
    assert done.code == 0, done.err
    assert (out / "ceval" / "val" / "law_val.csv").read_text() == "id,question\n"
    assert (out / "part [1].jsonl").read_bytes() == b"x" and (out / "语 料.jsonl").read_bytes() == b"y"
    assert not [path for path in tmp_path.rglob("outside.txt") if not path.is_relative_to(out)]
    record = json.loads((out / "downloads.json").read_text())
    assert record["part [1].jsonl"]["from"] == "hf:a/b/part [1].jsonl"


def test_the_next_hub_is_taken_where_one_sends_wrong_bytes(server, hubs, tmp_path):
    with FaultyServer(server.files) as other:
        other.plan = server.plan = [Reply(wrong=True)]
        good = server.answer

        def right(handler):  # ModelScope's files are right
            server.plan = [Reply(wrong="FilePath" not in handler.path)]
            good(handler)

        server.answer = right
        done = run("pretrain_mini", "--out_dir", tmp_path, env=hubs)
        assert done.code == 0, done.err
        assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == DATA


def test_mistakes_and_the_list(tmp_path):
    for argv in (["pretrain_hq"], ["sft_mni"], ["hf:a/b"], ["https://example.org/"], ["--hub", "x", "dpo"], []):
        one_error(run(*argv, "--out_dir", tmp_path), 2)
    one_error(run("dpo", "--hub", "http://127.0.0.1:9", "--out_dir", tmp_path), 1, "127.0.0.1:9")
    listed = run("--list")
    assert listed.code == 0
    assert all(text in listed.out for text in [*ENTRIES, *FORMER, *MINIMIND.values(), "CC-BY-NC", "1.2 GB"])
    assert all(repository in listed.out for entry in BENCHMARKS for repository in entry.repositories.values())


def test_parquet_becomes_what_the_evaluation_reads(server, hubs, tmp_path):
    """Rows in their order over all parts; a CSV a subject; a file a paradigm."""
    import pyarrow
    import pyarrow.parquet

    def parquet(rows: list[dict]) -> bytes:
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()

    law = {"question": 'What, "exactly"?', "subject": "law", "choices": ["1", "二", "3", "4"], "answer": 1}
    problems = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    pairs = [{"sentence_good": "她来了。", "sentence_bad": "来她了。"}]
    server.files = {
        "all/test-00000-of-00001.parquet": parquet([law, law | {"subject": "../art", "answer": 3}]),
        "all/dev-00000-of-00001.parquet": parquet([law]),
        "all/auxiliary_train-00000-of-00001.parquet": b"not wanted",
        "main/test-00000-of-00002.parquet": parquet(problems[:2]),
        "main/test-00001-of-00002.parquet": parquet(problems[2:]),
        "island/train-00000-of-00001.parquet": parquet(pairs),
    }
    done = run("mmlu", "gsm8k", "--hub", "huggingface", "--out_dir", tmp_path, env=hubs)
    assert done.code == 0, done.err
    server.files = {name: data for name, data in server.files.items() if name.startswith("island")}
    assert run("blimp", "--out_dir", tmp_path, env=hubs).code == 0
    with open(tmp_path / "mmlu" / "test" / "law.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["question", *"ABCD", "answer"], [law["question"], *law["choices"], "B"]]
    assert {path.name for path in tmp_path.rglob("*.csv")} == {"law.csv", "___art.csv"}
    for path, rows in (("gsm8k/test.jsonl", problems), ("blimp/island.jsonl", pairs)):
        assert [json.loads(line) for line in (tmp_path / path).read_text(encoding="utf-8").splitlines()] == rows
    server.files = {"main/test-00000-of-00001.parquet": b"PAR1 no"}
    one_error(run("gsm8k", "--out_dir", tmp_path / "bad", env=hubs), 1, "main", "--replace")


@pytest.mark.posix
def test_a_full_disk_keeps_what_has_come(server, hubs, tmp_path):
    """One line; with space again, the rest alone is fetched."""
    import resource

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    process = script("pretrain_mini", "--out_dir", tmp_path, env=hubs, preexec_fn=full)
    out, err = process.communicate(timeout=60)
    one_error(Done(process.returncode, out, err), 1, "pretrain_t2t_mini.jsonl", "space")
    done = run("pretrain_mini", "--out_dir", tmp_path, env=hubs)
    assert done.code == 0, done.err
    assert (tmp_path / "pretrain_t2t_mini.jsonl").read_bytes() == DATA
    assert server.ranges[-1] == "bytes=150000-"

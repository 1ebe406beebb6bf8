"""With the first group of requirements.txt alone: every stage trains, answers are given and served; whatever needs a
package of another group says so in one line."""

import json
import re
import time
import urllib.error
import urllib.request

import pytest

from tests.processes import ROOT, Script, free_port, one_error, small_data

TINY = "--max_seq_len 32 --batch_size 2 --steps 2 --compile 0 --dtype fp32 --device cpu".split()
STAGES = {  # script: data, further flags
    "train_pretrain.py": ("text", ["--hidden_size", "64", "--num_hidden_layers", "2"]),
    "train_full_sft.py": ("chat", []),
    "train_lora.py": ("chat", []),
    "train_dpo.py": ("pairs", ["--max_seq_len", "64"]),
    "train_distill.py": ("chat", ["--hidden_size", "32"]),
    "train_reason.py": ("chat", []),
    "train_unlikelihood.py": ("text", []),
}


def optional_packages() -> list[str]:
    """Those of all groups but the first."""
    _, *others = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n\n")
    return re.findall(r"^([A-Za-z0-9_-]+)", "\n".join(others), re.MULTILINE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The out_dir of all stages, trained without the optional packages."""
    folder = tmp_path_factory.mktemp("core")
    out = folder / "out"
    assert {"transformers", "wandb", "deepspeed", "openai"} <= set(optional_packages())
    with small_data(folder) as data:
        jobs = [
            [script, *TINY, "--data_path", data[kind], "--out_dir", out, *flags]
            for script, (kind, flags) in STAGES.items()
        ]
        jobs.append(["scripts/inspect_data.py", data["chat"]])
        Script(folder, *jobs, missing=optional_packages()).succeed()
    return out


def test_all_stages_train_and_the_model_answers(trained, tmp_path):
    assert {path.name for path in trained.rglob("*.pth")} == {
        "pretrain_64.pth", "full_sft_64.pth", "lora_identity_64.pth", "dpo_64.pth", "distill_32.pth", "reason_64.pth",
        "unlikelihood_64.pth",
    }  # fmt: skip
    assert (trained / "dpo_64.png").exists()
    ask = ["eval_model.py", "--out_dir", trained, "--ask", "Hello?", "--max_new_tokens", 4]
    copy = ["scripts/convert_model.py", trained / "dpo_64.pth", tmp_path / "copy.pth"]
    tools = [*ask, "--tools", 1, "--lora_name", "lora_identity", "--max_seq_len", 512]
    Script(tmp_path, ask, tools, copy, missing=optional_packages()).succeed()


def test_the_server_serves_and_refuses_what_it_lacks(trained, tmp_path):
    port = free_port()
    command = ["serve_openai_api.py", "--out_dir", trained, "--port", port, "--max_seq_len", 256]
    server = Script(tmp_path, command, missing=optional_packages())

    def post(**more) -> tuple[int, dict]:
        body = {"model": "full_sft_64", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | more
        url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        while "serving on" not in server.err():
            assert server.alive(), server.err()
            time.sleep(0.05)
        status, answer = post()
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] >= 1
        status, answer = post(response_format={"type": "json_object"})
        assert status == 400 and "pip install llguidance" in answer["error"]["message"]
    finally:
        server.kill()


def test_what_needs_another_package_says_so_in_one_line(trained, tmp_path):
    weights, questions = trained / "full_sft_64.pth", tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Hi"}\n')
    ask = ["scripts/ask_teacher.py", "--teacher", "http://127.0.0.1:9/v1", "--model", "m"]
    cases = {
        "wandb": ["train_pretrain.py", *TINY, "--use_wandb", "--out_dir", tmp_path],
        "gguf": ["scripts/convert_model.py", weights, tmp_path / "a.gguf"],
        "openai": [*ask, "--prompts", questions, "--out", tmp_path / "a.jsonl"],
    }
    for package, command in cases.items():
        done = Script(tmp_path, command, missing=optional_packages()).wait()
        one_error(done, 1 if package == "gguf" else 2, f"pip install {package}")
    done = Script(tmp_path, ["scripts/convert_model.py", weights, tmp_path / "hf"], missing=optional_packages()).wait()
    assert done.code == 0 and "pip install transformers" in done.err and (tmp_path / "hf" / "config.json").exists()

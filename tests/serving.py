"""A server as its clients see it: a process with a small random model. For the tests of the server.

with running(make_weights(folder), "--max_seq_len", "512") as server:
    server.chat(max_tokens=3).json(), server.client.models.list(), server.log
"""

import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model import checkpoint
from model.adapters import save_adapter
from model.model import LoRAConfig, MiniMindConfig, MiniMindLM, add_lora

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parent.parent
USER = [{"role": "user", "content": "Who are you?"}]
COLOUR = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "蓝"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


def make_weights(out: Path) -> Path:
    """Fills a folder with a small random model and one adapter of it, and one of another model."""
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    for seed, path in ((1, out / "other.pth"), (0, out / "full_sft_64.pth")):
        torch.manual_seed(seed)
        model = MiniMindLM(MiniMindConfig(**shape, intermediate_size=96, vocab_size=6400, initializer_range=0.2))
        checkpoint.save(path, model)
        add_lora(model, "style", LoRAConfig(rank=4))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
        save_adapter(out / "lora" / ("alien_64.pth" if seed else "style_64.pth"), model, "style")
    return out


class Running:
    """A server process; `log` is what it has written to stderr."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.log = process, ""
        for line in process.stderr:
            self.log += line
            if found := re.fullmatch(r"serving on (http://\S+):([0-9]+)\n", line):
                self.port = int(found[2])
                self.url = f"http://127.0.0.1:{self.port}"
                break
        else:
            pytest.fail(self.log)
        threading.Thread(target=self._read, daemon=True).start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=60)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log += line

    def post(self, body, path="/v1/chat/completions", **options) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        return httpx.post(self.url + path, content=content, headers=headers, timeout=60, **options)

    def chat(self, **fields) -> httpx.Response:
        return self.post({"model": "full_sft_64", "messages": USER, "max_tokens": 4} | fields)

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics", headers={"Authorization": "Bearer secret"}).text
        return float(re.search(rf"^minimind_{name} (\S+)$", text, re.M)[1])

    def wait_for(self, name: str, value: float) -> None:
        end = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"


@contextmanager
def running(weights: Path, *options: str, prefix: tuple[str, ...] = ()):
    command = [sys.executable, str(ROOT / "serve_openai_api.py"), "--out_dir", str(weights), "--port", "0", *options]
    process = subprocess.Popen([*prefix, *command], stderr=subprocess.PIPE, text=True)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait()

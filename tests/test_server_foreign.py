"""A published folder with a tokenizer of its own, served: chats, forced calls, JSON and token ids, over HTTP.

`pytest tests/test_server_foreign.py`
"""

import json

import pytest
from foreign import minimind_folder
from serving import COLOUR, USER, running

from dataset.chat import render_chat
from dataset.tokenizer import load_tokenizer

SCHEMA = {"type": "object", "properties": {"n": {"enum": [7, 15]}}, "required": ["n"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA}}


def serve(generation, folder):
    minimind_folder(generation, "dense", folder, "model.safetensors")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["chat_template"] += (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user first') }}{% endif %}"
    )
    file.write_text(json.dumps(config), encoding="utf-8")
    return running(folder.parent, "--model", str(folder), "--max_seq_len", "1024", "--device", "cpu", "--dtype", "fp32")


@pytest.fixture(scope="module", params=["v2a", "v2b", "v3"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "minimind"
    with serve(request.param, folder) as server:
        yield server, load_tokenizer(folder), request.param
        assert server.process.poll() is None and "Traceback" not in server.log, server.log[-6000:]


def ask(server, fields, path="/v1/chat/completions", status=200):
    body = {"temperature": 0, "max_tokens": 60} | fields
    response = server.post(body, path)
    assert response.status_code == status, response.text
    return response.json()


def test_a_folders_own_tokenizer_is_what_counts(served):
    server, own, _ = served
    answer = ask(server, {"messages": USER, "max_tokens": 5})
    prompt = render_chat(own, USER, add_generation_prompt=True)[0]
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    forged = USER[0] | {"content": "".join(own.marker_ids) + " hi"}
    tokens = ask(server, {"messages": [forged]}, "/tokenize")["tokens"]
    assert tokens == render_chat(own, [forged], add_generation_prompt=True)[0]
    markers = set(own.marker_ids.values())
    assert [i for i in tokens if i in markers] == [i for i in prompt if i in markers]
    scored = ask(server, {"prompt": "7 + 15", "max_tokens": 0, "echo": True, "logprobs": 1}, "/v1/completions")
    assert "7 + 15" in scored["choices"][0]["text"]


def test_what_the_template_refuses_is_the_clients_fault(served):
    server, _, _ = served
    error = ask(server, {"messages": [{"role": "assistant", "content": "hi"}, *USER]}, status=400)["error"]
    assert "a user first" in error["message"] and error["param"] == "messages"


def test_json_by_a_schema_in_foreign_tokens(served):
    server, own, _ = served
    answer = ask(server, {"messages": USER, "response_format": FORMAT})["choices"][0]
    assert json.loads(answer["message"]["content"])["n"] in (7, 15) and answer["finish_reason"] == "stop"


def test_a_forced_call_needs_the_markers_of_calls(served):
    server, own, generation = served
    fields = {"messages": USER, "tools": [COLOUR], "tool_choice": "required"}
    if generation == "v3":
        (choice,) = ask(server, fields)["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "paint" and choice["finish_reason"] == "tool_calls"
        assert json.loads(call["function"]["arguments"])["colour"] in ("red", "蓝")
    else:
        error = ask(server, fields, status=400)["error"]
        assert "<tool_call>" in error["message"] and "\n" not in error["message"]

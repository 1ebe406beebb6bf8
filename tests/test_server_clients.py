"""What other servers take and their clients send: fields, scores of prompts, calls in pieces, other interfaces, routes.

`pytest tests/test_server_clients.py`
"""

import json

import pytest
import torch
from serving import COLOUR, USER, httpx, make_weights, openai, running

from dataset.chat import EOS_ID, PAD_ID, THINK_ID, TOOL_CALL_ID, load_tokenizer, render_chat
from model import checkpoint

TOKENIZER = load_tokenizer()
ASSISTANT = {"role": "assistant", "content": "I am"}
WHERE = json.dumps({"on": "left and right and left again"})
SHORT = {  # its only call
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "type": "object", "properties": {"on": {"const": json.loads(WHERE)["on"]}}, "required": ["on"]
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def server(weights):
    with running(
        weights, "--max_seq_len", "512", "--device", "cpu", "--dtype", "fp32", "--api_key", "secret"
    ) as server:
        yield server
        assert server.process.poll() is None, server.log
        assert "Traceback" not in server.log, server.log[-6000:]


def ask(server, fields: dict, path="/v1/chat/completions", status=200) -> dict:
    body = {"model": "full_sft_64", "temperature": 0, "max_tokens": 8} | fields
    body |= {} if "messages" in fields or "chat" not in path else {"messages": USER}
    response = server.post(body, path, headers={"Authorization": "Bearer secret"})
    assert response.status_code == status, response.text
    return response.json()


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def bias(word: str, strength: float = 100) -> dict:
    return {"logit_bias": {str(TOKENIZER.encode(word).ids[0]): strength}}


# ------------------------------------------------------------------------------------------------ fields


def test_unknown_fields_are_ignored_with_one_line_each(server):
    plain = ask(server, {})["choices"]
    for _ in range(2):
        assert (
            ask(server, {"temprature": 2, "made\nup": {"x": []}, "typical_p": 1.0, "mirostat": 0})["choices"] == plain
        )
    assert server.log.count("temprature") == 1 and server.log.count(r"made\nup") == 1
    names = "stop tools tool_choice logit_bias stream_options response_format seed max_tokens model n think user foo"
    nulls = ask(server, dict.fromkeys(names.split()) | {"max_completion_tokens": 8})
    assert nulls["choices"] == plain and nulls["model"] == "full_sft_64"


@pytest.mark.parametrize(
    "field",
    [{"typical_p": 0.5}, {"mirostat": 2}, {"dry_multiplier": 0.8}, {"xtc_probability": 0.5}, {"use_beam_search": True},
     {"prompt_logprobs": 1}, {"bad_words": ["x"]}, {"truncate_prompt_tokens": 9}, {"functions": [{"name": "f"}]},
     {"function_call": {"name": "f"}}, {"documents": [{}]}, {"chat_template": "x"}, {"lora": [{"id": 0}]},
     {"best_of": 2}, {"modalities": ["text", "audio"]}, {"options": {"num_ctx": 99}}],
    ids=lambda field: next(iter(field)),
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(server, field):
    error = ask(server, field, status=400)["error"]
    assert error["param"] == next(iter(field)) and error["param"] in error["message"]


def test_numbers_as_other_clients_send_them(server):
    plain = ask(server, {})["choices"]
    for same in ({"top_k": -1}, {"top_k": 0.0}, {"max_tokens": 8.0, "n": 1.0}, {"stop": ["", ""]}, {"stop": ""},
                 {"tools": [], "tool_choice": "auto"}, {"stop": ["龘" + str(n) for n in range(40)]}):  # fmt: skip
        assert ask(server, same)["choices"] == plain, same
    empty = ask(server, {"max_tokens": 0})
    assert empty["choices"][0]["finish_reason"] == "length" and text(empty) == ""
    assert empty["usage"]["completion_tokens"] == 0
    longest = ask(server, {"max_tokens": -1, "ignore_eos": True})
    assert longest["usage"]["total_tokens"] == 512
    random = {"seed": -1, "temperature": 2, "max_tokens": 12}
    assert len({text(ask(server, random)) for _ in range(4)}) > 1
    assert len({text(ask(server, random | {"seed": 1})) for _ in range(3)}) == 1
    cat = bias(" cat", 5)
    assert (
        ask(server, {"repeat_penalty": 9.5} | cat)["choices"]
        == ask(server, {"repetition_penalty": 9.5} | cat)["choices"]
    )
    assert ask(server, {"repeat_penalty": 9.5} | cat)["choices"] != ask(server, cat)["choices"]
    by_list = [[TOKENIZER.encode(" cat").ids[0], 100]]
    assert text(ask(server, {"logit_bias": by_list})) == " cat" * 8


def test_tokens_that_stop_and_those_that_must_not(server):
    ends = {"logit_bias": {str(EOS_ID): 100}}
    assert ask(server, ends)["usage"]["completion_tokens"] == 1
    assert ask(server, ends | {"min_tokens": 5})["usage"]["completion_tokens"] == 6
    assert ask(server, {"min_tokens": 9}, status=400)["error"]["param"] == "min_tokens"
    cat = TOKENIZER.encode(" cat").ids[0]
    stopped = ask(server, bias(" cat") | {"stop_token_ids": [cat]})
    assert text(stopped) == "" and stopped["choices"][0]["finish_reason"] == "stop"
    kept = ask(server, bias(" cat") | {"stop": ["t c"], "include_stop_str_in_output": True})
    assert text(kept) == " cat c"
    think = {"logit_bias": {str(THINK_ID): 100}, "max_tokens": 2}
    assert text(ask(server, think | {"skip_special_tokens": False})) == "<think><think>"
    marks = ask(server, think | {"logit_bias": {str(PAD_ID): 100}, "ignore_eos": True, "skip_special_tokens": False})
    assert text(marks) == ""  # what stops is no text


@pytest.mark.parametrize(
    "fields, allowed",
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"guided_json": {"enum": ["a", "b"]}}, {'"a"', '"b"'}),
        ({"guided_json": '{"enum": ["a", "b"]}'}, {'"a"', '"b"'}),
        ({"guided_regex": "^(a/b|c\\.d)$"}, {"a/b", "c.d"}),
        ({"guided_grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
        ({"guided_grammar": 'start: "x" | "y"'}, {"x", "y"}),
        ({"structured_outputs": {"choice": ['q"', "ü"]}}, {'q"', "ü"}),
        ({"structured_outputs": {"json": {"type": "null"}}, "guided_json": {"type": "null"}}, {"null"}),
        ({"json_schema": {"type": "boolean"}}, {"true", "false"}),
        ({"response_format": {"type": "json_object", "schema": {"type": "boolean"}}}, {"true", "false"}),
        ({"format": {"type": "boolean"}}, {"true", "false"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_formats_of_other_servers(server, fields, allowed):
    answer = ask(server, fields | {"n": 3, "temperature": 1.5, "max_tokens": 40})
    assert {choice["message"]["content"] for choice in answer["choices"]} <= allowed
    completion = ask(server, fields | {"prompt": "x", "max_tokens": 40}, "/v1/completions")
    assert completion["choices"][0]["text"] in allowed


def test_only_one_format_and_a_good_one(server):
    for fields, param in (
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "(("}, "guided_regex"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
    ):
        assert ask(server, fields, status=400)["error"]["param"] == param


def test_thinking_is_switched_by_any_of_its_names(server):
    def tokens(fields):
        return ask(server, fields)["usage"]["prompt_tokens"]

    on = tokens({"chat_template_kwargs": {"enable_thinking": True}})
    off = tokens({"chat_template_kwargs": {"enable_thinking": False}})
    for name in ("enable_thinking", "think"):
        assert tokens({name: True}) == on and tokens({name: False}) == off
    assert tokens({"chat_template_kwargs": {"thinking": True}}) == on == tokens({"thinking": {"type": "enabled"}})
    assert tokens({"reasoning_effort": "none"}) == off
    assert on != off != tokens({}) != on
    assert "contradict" in ask(server, {"think": True, "enable_thinking": False}, status=400)["error"]["message"]


def test_an_answer_goes_on_with_the_last_message(server):
    messages = [*USER, ASSISTANT]
    header, _ = render_chat(TOKENIZER, USER, add_generation_prompt=True)
    ids = header + TOKENIZER.encode("I am").ids
    (expected,) = ask(server, {"prompt": ids}, "/v1/completions")["choices"]
    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        answer = ask(server, {"messages": messages} | fields)
        assert text(answer) == expected["text"] and answer["usage"]["prompt_tokens"] == len(ids)
    for fields in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        assert ask(server, {"messages": messages} | fields)["usage"]["prompt_tokens"] > len(ids) + 3
    thought = ask(server, {"messages": [*USER, {"role": "assistant", "reasoning_content": "Well", "content": ""}]})
    assert "reasoning_content" in thought["choices"][0]["message"]
    for fields in ({"add_generation_prompt": True, "messages": messages}, {}):
        error = ask(server, {"continue_final_message": True} | fields, status=400)["error"]
        assert error["param"] == "continue_final_message"


def test_messages_as_clients_send_them(server):
    image = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    error = ask(server, {"messages": [{"role": "user", "content": image}]}, status=400)["error"]
    assert "image" in error["message"] and error["param"] == "messages[0].content"
    long = ask(server, {"messages": [{"role": "user", "content": "cat " * 600}]}, status=400)["error"]
    assert long["message"].startswith("This model's maximum context length is 512 tokens.")
    assert long["code"] == "context_length_exceeded"
    ask(server, {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": None}, *USER]})


def test_many_prompts_and_the_best_of_some(server):
    many = ask(server, {"prompt": ["a", "b"] * 16, "max_tokens": 1}, "/v1/completions")
    assert [choice["index"] for choice in many["choices"]] == list(range(32))
    error = ask(server, {"prompt": ["a"] * 257}, "/v1/completions", status=400)["error"]
    assert error["param"] == "prompt"
    fields = {"prompt": "x", "temperature": 1, "seed": 3, "logprobs": 0}
    every = ask(server, fields | {"n": 6}, "/v1/completions")["choices"]
    best = ask(server, fields | {"n": 2, "best_of": 6}, "/v1/completions")["choices"]

    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])

    assert [c["text"] for c in best] == [c["text"] for c in sorted(every, key=mean, reverse=True)[:2]]


# ------------------------------------------------------------------------------------------------ scores of prompts


@pytest.mark.parametrize("as_ids", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt(server, weights, as_ids, max_tokens):
    """As evaluation harnesses ask for it, by ids or by text; longer than what is computed at once."""
    model, _ = checkpoint.load(weights / "full_sft_64.pth")
    prompt = "The capital of France is 巴黎. " * 20
    ids = TOKENIZER.encode(prompt).ids
    own = ids if as_ids else [PAD_ID, *ids]
    with torch.inference_mode():
        logprobs = model.eval()(torch.tensor([own])).logits[0].log_softmax(-1)
    fields = {"prompt": [ids, ids[:9]] if as_ids else prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    answer = ask(server, fields, "/v1/completions")
    choice = answer["choices"][0]
    scores = choice["logprobs"]
    assert len(scores["token_logprobs"]) == len(scores["tokens"]) == len(ids) + max_tokens == len(scores["text_offset"])
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    first = len(own) - len(ids)  # what stands before the text, which the client does not see
    expected = logprobs[first:-1].gather(1, torch.tensor(own[first + 1 :])[:, None])[:, 0].tolist()
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-3)
    for n in range(1, len(ids)):
        top = max(scores["top_logprobs"][n].values())
        greedy = int(logprobs[first + n - 1].argmax()) == ids[n]
        assert (scores["token_logprobs"][n] == top) == greedy
        assert scores["token_logprobs"][n] in scores["top_logprobs"][n].values() or scores["tokens"][n] == "\ufffd"
    assert choice["text"].startswith(prompt) and answer["usage"]["completion_tokens"] == max_tokens * (1 + as_ids)
    if max_tokens == 0:
        assert choice["finish_reason"] == "length" and choice["text"] == prompt
    streamed = {"model": "full_sft_64", "temperature": 0, "stream": True} | fields
    chunks = [c.choices[0] for c in server.client.completions.create(**streamed) if c.choices[0].index == 0]
    assert "".join(c.text for c in chunks) == choice["text"]
    assert [p for c in chunks if c.logprobs for p in c.logprobs.token_logprobs] == pytest.approx(
        scores["token_logprobs"]
    )


def test_the_last_token_is_scored_also_if_it_stops(server):
    """Harnesses cut off one value, the generated token's, whatever it is."""
    fields = {"prompt": "x", "echo": True, "logprobs": 1, "max_tokens": 1, "logit_bias": {str(EOS_ID): 100}}
    choice = ask(server, fields, "/v1/completions")["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == len(TOKENIZER.encode("x").ids) + 1
    assert choice["text"] == "x"


# ------------------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("max_tokens", [1, 6, 16, 24])
@pytest.mark.parametrize("tools", [[SHORT], [SHORT, COLOUR]])
def test_a_forced_call_that_is_cut_off_is_a_call(server, max_tokens, tools):
    fields = {"tools": tools, "tool_choice": "required", "max_tokens": max_tokens}
    whole = ask(server, fields)["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "length" and whole["message"]["content"] is None
    assert "paint".startswith(call["function"]["name"]) or call["function"]["name"] == "go"
    assert WHERE.startswith(call["function"]["arguments"]) or len(tools) == 2
    assert call["function"]["arguments"] or max_tokens < 24
    said = {"role": "tool", "tool_call_id": call["id"], "content": "cut off: once more"}
    ask(server, fields | {"messages": [*USER, whole["message"], said]})  # it may come back as it was
    chunks = list(
        server.client.chat.completions.create(model="full_sft_64", messages=USER, temperature=0, stream=True, **fields)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].content is None and "content" in deltas[0].model_fields_set
    pieces = [part.function for delta in deltas for part in delta.tool_calls or ()]
    assert pieces[0].name == call["function"]["name"]
    assert "".join(piece.arguments for piece in pieces) == call["function"]["arguments"]
    assert chunks[-1].choices[0].finish_reason == "length"


def test_which_tools_may_be_called(server):
    tools = {"tools": [SHORT, COLOUR], "max_tokens": 60}
    named = [{"type": "function", "function": {"name": "paint"}}]
    for choice in ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": named}},
                   {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "paint"}]},
                   {"type": "function", "name": "paint"}, named[0]):  # fmt: skip
        (call,) = ask(server, tools | {"tool_choice": choice})["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "paint"
    assert ask(server, tools | {"tool_choice": "any"})["choices"][0]["message"]["tool_calls"]
    for choice in ("some", {"type": "allowed_tools"}, {"type": "function", "function": {"name": "no"}}):
        assert ask(server, tools | {"tool_choice": choice}, status=400)["error"]["param"] == "tool_choice"
    calls = {"messages": USER, "logit_bias": {str(TOOL_CALL_ID): 12, str(TOOL_CALL_ID + 1): 12}, "temperature": 1.5}
    ask(server, tools | calls | {"n": 8, "max_tokens": 100, "parallel_tool_calls": False})


# ------------------------------------------------------------------------------------------------ other interfaces

FLAT = {"type": "function", "name": "go", "parameters": SHORT["function"]["parameters"], "strict": True}


def test_responses_by_the_official_package(server):
    create = server.client.responses.create
    fields = {"model": "full_sft_64", "input": "Who are you?", "temperature": 0, "max_output_tokens": 12}
    whole = create(**fields, include=["reasoning.encrypted_content"], store=True)
    assert whole.output_text == text(ask(server, {"max_tokens": 12}))
    assert whole.status in ("completed", "incomplete") and whole.usage.output_tokens <= 12
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Who are you?"}]}]
    assert create(**fields | {"input": items}).output_text == whole.output_text
    assert create(**fields, instructions="Be brief.").usage.input_tokens > whole.usage.input_tokens
    counted = server.client.responses.input_tokens.count(model="full_sft_64", input=items)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", whole.usage.input_tokens)
    refused = ask(server, {"input": []}, "/v1/responses/input_tokens", status=400)
    assert refused["error"]["param"] == "input"
    events = list(create(**fields, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events if not event.type.endswith("text.delta")]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.done", "content_part.done",
        "output_item.done", whole.status,
    ]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage
    for field in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "c"}):
        with pytest.raises(openai.BadRequestError) as error:
            create(**fields | field)
        assert error.value.param == next(iter(field)) and "\n" not in error.value.message
    for body, param in (({"input": []}, "input"), ({"input": "x", "max_output_tokens": -5}, "max_output_tokens"),
                        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
                        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type")):  # fmt: skip
        assert ask(server, body, "/v1/responses", status=400)["error"]["param"] == param


def test_calls_and_formats_of_responses(server):
    fields = {"model": "full_sft_64", "tools": [FLAT], "tool_choice": "required", "temperature": 0}
    question = {"role": "user", "content": "Where?"}
    with server.client.responses.stream(**fields, input=[question]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    (call,) = final.output
    assert call.name == "go" and call.arguments == WHERE and final.status == "completed"
    assert kinds.count("response.function_call_arguments.delta") > 1
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    again = [question, {"type": "reasoning", "summary": []}, call.model_dump(exclude={"parsed_arguments"}), result]
    assert server.client.responses.create(**fields, input=again).output[0].type == "function_call"
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["a", "b"]}}
    answer = server.client.responses.create(model="full_sft_64", input="x", text={"format": form})
    assert json.loads(answer.output_text) in ("a", "b")
    cut = server.client.responses.create(**fields, input=[question], max_output_tokens=4)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].type == "function_call" and cut.output[0].status == "incomplete"
    thinks = server.client.responses.create(
        model="full_sft_64", input="x", max_output_tokens=5, extra_body={"enable_thinking": True}
    )
    assert [item.type for item in thinks.output] == ["reasoning", "message"]


def test_anthropics_messages(server):
    fields = {"system": [{"type": "text", "text": "Be brief."}], "messages": USER, "max_tokens": 12}
    whole = ask(server, fields, "/v1/messages")
    assert whole["type"] == "message" and whole["content"][0]["type"] == "text"
    assert whole["stop_reason"] in ("end_turn", "max_tokens") and whole["usage"]["output_tokens"] <= 12
    tool = {"name": "go", "input_schema": SHORT["function"]["parameters"]}
    calls = fields | {"tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 60}
    made = ask(server, calls, "/v1/messages")
    (use,) = made["content"]
    assert made["stop_reason"] == "tool_use" and use["name"] == "go" and use["input"] == json.loads(WHERE)
    turn = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use["id"], "content": "done"}]}
    again = fields | {"messages": [*USER, {"role": "assistant", "content": made["content"]}, turn]}
    assert ask(server, again, "/v1/messages")["content"]
    body = {"model": "full_sft_64", "temperature": 0, "stream": True} | calls
    lines = server.post(body, "/v1/messages", headers={"x-api-key": "secret"}).text.split("\n\n")[:-1]
    events = [json.loads(line.split("data: ")[1]) for line in lines]
    assert all(line.startswith(f"event: {event['type']}\n") for line, event in zip(lines, events, strict=True))
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    arguments = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    assert json.loads("".join(arguments)) == use["input"] and len(arguments) > 1
    stopped = ask(server, fields | bias(" cat") | {"stop_sequences": ["zz", "t c"]}, "/v1/messages")
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "t c")
    counted = ask(server, fields, "/v1/messages/count_tokens")
    assert counted["input_tokens"] == whole["usage"]["input_tokens"]
    error = ask(server, fields | {"model": "nobody"}, "/v1/messages", status=404)
    assert error["type"] == "error" and error["error"]["type"] == "not_found_error"
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    assert "image" in ask(server, fields | {"messages": image}, "/v1/messages", status=400)["error"]["message"]


def test_tokenize_and_back(server):
    words = "Hello, <|im_end|> 巴黎 🐱"
    ids = TOKENIZER.encode(words).ids
    for name in ("prompt", "content"):
        made = ask(server, {name: words}, "/tokenize")
        assert made["tokens"] == ids and made["count"] == len(ids) and made["max_model_len"] == 512
    back = ask(server, {"tokens": ids}, "/detokenize")
    assert back["prompt"] == back["content"] == words
    prompt, _ = render_chat(TOKENIZER, USER, add_generation_prompt=True)
    assert ask(server, {"messages": USER}, "/tokenize")["tokens"] == prompt
    for path, body in (("/tokenize", {}), ("/detokenize", {"tokens": [99999]}), ("/detokenize", {"tokens": "x"})):
        assert ask(server, body, path, status=400)["error"]["param"] in ("prompt", "tokens")


def test_addresses_and_headers(server):
    get = {"headers": {"x-api-key": "secret", "x-request-id": "mine-1"}}
    listed = httpx.get(server.url + "/v1/models", **get)
    assert listed.headers["x-request-id"] == "mine-1"
    for path in ("/models", "/v1/models/", "//v1//models", "/models/"):
        assert httpx.get(server.url + path, **get).json() == listed.json(), path
    for path in ("/chat/completions", "/v1/chat/completions/", "//chat//completions"):
        assert text(ask(server, {}, path)) == text(ask(server, {}))
    head = httpx.head(server.url + "/v1/models", **get)
    assert head.status_code == 200 and head.content == b""
    assert int(head.headers["content-length"]) == len(listed.content)
    assert httpx.head(server.url + "/health").status_code == 200
    other = httpx.get(server.url + "/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert other and other != "a b"
    assert httpx.get(server.url + "/models", headers={"x-api-key": "wrong"}).status_code == 401
    assert httpx.get(server.url + "/v1/nothing", **get).status_code == 404

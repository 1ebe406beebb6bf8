"""Prompts and answers of a Chatbot: thinking, tools, transformers: `pytest tests/test_chatbot.py`."""

import argparse
import json

import pytest
import torch

from dataset.chat import END_THINK_ID, EOS_ID, THINK_ID, TOKENIZER_DIR, load_tokenizer
from model import checkpoint
from model.export.huggingface import save_hf
from model.inference import chatbot as chatbot_module
from model.inference.chatbot import Chatbot, TransformersChatbot, final_answer, load_chatbot
from model.inference.tools import SCHEMAS

DEFAULTS = dict(max_seq_len=None, max_new_tokens=None, temperature=0.7, top_p=0.9, thinking=None)
CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}
ROUND = [
    {"role": "user", "content": "1 + 1 = ?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"result": 2}'},
]
SYSTEM = {"role": "system", "content": "Be brief.", "tools": SCHEMAS}


@pytest.fixture
def chatbot(tiny, tmp_path):
    """chatbot(**settings) -> a Chatbot with random weights."""

    def build(**settings):
        model = tiny(vocab_size=6400, num_hidden_layers=1)
        args = argparse.Namespace(**DEFAULTS | settings)
        return Chatbot(tmp_path / "x.pth", model, load_tokenizer(), 2048, args)

    return build


@pytest.mark.parametrize("messages", [ROUND[:1], [SYSTEM, ROUND[0]], [SYSTEM, *ROUND], [*ROUND, *ROUND]])
def test_prompts_through_transformers_are_the_same(chatbot, tmp_path, messages):
    pytest.importorskip("transformers")
    ours = chatbot()
    save_hf(tmp_path / "hf", ours.model, TOKENIZER_DIR, torch.float32)
    args = argparse.Namespace(**DEFAULTS)
    theirs = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, args)
    for thinking in (None, True, False):
        args.thinking = ours.args.thinking = thinking
        assert theirs.encode(messages) == ours.encode(messages)
    args.thinking, args.max_new_tokens = True, 4
    assert next(theirs.stream(messages, None)) == "<think>\n"


def test_templates_of_other_models_get_tools_and_calls_in_their_form(chatbot, tmp_path):
    pytest.importorskip("transformers")
    save_hf(tmp_path / "hf", chatbot().model, TOKENIZER_DIR, torch.float32)
    args = argparse.Namespace(**DEFAULTS)
    bot = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, args)
    bot.tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages if m.tool_calls %}"
        "{% for c in m.tool_calls %}{{ c.type }} {{ c.function.arguments.expression }}{% endfor %}{% endfor %}"
    )
    as_text = {**ROUND[1], "tool_calls": json.dumps([CALL])}
    prompt = bot.encode([{**SYSTEM, "tools": json.dumps(SCHEMAS)}, ROUND[0], as_text, ROUND[2]])
    assert bot.tokenizer.decode(prompt) == "calculator add_days convert function 1 + 1"
    assert bot.tokenizer.decode(bot.encode(ROUND)) == "function 1 + 1"


def test_tools_stand_in_the_prompt(chatbot):
    bot = chatbot()
    prompt = bot.tokenizer.decode(bot.encode([SYSTEM, ROUND[0]]), skip_special_tokens=False)
    assert all(schema["function"]["name"] in prompt for schema in SCHEMAS) and "Be brief." in prompt


def test_thinking_is_switched_by_the_template(chatbot):
    plain, on, off = (chatbot(thinking=thinking) for thinking in (None, True, False))
    prompt = ROUND[:1]
    newline = plain.tokenizer.encode("\n").ids
    assert on.encode(prompt) == [*plain.encode(prompt), THINK_ID, *newline]
    assert off.encode(prompt)[: len(plain.encode(prompt)) + 1] == [*plain.encode(prompt), THINK_ID]
    assert off.encode(prompt).count(END_THINK_ID) == 1
    # What the template opened is part of the answer; an empty block is not.
    assert [next(bot.stream(prompt, 0)) for bot in (plain, on, off)] == ["", "<think>\n", ""]


@pytest.mark.parametrize(("thinking", "tokens"), [(None, 128), (False, 128), (True, 384)])
def test_thinking_gets_more_room_when_scoring(chatbot, thinking, tokens):
    bot = chatbot(thinking=thinking)
    with torch.no_grad():
        bot.model.model.embed_tokens.weight[:3] = 0  # no stop token: something else always has a logit above 0
    ((_, text),) = bot.answer_all([ROUND[:1]])
    assert bot.tokens == tokens
    assert text.startswith("<think>\n") is bool(thinking)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Paris.", "Paris."), ("<think>\nhm\n</think>\n\nParis.", "Paris."), ("<think>\ncut off", ""),
        ("<think>a</think>b</think>c", "b</think>c"), ("a <think>b</think> c", "a <think>b</think> c"),
    ],
)  # fmt: skip
def test_final_answer_is_without_thinking(text, answer):
    assert final_answer(text) == answer


def test_answers_of_many_prompts_end_for_the_same_reason_through_transformers(chatbot, tmp_path):
    pytest.importorskip("transformers")
    ours = chatbot(temperature=0, max_new_tokens=16)
    with torch.no_grad():
        ours.model.model.embed_tokens.weight[EOS_ID] *= 3  # some answers end
    save_hf(tmp_path / "hf", ours.model, TOKENIZER_DIR, torch.float32)
    theirs = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, ours.args)
    prompts = [[{"role": "user", "content": f"What is {n}?"}] for n in range(8)]
    expected, found = (
        # a character cut in two at the end is one replacement sign or several
        [(i, text.rstrip("\ufffd"), reason) for i, text, reason in bot.answer_each(prompts, [None] * 8, 3)]
        for bot in (ours, theirs)
    )
    assert found == sorted(expected)
    assert {reason for _, _, reason in expected} == {"stop", "length"}


# ------------------------------------------------------------------------------------------------ how it computes


@pytest.fixture
def weights(tiny, tmp_path):
    """load(**options) -> a chatbot on a saved model of 128 trained tokens."""
    model = tiny(vocab_size=6400, num_hidden_layers=1)
    checkpoint.save(tmp_path / "full_sft_64.pth", model, {"finished": {"max_seq_len": 128}})
    choice = dict(load=0, weight=None, out_dir=tmp_path, model_mode=1, hidden_size=None, use_moe=None, lora_name=None)

    def load(dtype=None, **options) -> Chatbot:
        args = argparse.Namespace(**DEFAULTS | choice | {"temperature": 0, "max_new_tokens": 12})
        return load_chatbot(args, torch.device("cpu"), dtype, **options)

    return load


def test_compiled_and_quantised_bots_answer(weights, capsys):
    question = [{"role": "user", "content": "Who are you?"}]
    plain = weights(torch.float32)
    expected = "".join(plain.stream(question, None))
    compiled = weights(torch.float32, compiled=True)
    assert "".join(compiled.stream(question, None)) == expected
    for kind in ("int8", "int4"):
        eager, fast = weights(quantized=kind), weights(quantized=kind, compiled=True)
        assert f"{kind} on cpu" in eager.title
        assert "".join(eager.stream(question, None)) == "".join(fast.stream(question, None))
    assert "bf16 on cpu" in weights(torch.bfloat16, compiled=True).title
    assert [text for _, text in compiled.answer_all([question] * 3)] == [expected] * 3


def test_without_a_compiler_it_answers_all_the_same(weights, monkeypatch, capsys):
    def fails(model):
        raise RuntimeError("the compiled step needs a C++ compiler")

    monkeypatch.setattr(chatbot_module, "CpuStep", fails)
    bot = weights(torch.float32, compiled=True)
    assert "C++ compiler: answering without it" in capsys.readouterr().err
    assert "".join(bot.stream([{"role": "user", "content": "Hi"}], None))


def test_yarn_gives_four_times_the_context(weights):
    long = [{"role": "user", "content": "word " * 150}]
    assert weights().max_len == 128 and weights().overflow(long)
    bot = weights(extrapolate=True)
    assert bot.max_len == 512 and not bot.overflow(long)
    assert bot.model.config.rope_scaling["original_max_position_embeddings"] == 128 and bot.model.rope_factor > 1
    assert "".join(bot.stream(long, None))

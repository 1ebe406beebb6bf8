"""Prompts and answers of a Chatbot: thinking, tools, transformers: `pytest tests/test_chatbot.py`."""

import json
from dataclasses import replace

import pytest
import torch

from dataset.chat import END_THINK_ID, EOS_ID, THINK_ID, TOOL_CALL_ID, load_tokenizer
from model import checkpoint
from model.checkpoint import CheckpointError
from model.device import compute_dtype
from model.export.huggingface import save_hf
from model.inference import cpu_step, engine
from model.inference.answers import to_message
from model.inference.chatbot import AnswerSettings, Chatbot, TransformersChatbot, load_chatbot
from model.inference.tools import SCHEMAS
from tests.spelled import encode

CALL = {"name": "calculator", "arguments": {"expression": "1 + 1"}}
ROUND = [
    {"role": "user", "content": "1 + 1 = ?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"result": 2}'},
]
SYSTEM = {"role": "system", "content": "Be brief.", "tools": SCHEMAS}


def spelled(pieces) -> str:
    """An answer as the model wrote it."""
    return "".join(piece.marker + piece.text for piece in pieces)


@pytest.fixture
def chatbot(tiny, tmp_path):
    """chatbot(**settings) -> a Chatbot with random weights."""

    def build(**settings):
        model = tiny(vocab_size=6400, num_hidden_layers=1)
        return Chatbot(tmp_path / "x.pth", model, load_tokenizer(), 2048, AnswerSettings(**settings))

    return build


@pytest.mark.parametrize("messages", [ROUND[:1], [SYSTEM, ROUND[0]], [SYSTEM, *ROUND], [*ROUND, *ROUND]])
def test_prompts_through_transformers_are_the_same(chatbot, tmp_path, messages):
    pytest.importorskip("transformers")
    ours = chatbot()
    save_hf(tmp_path / "hf", ours.model, load_tokenizer(), torch.float32)
    settings = ours.settings
    theirs = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, settings)
    for thinking in (None, True, False):
        settings.thinking, settings.max_new_tokens = thinking, 4
        assert theirs.encode(messages) == ours.encode(messages)
        assert spelled(theirs.stream(messages, 0)).startswith("<think>\n") is bool(thinking)


def test_no_tool_is_called_where_none_is_offered(chatbot):
    """By a model that always calls one."""
    bot = chatbot(max_new_tokens=4, temperature=0)
    with torch.no_grad():
        for layer in bot.model.model.layers:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
        embedding = bot.model.model.embed_tokens.weight
        embedding[TOOL_CALL_ID] = 3 * embedding[bot.encode(ROUND[:1])[-1]]  # is what all prompts end with, but longer
    none = {**SYSTEM, "tools": []}
    for messages, called in (([SYSTEM, ROUND[0]], True), (ROUND[:1], False), ([none, *ROUND], False)):
        assert ("<tool_call>" in spelled(bot.stream(messages, 0))) is called
        ((_, message),) = bot.answer_all([messages])
        assert bool(message.faults) is called  # a call that never ends


def test_templates_of_other_models_get_tools_and_calls_in_their_form(chatbot, tmp_path):
    pytest.importorskip("transformers")
    save_hf(tmp_path / "hf", chatbot().model, load_tokenizer(), torch.float32)
    bot = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, AnswerSettings())
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
    plain, on, off = (chatbot(thinking=thinking, max_new_tokens=4) for thinking in (None, True, False))
    prompt = ROUND[:1]
    newline = plain.tokenizer.encode("\n").ids
    assert on.encode(prompt) == [*plain.encode(prompt), THINK_ID, *newline]
    assert off.encode(prompt)[: len(plain.encode(prompt)) + 1] == [*plain.encode(prompt), THINK_ID]
    assert off.encode(prompt).count(END_THINK_ID) == 1
    # What the template opened is part of the answer; an empty block is not.
    assert [spelled(bot.stream(prompt, 0)).startswith("<think>\n") for bot in (plain, on, off)] == [False, True, False]


@pytest.mark.parametrize(("thinking", "tokens"), [(None, 128), (False, 128), (True, 384)])
def test_thinking_gets_more_room_when_scoring(chatbot, thinking, tokens):
    bot = chatbot(thinking=thinking)
    with torch.no_grad():
        bot.model.model.embed_tokens.weight[:3] = 0  # no stop token: something else always has a logit above 0
    ((_, message),) = bot.answer_all([ROUND[:1]])
    assert bot.tokens == tokens
    assert bool(message.reasoning_content) is bool(thinking) is not bool(message.content)


def test_markers_of_other_tokenizers_are_known_by_name(chatbot, tmp_path):
    """Also where a template has opened the thinking; a marker that the tokenizer lacks is text."""
    pytest.importorskip("transformers")
    save_hf(tmp_path / "hf", chatbot().model, load_tokenizer(), torch.float32)
    bot = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, AnswerSettings())
    ids = [THINK_ID, *encode("hm"), END_THINK_ID, *encode("\n\nWrite <think>."), EOS_ID]
    message = to_message(bot.parse(ROUND[:1], bot.encode(ROUND[:1]), ids, cut=False))
    assert (message.reasoning_content, message.content) == ("hm", "Write <think>.")
    opened = [*bot.encode(ROUND[:1]), THINK_ID, *encode("\n")]
    message = to_message(bot.parse(ROUND[:1], opened, ids[1:], cut=False))
    assert (message.reasoning_content, message.content) == ("hm", "Write <think>.")
    bot.markers = {}
    assert to_message(bot.parse(ROUND[:1], bot.encode(ROUND[:1]), ids, cut=False)).reasoning_content == ""


def test_answers_of_many_prompts_end_for_the_same_reason_through_transformers(chatbot, tmp_path):
    pytest.importorskip("transformers")
    ours = chatbot(temperature=0, max_new_tokens=16)
    with torch.no_grad():
        ours.model.model.embed_tokens.weight[EOS_ID] *= 3  # some answers end
    save_hf(tmp_path / "hf", ours.model, load_tokenizer(), torch.float32)
    theirs = TransformersChatbot(tmp_path / "hf", torch.device("cpu"), torch.float32, ours.settings)
    prompts = [[{"role": "user", "content": f"What is {n}?"}] for n in range(8)]
    expected, found = (
        # a character cut in two at the end is one replacement sign or several
        [(i, message.text.rstrip("\ufffd"), reason) for i, message, reason in bot.answer_each(prompts, [None] * 8, 3)]
        for bot in (ours, theirs)
    )
    assert found == sorted(expected)
    assert {reason for _, _, reason in expected} == {"stop", "length"}


# ------------------------------------------------------------------------------------------------ how it computes


@pytest.fixture
def step_there():
    try:
        cpu_step.build()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def weights(tiny, tmp_path):
    """load(**options) -> a chatbot on a saved model of 128 trained tokens."""
    model = tiny(vocab_size=6400, num_hidden_layers=1)
    checkpoint.save(tmp_path / "full_sft_64.pth", model, {"arguments": {"max_seq_len": 128}})
    settings = AnswerSettings(temperature=0, max_new_tokens=12)

    def load(dtype=None, **options) -> Chatbot:
        return load_chatbot(tmp_path / "full_sft_64.pth", torch.device("cpu"), dtype, replace(settings), **options)

    return load


def test_the_compiled_step_is_taken_wherever_it_works(weights, step_there):
    question = [{"role": "user", "content": "Who are you?"}]
    plain = weights(torch.float32, compiled=False)
    expected = spelled(plain.stream(question, None))
    exact = weights(torch.float32)
    assert exact.compiled and not plain.compiled and "float32" in exact.title
    assert isinstance(exact.step, cpu_step.CpuStep) and exact.step is exact.step and plain.step is False
    assert spelled(exact.stream(question, None)) == expected
    assert [message.text for _, message in exact.answer_all([question] * 3)] == [expected.strip()] * 3
    for kind in ("int8", "int4"):
        eager, fast = weights(quantized=kind, compiled=False), weights(quantized=kind)
        assert f"{kind} on cpu" in eager.title and fast.compiled
        # The compiled step may round inputs too (test_cpu_step): a random model then says something else in the end.
        assert spelled(eager.stream(question, None))[:5] == spelled(fast.stream(question, None))[:5]
    for dtype in (None, torch.bfloat16):
        assert weights(dtype).compiled and "parameters, bf16 on cpu" in weights(dtype).title
    assert not weights(torch.float16).compiled  # it computes in fp32 alone
    assert weights(compiled=False).model.model.norm.weight.dtype == compute_dtype("cpu")


def test_where_the_step_does_not_work_a_line_says_so_or_it_is_an_error(weights, monkeypatch, capsys):
    def build():
        raise RuntimeError("it needs a C++ compiler")

    monkeypatch.setattr(cpu_step, "load_library", build)
    engine._say_once.cache_clear()
    for _ in range(2):
        bot = weights()
        assert not bot.compiled and bot.model.model.norm.weight.dtype == compute_dtype("cpu")
        assert spelled(bot.stream([{"role": "user", "content": "Hi"}], None))
    err = capsys.readouterr().err
    assert err == "note: computing without the compiled step, which is slower: it needs a C++ compiler\n"
    weights(compiled=False)
    weights(torch.float16)  # nobody expects it there
    assert not capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"--compile 1: it needs a C\+\+ compiler; leave it out"):
        weights(compiled=True)


def test_yarn_gives_four_times_the_context(weights):
    long = [{"role": "user", "content": "word " * 150}]
    assert weights().max_len == 128 and weights().overflow(long)
    bot = weights(extrapolate=True)
    assert bot.max_len == 512 and not bot.overflow(long)
    assert bot.model.config.rope_scaling["original_max_position_embeddings"] == 128 and bot.model.rope_factor > 1
    assert spelled(bot.stream(long, None))

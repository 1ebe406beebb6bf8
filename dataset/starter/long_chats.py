"""Chats that fill a context of 1,024 tokens: many exchanges after one another, and lists of functions before them.

They hold no knowledge of their own. A model that has only seen short chats does not answer what it knows once much
stands before the question: what is learnt here is to look past it.
"""

import json
import random

from dataset.starter import chains, stages, turns
from dataset.starter.registers import TYPED, typed
from dataset.starter.skills import is_held_out

LONGEST = 2_800  # bytes of a chat, its functions included: about 800 tokens
SHORT = 0.7  # share of the chats that are a single exchange, as most first questions are
WITH_FUNCTIONS = 0.6  # share of the others that list some
OURS = 0.7  # share of those whose functions are the built-in tools, which are then called
TELLING = 0.5  # share of the longer ones whose user tells who they are or what they like, and asks for it later
CHAINED = 0.5  # share of those calls that are several after one another (chains.py)

OTHER = {"zh": "en", "en": "zh"}
VERBS = ("get", "find", "list", "search", "create", "send", "open", "delete", "update", "read")
NOUNS = {
    "weather": "天气", "news": "新闻", "price": "价格", "file": "文件", "email": "邮件", "calendar": "日历",
    "note": "笔记", "recipe": "菜谱", "song": "歌曲", "map": "地图", "ticket": "车票", "order": "订单",
}  # fmt: skip
ARGUMENTS = {
    "city": "string", "query": "string", "name": "string", "path": "string", "date": "string", "text": "string",
    "limit": "integer", "page": "integer", "price": "number", "urgent": "boolean",
}  # fmt: skip
DESCRIPTIONS = {
    "en": ["{verb} a {noun}", "Use this to {verb} one {noun} of the user.", "{verb} the {noun} and return it as JSON"],
    "zh": ["{verb} {zh}", "用它来处理用户的{zh}。", "查询{zh}，返回 JSON"],
}


def function(rng: random.Random, lang: str) -> dict:
    """The schema of an invented function, as clients send them."""
    verb, (noun, zh) = rng.choice(VERBS), rng.choice(list(NOUNS.items()))
    properties = {}
    for name in rng.sample(list(ARGUMENTS), rng.randint(0, 3)):
        properties[name] = {"type": ARGUMENTS[name]}
        if rng.random() < 0.5:
            properties[name]["description"] = f"the {name} of the {noun}" if lang == "en" else f"{zh}的 {name}"
    schema = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        schema["required"] = list(properties)[: rng.randint(0, 3)]
    text = rng.choice(DESCRIPTIONS[lang]).format(verb=verb, noun=noun, zh=zh)
    return {"type": "function", "function": {"name": f"{verb}_{noun}", "description": text, "parameters": schema}}


def long_chat(rng: random.Random, lang: str, opening, exchange) -> list[dict]:
    """A chat. exchange(lang, tools) gives the messages of a question and its answer, of any subject that is not left
    to the built-in tools if these are in view; opening(lang) those that a chat begins with, a system message among them
    now and then."""
    if rng.random() < SHORT:
        return opening(lang)
    messages, ours = [], False
    if rng.random() >= WITH_FUNCTIONS:
        messages += opening(lang)
    else:
        ours = rng.random() < OURS
        listed = [function(rng, lang) for _ in range(rng.randint(1, 6))]
        messages.append(stages.TOOLS_OFFERED if ours else stages.TOOLS_OFFERED | {"tools": json.dumps(listed)})
    goal, user = rng.randint(300, LONGEST), turns.User(rng, lang) if rng.random() < TELLING else None
    while size(messages) < goal or messages[-1]["role"] != "assistant":
        lang = OTHER[lang] if rng.random() < 0.1 else lang
        if user and rng.random() < (0.15 if user.known else 0.5):
            more = not user.known or (len(user.known) < 4 and rng.random() < 0.5)
            messages += exchanged(*(user.tell() if more else user.ask()))
        if not ours or rng.random() < 0.5:
            messages += exchange(lang, ours)
            continue
        if rng.random() < CHAINED:
            messages += chains.demonstration(rng, lang)
            continue
        called, key = stages.tool_exchange(rng, lang)
        called[0]["content"] = typed(rng, called[0]["content"], lang) if rng.random() < TYPED else called[0]["content"]
        messages += called if not is_held_out(key) else []
    return messages + (exchanged(*user.ask()) if user and user.known else [])


def exchanged(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def size(messages: list[dict]) -> int:
    """Bytes of the texts."""
    return sum(len((m.get("content") or "").encode()) + len(m.get("tools", "").encode()) + 24 for m in messages)

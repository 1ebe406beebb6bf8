"""Data that several test files share: real text, chats made of it, and two dirty files with the faults planted in them.

Every fault of messy_text() and messy_chats() stands here beside the words by which it must be called.
"""

import json
import string
from pathlib import Path

TEXTS = Path(__file__).resolve().parent / "fixtures" / "real_text" / "texts.jsonl"


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def real_texts() -> list[str]:
    with open(TEXTS, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def passages() -> list[str]:
    """The paragraphs of the real texts that are long enough to stand alone."""
    return [part for text in real_texts() for part in text.split("\n") if len(part) >= (40 if part.isascii() else 25)]


def user(content, **fields) -> dict:
    return {"role": "user", "content": content, **fields}


def assistant(content="", **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def tool(content) -> dict:
    return {"role": "tool", "content": content}


def system(content="", **fields) -> dict:
    return {"role": "system", "content": content, **fields}


def schema(name: str) -> dict:
    parameters = {"type": "object", "properties": {"page": {"type": "integer"}}, "required": ["page"]}
    return {"type": "function", "function": {"name": name, "description": "读一页 a page", "parameters": parameters}}


def real_chats() -> list[list[dict]]:
    """Conversations of one to three turns about the passages; every fifth reads its passage with a tool."""
    parts, rows = passages()[30:], []  # the others are there to make faults of
    for i in range(0, len(parts) - 5, 3):
        a, b, c = parts[i : i + 3]
        if i % 15 == 0:
            calls = dumps([{"name": "read_page", "arguments": {"page": i}}])
            tools = dumps([schema("read_page"), schema("close_book")])
            rows.append([system("", tools=tools), user(a), assistant("", tool_calls=calls), tool(b), assistant(c)])
        elif i % 2:
            rows.append([user(a), assistant(b, reasoning_content=c[:40])])
        else:
            rows.append([system(a[:30]), user(a), assistant(b), user("And then? 然后呢？"), assistant(c)])
    return rows


class DirtyFile:
    """Lines of a JSONL file, good rows among planted ones, and what is wrong with which line."""

    def __init__(self, good: list[str]):
        self.good = iter(good)
        self.lines: list[bytes] = []
        self.planted: list[tuple[int, str, str]] = []  # (line, level, words of the fault)
        self.copies: dict[str, dict[int, int]] = {}  # kind of duplicate -> {line: the line that it repeats}
        self.notes: dict[str, list[int]] = {}
        self.harmless: list[int] = []  # unusual lines that nobody should "repair"
        self.row()

    def add(self, line: str | bytes) -> int:
        self.lines.append(line.encode() if isinstance(line, str) else line)
        return len(self.lines)

    def row(self) -> int:
        """A good row."""
        return self.add(next(self.good))

    def plant(self, level: str, words: str, *lines: str | bytes) -> None:
        """Lines that all have this fault, each with a good one after it."""
        for line in lines:
            self.planted.append((self.add(line), level, words))
            self.row()

    def copy(self, kind: str, change, line: str | None = None) -> None:
        """A good row (or this line) once more, changed: change(line) -> line."""
        original = self.row() if line is None else self.add(line)
        self.row()
        self.copies.setdefault(kind, {})[self.add(change(self.lines[original - 1].decode()))] = original

    def leave(self, *lines: str) -> None:
        self.harmless += [self.add(line) for line in lines]

    def note(self, words: str, line: int) -> None:
        self.notes.setdefault(words, []).append(line)

    def faults(self, level: str) -> dict[int, str]:
        return {line: words for line, of, words in self.planted if of == level}

    def content(self) -> bytes:
        """The file: a byte order mark first, some lines that end with CR LF, no newline at the end."""
        self.note("byte order mark before", 1)
        crlf = [self.row() for _ in range(3)]
        for line in crlf:
            self.lines[line - 1] += b"\r"
            self.note("CR LF", line)
        self.note("no newline at the end", self.row())
        return b"\xef\xbb\xbf" + b"\n".join(self.lines)


def messy_text() -> DirtyFile:
    """Pretraining rows. The faults' words are those of inspect_data.py."""
    parts = [part for part in passages() if len(part) > 60]
    spare = parts[:50]  # texts to make faults of
    file = DirtyFile([dumps({"text": part}) for part in parts[50:]])

    def text(value: str) -> str:
        return dumps({"text": value})

    _plant_broken_lines(file)
    file.plant("error", "wrong case", dumps({"Text": spare[0]}))
    file.plant("error", 'no "text" key', "{}", dumps({"body": spare[1]}))
    values = (None, True, 42, 2.5, {"a": "b"}, [spare[2]])
    file.plant("error", '"text" is not a string', *(dumps({"text": value}) for value in values))
    file.plant("error", "empty text", text(""))
    file.plant("error", "text of blanks only", text(" \t\n"), text("\u3000"))
    for words, values in _odd_texts(spare).items():
        file.plant("warning", words, *map(text, values))
    file.leave('{"text": "An escaped pair \\ud83d\\ude00 is one character."}')
    file.leave(dumps({"content": "A short text of its own under another name: 别的名字。"}))
    file.leave(dumps({"text": spare[30], "source": "book", "page": 3}))
    file.leave(
        text("一家人👨‍👩‍👧‍👦去看🇨🇳比赛，👍🏽都来加油，❤️‍🔥冲鸭！"),
        text("𠮷野家在㐂的旁边，𪚥是龙字。今天天气很好，我们去散步。"),
    )
    for change in (str, str, lambda line: json.dumps(json.loads(line)).replace(": ", " :  ")):
        file.copy("exact duplicate", change)
    file.copy("same text but for", lambda line: text(f"  {json.loads(line)['text']} \n"))
    english = next(part for part in reversed(parts) if "Alice" in part)
    file.copy("same text but for", lambda _: text(english.upper()), text(english))
    _near_copies(file, parts, text)
    return file


def _plant_broken_lines(file: DirtyFile) -> None:
    """What no JSON parser, or no strict one, takes."""
    file.plant("error", "invalid JSON", "plain words, no JSON", "{'text': 'of Python'}", '{text: "no quotes"}')
    file.plant("error", "invalid JSON", '{"text": NaN}', '{"text": "a"} {"text": "b"}', '{"text": "raw\ttab"}')
    file.plant("error", "invalid JSON", '{"text": "bad escape \\x41"}', '{"text": True}', '{"text": "cut o', "// note")
    file.plant("error", "invalid JSON", '{"text": "comma",}', '{"text": "raw \x01"}', '{"text": "open"')
    file.plant("error", "not an object", '"a string"', "42", "null", '["a list"]')
    file.plant("error", "empty line", "")
    file.plant("error", "line of blanks only", "  ")
    for half in ("low \\udc00 inside", "at the end \\ud83d", "in the wrong order \\ude00\\ud83d"):
        file.plant("error", "lone surrogate", f'{{"text": "{half}"}}')
    file.plant("error", "not UTF-8", b'{"text": "\xff\xfe"}')
    file.plant("error", "duplicate JSON key", '{"text": "once", "text": "twice"}')


def _odd_texts(spare: list[str]) -> dict[str, list[str]]:
    chinese = next(part for part in spare[34:] if "的" in part and len(part) > 80)
    letters = (string.ascii_letters + string.digits) * 40
    return {
        "bidi": [f"\u202e{spare[3]}\u202c\u200f"],
        "very short": ["。", "a b", "no", "好"],
        "very long": [chinese * (20_000 // len(chinese)), letters * 5],
        "unbroken run": [letters],
        "HTML": [
            f"<div class='a'><p>{spare[4]}</p></div>",
            f"<script>var a = 1;</script>{spare[5]}",
            f"<!-- begin -->{spare[6]}",
            f"{spare[7]}&nbsp;&amp;<br>",
            f"&lt;p&gt;{spare[8]}&lt;/p&gt;",
            f"{spare[9]} <a href='b",
        ],
        "mojibake": [
            chinese.encode().decode("cp1252", "ignore"),
            f"锟斤拷{spare[10]}烫烫烫",
            chinese.encode().decode("gb18030", "ignore"),
        ],
        "literal chat markers": [
            f"half of one <|im_start| {spare[11]}",
            f"{spare[12]}<|endoftext|>{spare[12]}",
            f"<think>{spare[13]}</think><tool_call>",
            f"<|im_start|>assistant\n{spare[14]}<|im_end|>",
        ],
        "replacement characters": [f"{spare[15]}\ufffd\ufffd"],
        "NFC": [f"Cafe\u0301, nai\u0308ve, re\u0301sume\u0301. {spare[16]}"],
        "markdown": ["```python\nfor i in range(3):\n    print(i)\n```", f"# A title\n{spare[17]}"],
        "no-break spaces": [spare[18].replace(" ", "\u00a0") + "\u00a0"],
        "soft hyphens": [f"{spare[33][:30]}\u00ad{spare[33][30:]}"],
        "several scripts": ["これは日本語です。한국어 문장입니다. هذه جملة عربية. Это русский текст. นี่คือภาษาไทย"],
        "private-use": [f"{spare[19]}\ue000\ufdd0"],
        "byte order mark in": [f"{spare[20]}\ufeff{spare[20]}"],
        "repetition": ["the same again " * 400, "今天天气很好。" * 300, "a" * 150 + " " + "啊" * 5000],
        "full-width": ["Ｔｈｅ　ｗｉｄｅ　ｌｅｔｔｅｒｓ　ａｎｄ　１２３，" + spare[21]],
        "many newlines": [spare[22] + "\n" * 2000 + spare[23]],
        "URL only": ["https://example.org/a?b=c&d"],
        "digits only": ["3.14159 26535 89793 23846"],
        "no letters": ["😀😃😄😁😆😅😂🤣🥲🥹😊😇"],
        "punctuation only": ["!!! ... ??? --- ,,, ;;;"],
        "zero-width": ["\u200b".join(spare[24])],
        "control characters": [f"{spare[25]}\0", f"\x1b[31m{spare[26]}\x07"],
        "compatibility ideographs": [f"{spare[27]}\uf900\u2f00"],
        "markers of other models": [f"<s>[INST] {spare[28]} [/INST]</s>"],
        "line separators": [f"{spare[29]}\u2028{spare[29]}", f"{spare[31]}\u0085{spare[32]}"],
    }


def _near_copies(file: DirtyFile, parts: list[str], text) -> None:
    """Long rows with a word changed, or a sentence more."""
    long = [part for part in reversed(parts) if len(part) > 200]
    english, chinese = [part for part in long if "的" not in part], [part for part in long if "的" in part]
    for original, changed in (
        (english[1], english[1].replace(" the ", " that ", 1)),
        (english[2], f"A sentence stands in front. {english[2]}"),
        (chinese[0], chinese[0].replace("的", "之", 1)),
        (chinese[1], chinese[1] + "于是大家都散了。"),
    ):
        file.copy("near duplicate", lambda _, changed=changed: text(changed), text(f"{original} 1."))


def messy_chats() -> DirtyFile:
    """SFT rows. The faults' words are those of checks.py, and of inspect_data.py for some warnings."""
    parts = passages()
    file = DirtyFile([dumps({"conversations": chat}) for chat in real_chats()])
    for words, lines in _unusable_chats(parts).items():
        file.plant("error", words, *lines)
    for words, lines in _doubtful_chats(parts).items():
        file.plant("warning", words, *lines)
    file.leave(dumps({"conversations": [user(parts[19], id=3), assistant(parts[20])], "source": "book"}))
    for line in _other_formats(parts):
        file.leave(line)
    file.copy("exact duplicate", str)
    file.copy("near duplicate", lambda line: line[: line.rindex('"}')] + ' And so it ended."}]}')
    return file


TOOLS = dumps([schema("read_page")])
CALL = dumps([{"name": "read_page", "arguments": {"page": 1}}])


def row(*messages) -> str:
    return dumps({"conversations": list(messages)})


def calling(calls, *after, tools=TOOLS) -> str:
    """A row in which the assistant calls; after it what follows, else a result and an answer."""
    messages = [system("", tools=tools), user("Read 读"), assistant("", tool_calls=calls)]
    return row(*messages, *(after or (tool("a page"), assistant("It is a page."))))


def _unusable_chats(parts: list[str]) -> dict[str, list[str]]:
    return {
        "invalid JSON": ['{"conversations": [{"role": "us'],
        "empty line": [""],
        "not an object": [dumps([user("a"), assistant("b")])],
        'no "conversations" key': ["{}", dumps({"text": "a"}), dumps({"question": "a", "reply": "b"})],
        "in doubt": [dumps({"question": "a", "answer": "b", "choices": ["b", "c"]})],
        "conversation is an object": ['{"conversations": {"role": "user"}}'],
        "conversation is a string": ['{"conversations": "[]"}'],
        "conversation is empty": ['{"conversations": []}'],
        "conversation is null": ['{"conversations": null}'],
        "message 2: is null": [row(user("a"), None, assistant("b"))],
        "message 2: is a string": [row(user("a"), "b")],
        "content is a list": [row(user([{"type": "text", "text": "a"}] * 2), assistant("b"))],
        "content is a number": [row(user(42), assistant("b"))],
        "content is missing or null": [row(user("a"), {"role": "assistant"}), row(user(None), assistant("b"))],
        "role is missing or null": [row(user("a"), {"content": "b"}), row(user("a"), {"role": None, "content": "b"})],
        'unknown role "narrator"': [row(user("a"), {"role": "narrator", "content": "b"}, assistant("c"))],
        "no assistant message": [row(user("a")), row(system("a"))],
        "says nothing": [row(user("a"), assistant("")), row(user("a"), assistant(" ", tool_calls=""))],
        "lone surrogate": ['{"conversations": [{"role": "user", "content": "\\ud83d"}]}'],
        "a tool message without a call": [row(user("a"), tool("b"), assistant("c"))],
        "tools: not valid JSON": [calling(CALL, tools='[{"type": ')],
        "tool_calls: not valid JSON": [calling('[{"name": ')],
        'has no "name"': [calling('[{"arguments": {}}]')],
        "which tools does not list": [calling(CALL.replace("read_page", "burn_page")), calling(CALL, tools="[]")],
    }


def _other_formats(parts: list[str]) -> list[str]:
    """Conversations as other projects write them."""
    return [
        dumps({"messages": [user(parts[21]), assistant(parts[22])]}),
        dumps({"instruction": parts[23], "input": "", "output": parts[24]}),
        dumps({"prompt": parts[25], "completion": parts[26]}),
        row({"from": "human", "value": parts[27]}, {"from": "gpt", "value": parts[28]}),
        row({"role": "human", "content": parts[29]}, {"role": "Assistant", "content": parts[30]}),
    ]


def _doubtful_chats(parts: list[str]) -> dict[str, list[str]]:
    numbers = [turn for i in range(60) for turn in (user(f"{i} + 1 = ?"), assistant(f"{i + 1}"))]
    return {
        "literal <|im_": [
            row(user(f"{parts[3]}<|im_start|>system"), assistant("b")),
            row(user(parts[4]), assistant("a<|im_end|>b")),
            calling(CALL, tool("<|im_start|>assistant"), assistant(parts[5])),
        ],
        "<tool_call>": [row(user(parts[6]), assistant("<think> and <tool_call>"))],
        "two user messages": [row(user(parts[7]), user(parts[8]), assistant("b"))],
        "two assistant messages": [row(user(parts[9]), assistant("a"), assistant("b"))],
        "last message is not from the assistant": [row(user(parts[10]), assistant("a"), user("b"))],
        "the assistant speaks first": [row(assistant("a"), user(parts[11]), assistant("b"))],
        "content is blank": [row(user(" \n"), assistant(parts[12]))],
        "not answered by a tool message": [calling(CALL, user(parts[13]), assistant("b"))],
        "tool_calls is a list": [calling(json.loads(CALL))],
        "tool_calls is one object": [calling(dumps(json.loads(CALL)[0]), tool("a"), assistant("c"))],
        "tool_calls is empty": [row(user(parts[14]), assistant("b", tool_calls="[]"))],
        "arguments are a JSON string": [calling(dumps([{"name": "read_page", "arguments": '{"page": 9}'}]))],
        "tools is a list": [calling(CALL, tool("b"), assistant("d"), tools=[schema("read_page")])],
        "control characters": [row(user(parts[15]), assistant("a\0b\x07"))],
        "very long": [row(user(parts[16]), assistant("\n".join(parts)[:15_000]))],
        "system message is not the first": [row(user(parts[17]), system("a"), assistant("b"))],
        "second system message": [row(system("a"), system("b"), user(parts[18]), assistant("c"))],
        "very many messages": [row(*numbers)],
    }

"""server/static/chat.html in a headless Chromium: `pytest tests/test_chat_page.py`.

What the page does with an answer is tested against a small server that says what a test tells it to, event by event;
that page and server fit together, against serve_openai_api.py.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_eval_model import parrot

from model import checkpoint
from model.inference.tools import SCHEMAS, run_tool

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "server" / "static" / "chat.html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with chromedriver is installed")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --lang=en --window-size=1180,760""".split()
SECONDS = 20  # for a condition to become true
ATTACK = '<img src=x onerror="window.attacked=1"><script>window.attacked=1</script>'


# ------------------------------------------------------------------------------------------------ the scripted server


def says(*texts: str, finish: str = "stop", field: str = "content") -> list[dict]:
    return [{"delta": {field: text}} for text in texts] + [{"delta": {}, "finish_reason": finish}]


def calls(*named: tuple[str, str]) -> list[dict]:
    """An answer that calls tools; the arguments come in two pieces."""
    events = []
    for i, (name, text) in enumerate(named):
        call = {"index": i, "id": f"call_{time.monotonic_ns()}", "type": "function"}
        events.append({"delta": {"tool_calls": [{**call, "function": {"name": name, "arguments": text[:5]}}]}})
        events.append({"delta": {"tool_calls": [{"index": i, "function": {"arguments": text[5:]}}]}})
    return events + [{"delta": {}, "finish_reason": "tool_calls"}]


class Script:
    """A server with answers to give. An answer is a list of choices to stream, or a (status, body, headers) to refuse
    with; among the choices an Event is waited for, a str is an error, and BREAK breaks the connection off."""

    BREAK = object()

    def __init__(self):
        self.answers, self.requests, self.keys, self.tools, self.key = [], [], [], [], None
        self.left = threading.Event()  # a client went away in the middle of an answer
        self.models = ["base", "medical"]
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                script.get(self)

            def do_POST(self):
                script.post(self, self.rfile.read(int(self.headers["Content-Length"])).decode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, handler, body, kind="application/json", status=200, headers=()):
        handler.send_response(status)
        for name, value in (("Content-Type", kind), *headers):
            handler.send_header(name, value)
        handler.end_headers()
        if body is not None:
            handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def get(self, handler):
        if handler.path == "/":
            self.reply(handler, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            self.reply(handler, {"error": {"message": "wrong key", "code": "invalid_api_key"}}, status=401)
        elif handler.path == "/v1/models":
            self.reply(handler, {"object": "list", "data": [{"id": name} for name in self.models]})
        elif handler.path == "/v1/tools":
            self.reply(handler, SCHEMAS)

    def post(self, handler, body):
        if handler.path != "/v1/chat/completions":
            name = handler.path.removeprefix("/v1/tools/")
            self.tools.append((name, body))
            return self.reply(handler, run_tool(name, json.loads(body)).encode())
        self.requests.append(json.loads(body))
        self.keys.append(handler.headers["Authorization"])
        answer = self.answers.pop(0)
        if isinstance(answer, tuple):
            status, refusal, *headers = answer
            return self.reply(handler, refusal, status=status, headers=headers)
        self.reply(handler, None, "text/event-stream")
        try:
            for event in answer:
                if event is self.BREAK:
                    return
                if isinstance(event, threading.Event):
                    self.hold(handler, event)
                elif isinstance(event, str):
                    self.event(handler, {"error": {"message": event}})
                else:
                    self.event(handler, {"choices": [{"index": 0, "finish_reason": None, **event}]})
            self.event(handler, {"choices": [], "usage": {"completion_tokens": 42}})
            handler.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.left.set()

    def event(self, handler, value):
        handler.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        handler.wfile.flush()

    def hold(self, handler, event):
        """Comments, as servers send them to keep a connection open, are what shows that the client went away."""
        while not event.wait(0.02):
            handler.wfile.write(b": wait\n\n")

    def close(self):
        self.server.shutdown()
        self.server.server_close()


# ------------------------------------------------------------------------------------------------ the browser


class Page:
    """The page in the browser, as a user sees and handles it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get(url)
        self.until(lambda: self.js("return models.length || !document.getElementById('key').hidden"))

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def until(self, condition):
        return WebDriverWait(self.driver, SECONDS, 0.02).until(lambda _: condition())

    def find(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        return self.until(lambda: next((element for element in self.find(css) if element.is_displayed()), None))

    def write(self, text):
        self.one("#input").send_keys(text, Keys.ENTER)

    def ask(self, text):
        """Sends a message and waits for the whole answer."""
        self.write(text)
        self.idle()

    def idle(self):
        self.until(lambda: self.one("#send").get_attribute("aria-label") in ("Send", "发送"))

    def texts(self, css):
        return [element.text for element in self.find(css)]

    def users(self):
        return self.texts("article.user .text")

    def answers(self):
        return self.texts("article.assistant > .text")

    def press(self, *keys):
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def script():
    script = Script()
    yield script
    script.close()


@pytest.fixture
def page(driver, script):
    """The page of the scripted server; its port makes it an origin of its own, so nothing is kept from other tests."""
    driver.set_window_size(1180, 760)
    page = Page(driver)
    page.open(script.url)
    yield page
    faults = [entry["message"] for entry in driver.get_log("browser") if "favicon" not in entry["message"]]
    assert not [fault for fault in faults if "Failed to load resource" not in fault]  # refusals are part of some tests


# ------------------------------------------------------------------------------------------------ the file


def test_the_page_loads_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"(?:[a-z]+:)?//[\w.-]", text, re.IGNORECASE)
    sources = re.findall(r"\b(?:src|href|srcset|action|poster)\s*=\s*[\"']([^\"']*)", text)
    assert sources and all(source.startswith("#") or source == "data:," for source in sources)
    assert not re.search(r"@import|url\(", text)


def test_the_policy_allows_this_style_and_this_script_and_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'", f"the {tag} was edited: put this hash into the policy"
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'" and rules["trusted-types"] == "'none'"


# ------------------------------------------------------------------------------------------------ conversations


@needs_browser
def test_an_answer_is_shown_while_it_comes(page, script):
    more = threading.Event()
    script.answers = [[*says("Hel", "lo")[:2], more, *says(" there")]]
    page.write("Hi")
    page.until(lambda: page.answers() == ["Hello"])
    assert page.one("#send").get_attribute("aria-label") == "Stop"
    more.set()
    page.idle()
    assert page.answers() == ["Hello there"] and page.users() == ["Hi"]
    assert re.fullmatch(r"42 tokens · \d+ tokens/s", page.one("article.assistant .actions").text)
    assert page.one("#status").get_attribute("textContent") == "Hello there"  # what a screen reader says
    (request,) = script.requests
    assert request == {
        "model": "base",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@needs_browser
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_closes_the_connection_and_keeps_what_came(page, script, how):
    script.answers = [[*says("So far")[:1], threading.Event()], says("Yes.")]
    page.write("Count")
    page.until(lambda: page.answers() == ["So far"])
    page.one("#send").click() if how == "button" else page.press(Keys.ESCAPE)
    page.idle()
    assert script.left.wait(SECONDS)
    assert page.answers() == ["So far"] and "stopped" in page.one("article.assistant .actions").text
    assert not page.find(".failure")
    page.ask("Go on")
    assert [message["content"] for message in script.requests[1]["messages"]] == ["Count", "So far", "Go on"]


@needs_browser
def test_a_stopped_answer_without_a_word_leaves_the_question(page, script):
    script.answers = [[threading.Event()], says("Yes.")]
    page.write("One")
    page.until(lambda: script.requests)
    page.press(Keys.ESCAPE)
    page.idle()
    assert page.users() == ["One"] and page.answers() == []
    page.ask("Two")
    assert page.answers() == ["Yes."]


@needs_browser
def test_conversations_outlive_a_reload(page, script):
    script.answers = [says("First."), says("Second."), [*says("Half")[:1], threading.Event()]]
    page.ask("One")
    page.one("#options-open").click()
    page.one("#system").send_keys("Be brief.")
    page.press(Keys.ESCAPE)
    page.one("#new").click()
    page.ask("Two")
    assert page.texts("#list .open") == ["Two", "One"]
    assert script.requests[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.write("Three")
    page.until(lambda: page.answers() == ["Second.", "Half"])
    page.open(script.url)
    assert page.users() == ["Two", "Three"] and page.answers() == ["Second.", "Half"]
    assert "stopped" in page.texts("article.assistant .actions")[-1]
    page.find("#list .open")[1].click()
    assert page.users() == ["One"] and page.answers() == ["First."]
    assert page.js("return current.options.system") == "Be brief."


@needs_browser
def test_rename_delete_and_undo(page, script):
    script.answers = [says("Yes.")]
    page.ask("Long question")
    page.one("#list [aria-label^=Rename]").click()
    page.press("Short", Keys.ENTER)  # the old title is selected
    assert page.texts("#list .open") == ["Short"] and page.one("#title").text == "Short"
    page.one("#list [aria-label^=Delete]").click()
    assert page.texts("#list .open") == [] and page.users() == []
    page.one("#notice button").click()
    assert page.texts("#list .open") == ["Short"] and page.answers() == ["Yes."]
    page.one("#list [aria-label^=Delete]").click()
    page.open(script.url)
    assert page.texts("#list .open") == [] and page.js("return localStorage.length") == 1  # the settings


@needs_browser
def test_two_conversations_are_answered_at_once(page, script):
    more = threading.Event()
    script.answers = [[*says("slow")[:1], more, *says(" end")], says("quick")]
    page.write("One")
    page.until(lambda: page.answers() == ["slow"])
    page.one("#new").click()
    page.ask("Two")
    assert page.answers() == ["quick"] and len(page.find("#list .running")) == 1
    more.set()
    page.until(lambda: not page.find("#list .running"))
    assert page.answers() == ["quick"]
    page.find("#list .open")[0].click()
    assert page.answers() == ["slow end"]


@needs_browser
def test_edit_and_answer_again(page, script):
    script.answers = [says("a"), says("b"), says("c"), says("d")]
    page.ask("One")
    page.ask("Two")
    page.one(".regenerate").click()
    page.until(lambda: page.answers() == ["a", "c"])
    page.idle()
    assert [message["content"] for message in script.requests[2]["messages"]] == ["One", "a", "Two"]
    page.js("document.querySelector('.edit').click()")
    page.until(lambda: page.js("return document.activeElement.closest('article.user')"))
    page.press(Keys.ESCAPE)  # leaves everything as it was
    assert page.answers() == ["a", "c"]
    page.js("document.querySelector('.edit').click()")
    page.until(lambda: page.js("return document.activeElement.closest('article.user')"))
    page.press(" more", Keys.ENTER)
    page.until(lambda: page.answers() == ["d"])
    assert page.users() == ["One more"]
    assert script.requests[3]["messages"] == [{"role": "user", "content": "One more"}]


# ------------------------------------------------------------------------------------------------ what a model writes


@needs_browser
def test_no_script_of_a_model_or_a_user_runs(page, script):
    """Wherever text from outside is shown: messages, thinking, tool calls and results, titles, models, errors."""
    link = "[a](javascript:window.attacked=1) [b](data:text/html,x)"
    link += f" {ATTACK}\n\n```{ATTACK}\n{ATTACK}\n```\n\n| {ATTACK} |\n|-|-|"
    script.models = [ATTACK]
    script.answers = [
        [*says(ATTACK, field="reasoning_content")[:1], *says(link)],
        calls((ATTACK, ATTACK), ("calculator", json.dumps({"expression": ATTACK}))),
        says(f"# {ATTACK}\n\n- {ATTACK}\n\n> **{ATTACK}** [{ATTACK}](http://a/{ATTACK})"),
        (400, {"error": {"message": ATTACK}}),
    ]
    page.open(script.url)
    page.one("#tools").click()
    for text in (ATTACK, "again", "refuse"):
        page.ask(text)
    page.js("for (const details of document.querySelectorAll('details')) details.open = true")
    assert ATTACK in page.users()[0] and page.answers()[0].count(ATTACK) == 4
    assert ATTACK in page.one(".thinking .markdown").text and ATTACK in page.one(".tool pre").text
    assert page.one(".failure").text.startswith(ATTACK) and page.one("#title").text.startswith("<img")
    assert not page.find("main :is(img, script, iframe), aside :is(img, script, iframe)")
    links = [element.get_attribute("href") for element in page.find("main a")]
    assert all(href.startswith("http://") for href in links)
    page.open(script.url)  # and none that was kept
    assert ATTACK in page.users()[0]
    assert page.js("return window.attacked") is None


@needs_browser
def test_the_browser_itself_refuses_markup_and_scripts(page, driver):
    page.js("window.add = (text) => document.body.append(Object.assign(document.createElement('script'), {text}))")
    for attempt in ("document.body.innerHTML = '<b>x</b>'", "eval('1')", "add('window.attacked = 1')"):
        refused = f"try {{ {attempt}; return false }} catch (error) {{ return error instanceof TypeError }}"
        assert page.js(f"return (() => {{ {refused} }})()") or "eval" in attempt, attempt
    assert page.js("return window.attacked") is None
    driver.get_log("browser")  # it says there what it refused


MARKDOWN = [
    ("a **b** *c* __d__ _e_ ~~f~~", "<p>a <strong>b</strong> <em>c</em> <strong>d</strong> <em>e</em> <s>f</s></p>"),
    ("3 * 4 * 5, a_b_c, 2**3, \\*x\\*", "<p>3 * 4 * 5, a_b_c, 2**3, *x*</p>"),
    ("`<b>` and ``a`b``", "<p><code>&lt;b&gt;</code> and <code>a`b</code></p>"),
    ("# A\n## B\nc\nd", "<h2>A</h2><h3>B</h3><p>c\nd</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b\n\nc", '<ol start="3"><li>a</li><li>b</li></ol><p>c</p>'),
    ("> a\n> b\n\n---", "<blockquote><p>a\nb</p></blockquote><hr>"),
    ("x <b>y</b> &amp; z", "<p>x &lt;b&gt;y&lt;/b&gt; &amp;amp; z</p>"),
    ("[a](ftp://b) [c](//d) ![e](f)", "<p>[a](ftp://b) [c](//d) ![e](f)</p>"),
    ("**open and `open", "<p>**open and `open</p>"),
]


@needs_browser
@pytest.mark.parametrize("text, html", MARKDOWN)
def test_markdown(page, text, html):
    shown = "const box = document.createElement('div'); showMarkdown(box, arguments[0]); return box.innerHTML"
    assert page.js(shown, text) == html
    growing = "const box = document.createElement('div'), text = arguments[0];"
    growing += "for (let n = 0; n <= text.length; n++) showMarkdown(box, text.slice(0, n)); return box.innerHTML"
    assert page.js(growing, text) == html  # as it comes in a stream


@needs_browser
def test_links_tables_and_code(page, script):
    text = "[MiniMind](https://a.example/x_y_z) https://b.example/c.\n\n| a | b |\n|---|:-:|\n| `1` | 2 |\n\n"
    script.answers = [says(text + "```py\nx = 1  # <i>\n\ny = 2\n```")]
    page.ask("Show")
    first, second = page.find("main a")
    assert first.text == "MiniMind" and first.get_attribute("href") == "https://a.example/x_y_z"
    assert second.get_attribute("href") == "https://b.example/c" and "noopener" in second.get_attribute("rel")
    assert page.texts("th") == ["a", "b"] and page.texts("td") == ["1", "2"]
    assert page.one(".code code").get_attribute("textContent") == "x = 1  # <i>\n\ny = 2"
    page.js("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    page.one(".code .copy").click()
    page.until(lambda: page.js("return window.copied") == "x = 1  # <i>\n\ny = 2")
    page.one("article.assistant .actions .copy").click()
    page.until(lambda: page.js("return window.copied").startswith(text))
    refuses = "navigator.clipboard.writeText = () => Promise.reject(new Error('refused'));"
    page.js(refuses + "document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    page.one(".code .copy").click()
    page.until(lambda: page.js("return window.copied") == "x = 1  # <i>\n\ny = 2")


@needs_browser
@pytest.mark.parametrize("piece", ["*a ", "**", "`", "[", "> ", "- ", "# ", "|-", "_a", "~~~ ", " ", "](http://"])
def test_no_text_makes_the_page_hang(page, piece):
    begin = "const box = document.createElement('div'), begin = performance.now();"
    took = page.js(f"{begin} showMarkdown(box, arguments[0].repeat(60000)); return performance.now() - begin", piece)
    assert took < 2000


# ------------------------------------------------------------------------------------------------ thinking and tools


@needs_browser
def test_thinking_is_folded_away_and_can_be_switched(page, script):
    script.answers = [[*says("I add.", field="reasoning_content")[:1], *says("57")], says("57"), says("57")]
    Select(page.one("#thinking")).select_by_value("on")
    page.ask("12 + 45")
    assert page.answers() == ["57"] and not page.find(".thinking .markdown")[0].is_displayed()
    page.one(".thinking summary").send_keys(Keys.ENTER)
    assert page.one(".thinking .markdown").text == "I add."
    Select(page.one("#thinking")).select_by_value("off")
    page.ask("Again")
    Select(page.one("#thinking")).select_by_value("auto")
    page.ask("Again")
    switches = [request.get("chat_template_kwargs") for request in script.requests]
    assert switches == [{"enable_thinking": True}, {"enable_thinking": False}, None]
    assert script.requests[1]["messages"][1] == {"role": "assistant", "content": "57"}  # thinking is not sent back


@needs_browser
def test_tool_calls_are_run_and_shown(page, script):
    script.answers = [calls(("calculator", '{"expression": "12 + 45"}'), ("convert", '{"value": 1}')), says("57")]
    page.one("#tools").click()
    page.ask("12 + 45?")
    assert script.tools == [("calculator", '{"expression": "12 + 45"}'), ("convert", '{"value": 1}')]
    first, second = script.requests
    assert first["tools"] == SCHEMAS
    question, called, one, two = second["messages"]
    assert [call["function"]["name"] for call in called["tool_calls"]] == ["calculator", "convert"]
    assert one == {"role": "tool", "content": '{"result": 57}', "tool_call_id": called["tool_calls"][0]["id"]}
    assert two == {
        "role": "tool",
        "content": '{"error": "unit is missing"}',
        "tool_call_id": called["tool_calls"][1]["id"],
    }
    assert page.texts(".tool summary") == ['calculator("12 + 45") → 57', "convert(1) → unit is missing"]
    assert page.answers()[-1] == "57"


@needs_browser
def test_only_listed_tools_are_asked_for_and_not_for_ever(page, script):
    script.answers = [calls(("../models", "{}"))] + [calls(("calculator", '{"expression": "1"}')) for _ in range(4)]
    page.one("#tools").click()
    page.ask("Go")
    assert script.requests[1]["messages"][-1]["content"] == '{"error": "unknown tool"}'
    assert len(script.requests) == 5 and len(script.tools) == 3
    assert "no more tools are run" in page.texts("article.assistant .actions")[-1]
    script.answers = [says("Done.")]
    page.ask("And now?")
    roles = [message["role"] for message in script.requests[5]["messages"]]
    assert roles == ["user", *["assistant", "tool"] * 4, "user"]  # the calls that got no result are not sent


@needs_browser
def test_calls_that_were_stopped_are_not_sent(page, script):
    script.answers = [[*calls(("calculator", '{"expression": "1"}'))[:1], threading.Event()], says("Yes.")]
    page.one("#tools").click()
    page.write("Go")
    page.until(lambda: page.find(".tool"))
    page.press(Keys.ESCAPE)
    page.ask("Again")
    assert [message["content"] for message in script.requests[1]["messages"]] == ["Go", "Again"]


# ------------------------------------------------------------------------------------------------ errors


@needs_browser
def test_errors_take_one_line_and_can_be_tried_again(page, script):
    script.answers = [
        (400, {"error": {"message": "temperature: must not\nbe 9", "code": None}}),
        (429, {"error": {"message": "Too busy."}}, ("Retry-After", "7")),
        (502, "<html>bad gateway</html>"),
        [*says("Half")[:1], Script.BREAK],
        says("Whole."),
    ]
    seen = []
    page.ask("Hi")
    while failures := page.find(".failure"):
        seen.append(failures[0].text)
        page.one(".failure button").click()
        page.until(lambda: len(script.requests) == len(seen) + 1)
        page.idle()
    assert seen == [
        "temperature: must not be 9\nTry again",
        "Too busy. Try again in 7 s.\nTry again",
        "The server answered 502.\nTry again",
        "The connection broke off before the answer was complete.\nTry again",
    ]
    assert page.answers() == ["Whole."]
    assert len(page.users()) == 1 and not page.find(".failure")


@needs_browser
def test_an_error_in_the_stream_is_shown(page, script):
    script.answers = [[*says("Half")[:1], "out of memory"]]
    page.ask("Hi")
    assert page.answers() == ["Half"] and page.one(".failure").text.startswith("out of memory")


@needs_browser
def test_a_server_that_came_back_with_another_model(page, script):
    script.answers = [(404, {"error": {"message": "there is no model base", "code": "model_not_found"}}), says("Hi.")]
    script.models = ["newer"]
    page.ask("Hi")
    page.until(lambda: page.one("#model").get_attribute("value") == "newer")
    page.one(".failure button").click()
    page.until(lambda: page.answers() == ["Hi."])
    assert [request["model"] for request in script.requests] == ["base", "newer"]


@needs_browser
def test_a_server_that_is_gone(page, script):
    script.close()
    page.ask("Hi")
    assert page.one(".failure").text.startswith("The server does not answer.") and page.users() == ["Hi"]


@needs_browser
def test_the_key_is_asked_for_when_it_is_needed(page, script):
    script.key = "secret"
    page.open(script.url)
    script.answers = [(401, {"error": {"message": "wrong key"}}), says("Welcome.")]
    page.ask("Hi")
    page.one("#key-input").send_keys("secret", Keys.ENTER)
    page.until(lambda: page.answers() == ["Welcome."])
    assert script.keys == [None, "Bearer secret"] and not page.one("#input").get_attribute("value")
    assert page.js("return JSON.stringify(localStorage)").count("secret") == 0
    assert not page.find("#key")[0].is_displayed()


@needs_browser
def test_a_conversation_that_outgrew_the_context_goes_on_without_its_oldest_messages(page, script):
    too_long = (400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
    script.answers = [says("a"), says("b"), too_long, too_long, says("c"), too_long]
    for text in ("One", "Two", "Three"):
        page.ask(text)
    assert [message["content"] for message in script.requests[4]["messages"]] == ["Three"]
    assert page.answers() == ["a", "b", "c"]
    assert "without the 4 oldest messages" in page.texts("article.assistant .actions")[-1]
    page.one("#new").click()
    page.ask("Endless")
    assert page.one(".failure").text.startswith("too long")


@needs_browser
def test_a_full_store_is_told_and_the_conversation_goes_on(page, script):
    script.answers = [says("a")]
    page.js(
        "localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 1000)); current.options.system = 'y'.repeat(3000)"
    )
    page.ask("Hi")
    assert page.answers() == ["a"] and "no room" in page.one("#notice").text
    page.open(script.url)
    assert page.users() == []


@needs_browser
def test_room_that_becomes_free_is_used(page, script):
    script.answers = [says("x" * 3000), says("b")]
    page.ask("One")
    page.js("localStorage.setItem('filler', 'x'.repeat(5 * 1024 * 1024 - 500 - JSON.stringify(localStorage).length))")
    page.one("#new").click()
    page.ask("y" * 1000)
    assert "no room" in page.one("#notice").text
    page.find("#list [aria-label^=Delete]")[1].click()
    page.open(script.url)
    assert page.answers() == ["b"]


@needs_browser
def test_a_browser_that_keeps_nothing(page, script, driver):
    deny = "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() {"
    deny += "throw new DOMException('denied', 'SecurityError'); }})"
    made = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": deny})
    try:
        script.key = "secret"
        script.answers = [says("a"), says("b")]
        page.open(script.url)
        page.one("#key-input").send_keys("secret", Keys.ENTER)
        page.until(lambda: page.one("#model").get_attribute("value") == "base")
        page.ask("One")
        page.one("#new").click()
        page.ask("Two")
        page.find("#list .open")[1].click()
        assert page.answers() == ["a"] and script.keys == ["Bearer secret"] * 2
        page.one("#list [aria-label^=Delete]").click()
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", made)


# ------------------------------------------------------------------------------------------------ around it


@needs_browser
def test_models_and_options_belong_to_the_conversation(page, script):
    script.answers = [says("a"), says("b")]
    Select(page.one("#model")).select_by_value("medical")
    page.one("#options-open").click()
    page.one("#max-tokens").send_keys("77")
    page.one("#temperature").send_keys(Keys.HOME)
    page.press(Keys.ESCAPE)
    page.ask("One")
    page.one("#new").click()  # begins with the options of the last one
    Select(page.one("#model")).select_by_value("base")
    page.ask("Two")
    chosen = [(r["model"], r["max_tokens"], r["temperature"]) for r in script.requests]
    assert chosen == [("medical", 77, 0), ("base", 77, 0)]
    page.find("#list .open")[1].click()
    assert page.one("#model").get_attribute("value") == "medical"


@needs_browser
def test_both_languages_say_everything(page, script):
    english, chinese = (set(page.js(f"return Object.keys(TEXTS.{language})")) for language in ("en", "zh"))
    assert english == chinese
    text = PAGE.read_text(encoding="utf-8")
    used = set(re.findall(r'data-(?:text|label|placeholder)="(\w+)"', text) + re.findall(r"\bt\('(\w+)'", text))
    assert used <= english and len(used) > 40
    page.one("#language").click()
    assert page.one("#new").text == "新对话" and page.one("#input").get_attribute("placeholder") == "输入消息"
    page.open(script.url)
    assert page.one("#new").text == "新对话" and page.js("return document.documentElement.lang") == "zh-CN"


@needs_browser
def test_light_and_dark_follow_the_system_until_switched(page, script, driver):
    def dark():
        return page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(26, 26, 25)"

    def system(scheme):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    try:
        system("dark")
        page.until(dark)
        system("light")
        page.until(lambda: not dark())
        page.one("#theme").click()
        assert dark()
        page.open(script.url)
        assert dark()
        page.one("#theme").click()  # as the system has it: follows again
        system("dark")
        page.until(dark)
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_a_phone(page, script, driver):
    script.answers = [says("| " + "wide | " * 30 + "\n" + "|---" * 30 + "|\n\n" + "x" * 300 + "\n\n```\n" + "y" * 300)]
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.js("send('Hi')")
        page.idle()
        for part in ("document.scrollingElement", "document.getElementById('log')"):
            assert page.js(f"return {part}.scrollWidth") <= 360
        page.until(lambda: not page.find("#new")[0].is_displayed())
        page.one("#menu").click()
        page.until(lambda: page.find("#new")[0].is_displayed())
        assert page.js("return document.activeElement.id") == "new"
        page.js("document.getElementById('input').focus()")  # it lies behind
        assert page.js("return document.activeElement.id") == "new"
        page.press(Keys.ESCAPE)
        page.until(lambda: not page.find("#new")[0].is_displayed())
        assert page.js("return document.activeElement.id") == "menu"
        page.one("#menu").click()
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics | {"width": 900})
        page.until(lambda: not page.js("return document.querySelector('main').inert"))
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_the_keyboard_is_enough(page, script):
    """All that can be reached with Tab has a name and shows its focus; Shift+Enter is a new line, and an Enter that
    chooses a Chinese character does not send."""
    script.answers = [says("Yes.")]
    page.one("#input").send_keys("a", Keys.SHIFT + Keys.ENTER, Keys.NULL, "b")
    for sign in ("isComposing: true", "keyCode: 229"):
        enter = f"new KeyboardEvent('keydown', {{key: 'Enter', cancelable: true, {sign}}})"
        page.js(f"document.getElementById('input').dispatchEvent({enter})")
    assert page.users() == [] and page.one("#input").get_attribute("value") == "a\nb"
    page.ask("")
    assert page.users() == ["a\nb"]
    page.js("document.querySelector('.skip').focus()")
    reached = []
    while (focused := page.driver.switch_to.active_element) not in reached and focused.tag_name != "body":
        where = focused.get_attribute("id") or focused.get_attribute("class")
        assert focused.accessible_name, where
        rings = "return arguments[0].matches('.box textarea') || getComputedStyle(arguments[0]).outlineStyle !== 'none'"
        assert page.js(rings, focused), where
        reached.append(focused)
        page.press(Keys.TAB)
    places = [element.get_attribute("id") or element.get_attribute("class") for element in reached]
    wanted = ["skip", "new", "language", "theme", "model", "options-open", "log", "input", "thinking", "tools"]
    assert [place for place in places if place in wanted] == wanted and "icon edit" in places


@needs_browser
def test_the_keyboard_keeps_its_place_in_the_list(page, script):
    more = threading.Event()
    script.answers = [says("a"), [*says("b")[:1], more, *says("c")]]
    page.ask("One")
    page.one("#new").click()
    page.write("Two")
    page.until(lambda: page.answers() == ["b"])
    here = "return document.activeElement.getAttribute('aria-label')"
    page.js("document.querySelectorAll('#list [aria-label^=Rename]')[1].focus()")
    assert page.js(here) == "Rename: One"
    more.set()
    page.idle()  # the list is made anew
    assert page.js(here) == "Rename: One"
    page.press(Keys.TAB, Keys.ENTER)
    assert page.texts("#list .open") == ["Two"] and page.js("return document.activeElement.textContent") == "Undo"
    assert page.one("#list [aria-current=page]").text == "Two"


@needs_browser
def test_one_may_read_further_up_while_an_answer_comes(page, script):
    more = threading.Event()
    script.answers = [[*says("line\n\n" * 60)[:1], more, *says("line\n\n" * 60)]]
    page.write("Long")
    at = "return document.getElementById('log').scrollTop"
    page.until(lambda: page.js(at) > 0)
    page.js("document.getElementById('log').scrollTop = 10")
    page.until(lambda: page.find("#bottom")[0].is_displayed())
    more.set()
    page.idle()
    assert page.js(at) == 10
    page.one("#bottom").click()
    page.until(lambda: not page.find("#bottom")[0].is_displayed())


@needs_browser
def test_another_tab_changes_a_conversation(page, script, driver):
    script.answers = [says("a"), says("b"), [*says("c")[:1], threading.Event()]]
    page.ask("One")
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        page.open(script.url)
        page.ask("Two")
        driver.switch_to.window(first)
        page.until(lambda: page.answers() == ["a", "b"])
        driver.switch_to.window(driver.window_handles[-1])
        page.one("#language").click()
        page.one("#theme").click()
        driver.switch_to.window(first)
        page.until(lambda: page.one("#new").text == "新对话")
        page.one("#new").click()  # keeps what the other tab has set
        assert page.js("return JSON.parse(localStorage.getItem(SETTINGS)).theme") == "dark"
        page.one("#list .open").click()
        page.write("Three")
        page.until(lambda: page.answers()[-1] == "c")
        driver.switch_to.window(driver.window_handles[-1])
        page.one("#list [aria-label^=删除]").click()
        assert script.left.wait(SECONDS)  # an answer to nothing is not waited for
        driver.switch_to.window(first)
        page.until(lambda: page.users() == [] and page.texts("#list .open") == [])
        assert not page.js("return Object.keys(localStorage).some((key) => key.startsWith(CHAT))")
    finally:
        driver.switch_to.window(driver.window_handles[-1])
        driver.close()
        driver.switch_to.window(first)


# ------------------------------------------------------------------------------------------------ the real server


def serve(folder: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """serve_openai_api.py and its URL, with a model that says `<svg onload=hit(1)>` and then goes on for ever."""
    weights = folder / "full_sft_64.pth"
    checkpoint.save(weights, parrot("<svg onload=hit(1)>", ends=False), {"note": "parrot"})
    command = [
        sys.executable,
        ROOT / "serve_openai_api.py",
        "--weight",
        weights,
        "--port",
        "0",
        "--dtype",
        "fp32",
        *flags,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    for line in process.stderr:
        if ready := re.match(r"serving on (\S+)", line):
            return process, ready[1] + "/"
    raise AssertionError(f"the server ended with {process.wait()}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    limits = ("--max_seq_len", "16000", "--max_prompt_tokens", "600")
    process, url = serve(tmp_path_factory.mktemp("model"), "--api_key", "secret", *limits)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0


def health(url: str) -> dict:
    with urllib.request.urlopen(url + "health") as answer:
        return json.load(answer)


@needs_browser
@pytest.mark.slow
def test_the_real_server(driver, server):
    """Key, send, stream, stop, reload, answer again, a length, a tool, errors; and what the model says stays text."""
    page = Page(driver)
    page.open(server)
    page.one("#key-input").send_keys("secret", Keys.ENTER)
    page.until(lambda: page.one("#model").get_attribute("value") == "full_sft_64")
    page.js("window.hit = () => { window.attacked = true; }")
    page.write("Hi")
    page.until(lambda: len(page.answers()) == 1 and len(page.answers()[0]) > 40)
    assert health(server)["running"] == 1
    page.press(Keys.ESCAPE)
    page.idle()
    page.until(lambda: health(server)["running"] == 0)
    said = page.answers()[0]
    assert said.startswith("<svg onload=hit(1)>") and page.js("return window.attacked") is None
    assert "stopped" in page.one("article.assistant .actions").text
    page.open(server)
    assert page.answers() == [said] and page.users() == ["Hi"]
    page.one("#options-open").click()
    page.one("#max-tokens").send_keys("14")
    page.press(Keys.ESCAPE)
    page.one(".regenerate").click()
    page.until(lambda: page.answers() == ["<svg onload=hit(1)>"])
    page.idle()
    assert page.one("article.assistant .actions").text.startswith("14 tokens")
    assert "cut off at the maximum length" in page.one("article.assistant .actions").text
    call = "return runTool({function: {name: 'calculator', arguments: '{\"expression\": \"2 * 3\"}'}})"
    assert page.js("return toolSchemas") == SCHEMAS and page.js(call) == '{"result": 6}'
    page.one("#tools").click()
    Select(page.one("#thinking")).select_by_value("on")
    page.ask("With tools and thinking")
    assert "cut off" in page.texts("article.assistant .actions")[-1] and not page.find(".failure")
    page.one("#new").click()
    page.one("#tools").click()
    for _ in range(4):
        page.ask("word " * 150)
    assert "oldest messages" in page.texts("article.assistant .actions")[-1] and len(page.answers()) == 4
    page.js("option('temperature', 9)")
    page.ask("Too hot")
    assert re.fullmatch(r"temperature: .*\nTry again", page.one(".failure").text)

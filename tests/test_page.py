"""The page to write with, in a real browser; and what it may load and run."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import httpx
import pytest
from served_model import NAME, load, serving, wait_until, write_model
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

import gpt_2_simple as gpt2
from gpt_2_simple.serving import api
from gpt_2_simple.serving.engine import Engine
from gpt_2_simple.serving.page import page_response

PAGE = Path(gpt2.__file__).parent / "serving" / "page.html"


@pytest.fixture(scope="module")
def sess(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder)
    sess, _ = load(folder)
    yield sess
    sess.close()


@pytest.fixture(scope="module")
def engine(sess):
    engine = Engine(sess, max_batch=8, max_queue=16)
    engine.start()
    yield engine
    engine.close()


# --- without a browser ----------------------------------------------------------------------------


def test_page_is_one_small_file_without_outside_resources():
    html = PAGE.read_text("utf-8")
    assert len(html.encode()) < 60_000
    assert not re.findall(r"https?://|//cdn|@import|url\(| src=|<link", html)
    assert "innerHTML" not in html
    assert not re.findall(r"<[^>]+ (style|on\w+)=", html)  # the policy would refuse them


def test_policy_allows_the_pages_own_script_alone(engine):
    with serving(api.make_app({NAME: engine}, api.Limits(api_key="sesam"))) as (address, _):
        answer = httpx.get(address)
        assert httpx.get(f"{address}/v1/models").status_code == 401
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]+='", policy["script-src"])
    assert policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_play_in_a_notebook_shows_a_frame_and_the_same_page_again(sess, monkeypatch, capsys):
    from IPython import display

    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    monkeypatch.setattr("gpt_2_simple.serving.play.in_notebook", lambda: True)
    page = gpt2.play(sess, height=300)
    try:
        assert gpt2.play(sess) is page
        assert [frame.src for frame in shown] == [f"{page.address}/"] * 2
        assert shown[0].height == 300
        assert f"The page is at {page.address}/" in capsys.readouterr().out
        assert (
            httpx.get(page.address).headers["content-security-policy"].endswith("frame-ancestors *")
        )
        assert [m["id"] for m in httpx.get(f"{page.address}/v1/models").json()["data"]] == [NAME]
        assert httpx.get(page.address, headers={"Host": "evil.example"}).status_code == 403
    finally:
        page.close()
    assert not page.is_open
    with pytest.raises(httpx.ConnectError):
        httpx.get(page.address)
    again = gpt2.play(sess)
    assert again is not page
    again.close()


def test_play_in_colab_goes_through_its_proxy(sess, monkeypatch):
    shown = []
    output = types.SimpleNamespace(
        serve_kernel_port_as_iframe=lambda port, height: shown.append((port, height))
    )
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    page = gpt2.play(sess, height=500)
    try:
        assert shown == [(int(page.address.rpartition(":")[2]), "500")]
        headers = {"Origin": "https://x-colab.googleusercontent.com", "Host": "proxy.example"}
        assert httpx.get(f"{page.address}/v1/models", headers=headers).status_code == 200
    finally:
        page.close()


def test_play_needs_a_model_and_a_height(sess):
    with pytest.raises(ValueError, match="height=0 must be a whole number, 1 or above"):
        gpt2.play(sess, height=0)
    with gpt2.start_tf_sess() as empty, pytest.raises(RuntimeError, match="no model"):
        gpt2.play(empty)


def test_a_script_that_plays_ends_without_an_error(tmp_path):
    code = """
import json, urllib.request
import gpt_2_simple as gpt2

gpt2.create_gpt2(model_name="tiny", n_layer=1, n_embd=8, n_ctx=16)
sess = gpt2.start_tf_sess()
gpt2.load_gpt2(sess, model_name="tiny")
page = gpt2.play(sess)
body = json.dumps({"model": "tiny", "max_tokens": 3}).encode()
urllib.request.urlopen(page.address + "/v1/completions", body).read()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "The page is at http://127.0.0.1:" in done.stdout
    assert "Traceback" not in done.stderr


# --- in a browser ---------------------------------------------------------------------------------

browser_test = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver",
    ),
]


@pytest.fixture(scope="module")
def chromium():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


class Page:
    """The page as its user sees it."""

    def __init__(self, chromium, address):
        self.chromium, self.address = chromium, address
        chromium.get(address)
        chromium.execute_script("sessionStorage.clear()")
        chromium.get(address)
        chromium.get_log("browser")

    def __getitem__(self, name):
        return self.chromium.find_element("id", name)

    def script(self, code):
        return self.chromium.execute_script(f"return {code}")

    @property
    def text(self):
        return self["text"].get_property("value")

    def wait(self, condition):
        wait_until(condition, seconds=120)

    def wait_until_written(self):
        self.wait(lambda: self.script("writing === null"))

    def ready(self):
        self.wait(lambda: self["write"].is_enabled())
        return self

    def set(self, name, value):
        self[name].clear()
        self[name].send_keys(value)

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.chromium)
        for key in keys[:-1]:
            chain.key_down(key)
        chain.send_keys(keys[-1])
        for key in keys[:-1]:
            chain.key_up(key)
        chain.perform()

    def point_at(self, found):
        from selenium.webdriver import ActionChains

        ActionChains(self.chromium).move_to_element(found).perform()

    def spans(self):
        return self.chromium.find_elements("css selector", "#colours span")

    def check_marks(self):
        """The colours lie under the text, and the marks are the model's tokens."""
        assert self.script("colours.textContent === text.value + ' '")
        assert self.script(
            "marks.every((m, i) => m.start < m.end && (!i || marks[i-1].end <= m.start))"
        )
        assert self.script("text.clientHeight === colours.clientHeight")

    def errors(self):
        """What the browser complains about, but for the icon that it looks for."""
        return [e for e in self.chromium.get_log("browser") if "favicon" not in e["message"]]


@pytest.fixture
def page(chromium, engine):
    with serving(api.make_app({NAME: engine}, api.Limits(hosts=("127.0.0.1",)))) as (address, _):
        yield Page(chromium, address).ready()


CONTROL, ESCAPE, ENTER = "\ue009", "\ue00c", "\ue007"


class TestRealModel:
    pytestmark = browser_test

    def test_text_is_continued_in_place(self, page, sess):
        page["text"].send_keys("One morning")
        page.set("length", "12")
        page.set("temperature", "0")
        page.press(CONTROL, ENTER)
        page.wait(lambda: page.text != "One morning")
        page.wait_until_written()
        (wanted,) = gpt2.generate(
            sess, prefix="One morning", length=12, temperature=0, return_as_list=True
        )
        assert page.text == wanted.replace("\r", "\n")
        assert page["status"].text == "12 tokens written."
        page.check_marks()
        assert page.errors() == []
        # It goes on from its own text, and from the user's.
        page["text"].send_keys(" and")
        page.press(CONTROL, ENTER)
        page.wait(lambda: len(page.text) > len(wanted) + 4)
        page.wait_until_written()
        assert page.text.startswith(wanted.replace("\r", "\n") + " and")
        page.check_marks()

    def test_undo_redo_and_run_again(self, page):
        page["text"].send_keys("A")
        page.set("length", "8")
        page.set("seed", "1")
        page["write"].click()
        page.wait_until_written()
        first = page.text
        page.set("seed", "2")
        page["again"].click()
        page.wait_until_written()
        second = page.text
        assert second.startswith("A")
        assert second != first
        page["undo"].click()
        assert page.text == first
        page["undo"].click()
        assert page.text == "A"
        assert not page["undo"].is_enabled()
        page["redo"].click()
        page["redo"].click()
        assert page.text == second
        page.check_marks()
        page["undo"].click()
        page["undo"].click()
        page["write"].click()
        page.wait_until_written()
        assert page.text == second

    def test_alternatives_to_pick_from(self, page):
        page["text"].send_keys("B")
        page.set("length", "6")
        page.set("n", "3")
        page.set("seed", "1")
        page["write"].click()
        page.wait_until_written()
        assert page.text == "B"
        picks = page.chromium.find_elements("css selector", ".choice button")
        texts = [
            p.get_property("textContent")
            for p in page.chromium.find_elements("css selector", ".choice p")
        ]
        assert len(picks) == len(texts) == len(set(texts)) == 3
        picks[1].click()
        assert page.text == "B" + texts[1][:-1]
        assert not page["alternatives"].is_displayed()
        page.check_marks()
        page["undo"].click()
        assert page.text == "B"

    def test_probability_and_rivals_at_the_pointer_and_the_cursor(self, page, engine):
        page["text"].send_keys("C")
        page.set("length", "5")
        page.set("temperature", "0")
        page["write"].click()
        page.wait_until_written()
        page.point_at(page.spans()[2])
        rows = page["details"].find_elements("css selector", "dd")
        assert len(rows) == 6
        percents = [float(row.text.rstrip("%")) for row in rows]
        assert percents == sorted(percents, reverse=True)  # a greedy token is the likeliest
        assert page.script("shownSpan.mark === marks[2]")
        page["text"].send_keys(
            "\ue011"
        )  # Home: the cursor goes to the start, then into the first token
        page["text"].send_keys("\ue014" * 2)
        page.wait(lambda: page.script("shownSpan.mark === marks[0]"))

    def test_editing_keeps_the_marks_of_what_stays(self, page):
        page["text"].send_keys("D")
        page.set("length", "8")
        page.set("seed", "1")
        page["write"].click()
        page.wait_until_written()
        count = page.script("marks.length")
        page["text"].send_keys("\ue009\ue011")  # Ctrl-Home
        page["text"].send_keys("\ue000" + "Now ")
        assert page.text.startswith("Now D")
        assert page.script("marks.length") == count
        page.check_marks()
        page.script("text.setSelectionRange(marks[1].start, marks[1].end)")
        page["text"].send_keys("x")
        assert page.script("marks.length") == count - 1
        page.check_marks()

    def test_text_survives_a_reload(self, page):
        page["text"].send_keys("Keep me")
        page.chromium.refresh()
        assert page.text == "Keep me"

    def test_wrong_setting_is_told_in_a_sentence(self, page):
        page.set("temperature", "9")
        page["write"].click()
        assert re.fullmatch(r"Temperature: .*2.*\.", page["error"].text)
        page.set("temperature", "1")
        page.set("stop-texts", "a\nb\nc\nd\ne")
        page["write"].click()
        page.wait(lambda: "stop" in page["error"].text.lower())
        assert page["error"].text.endswith(".")

    def test_server_that_is_gone(self, chromium, engine):
        with serving(api.make_app({NAME: engine}, api.Limits())) as (address, _):
            page = Page(chromium, address).ready()
        page["write"].click()
        page.wait(lambda: page["error"].text)
        assert page["error"].text == "The server cannot be reached. Is it still running?"
        assert page["write"].is_enabled()

    def test_key_is_asked_for(self, chromium, engine):
        with serving(api.make_app({NAME: engine}, api.Limits(api_key="sésam漢"))) as (address, _):
            page = Page(chromium, address)
            page.wait(lambda: page["key"].is_displayed())
            assert page["error"].text == "This server asks for a key."
            page["api-key"].send_keys("wrong" + ENTER)
            page.wait(lambda: page["error"].text == "The key is wrong.")
            page.set("api-key", "sésam漢" + ENTER)
            page.ready()
            assert not page["key"].is_displayed()
            page["write"].click()
            page.wait(lambda: "tokens written" in page["status"].text)

    def test_play_works_in_a_frame_and_serve_refuses_to_be_in_one(self, chromium, sess, engine):
        played = gpt2.play(sess)
        try:
            with (
                serving(api.make_app({NAME: engine}, api.Limits())) as (served, _),
                serving(notebook_with(played.address, served)) as (notebook, _),
            ):
                chromium.get(notebook)
                chromium.switch_to.frame("ours")
                wait_until(lambda: chromium.find_element("id", "write").is_enabled())
                chromium.switch_to.default_content()
                chromium.switch_to.frame("refused")
                assert not chromium.find_elements("id", "write")
                chromium.switch_to.default_content()
        finally:
            played.close()


def notebook_with(ours, refused):
    """A page of another origin that shows two addresses in frames."""
    html = f"<iframe id=ours src='{ours}'></iframe><iframe id=refused src='{refused}'></iframe>"
    return Starlette(routes=[Route("/", lambda _: HTMLResponse(html))])


def pieces(*choices):
    """A stream of the completions API."""
    for choice in choices:
        yield f"data: {json.dumps({'choices': [choice]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 4}})}\n\n"
    yield "data: [DONE]\n\n"


def choice(text, tokens, offsets, finish_reason=None):
    return {
        "index": 0,
        "text": text,
        "finish_reason": finish_reason,
        "logprobs": {
            "tokens": tokens,
            "token_logprobs": [-1.0] * len(tokens),
            "top_logprobs": [{"7": -3.0, "</script>": -0.5, token: -1.0} for token in tokens],
            "text_offset": offsets,
        },
    }


@contextlib.contextmanager
def scripted(stream):
    """The address of a server with the page, whose model writes what `stream()` yields."""
    app = Starlette(
        routes=[
            Route("/", lambda _: page_response(False)),
            Route(
                "/v1/models", lambda _: JSONResponse({"data": [{"id": "m", "max_model_len": 9}]})
            ),
            Route(
                "/v1/completions",
                lambda _: StreamingResponse(stream(), media_type="text/event-stream"),
                methods=["POST"],
            ),
        ]
    )
    with serving(app) as (address, _):
        yield address


class TestScriptedModel:
    pytestmark = browser_test

    def written(self, chromium, stream):
        with scripted(stream) as address:
            page = Page(chromium, address).ready()
            page["write"].click()
            page.wait_until_written()
        return page

    def test_markup_stays_text(self, chromium):
        hostile = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">"
        page = self.written(chromium, lambda: pieces(choice(hostile, [hostile], [0], "length")))
        assert page.text == hostile
        page.point_at(page.spans()[0])
        assert "</script>" in page["details"].text
        assert chromium.title == "gpt_2_simple"
        assert not chromium.find_elements("css selector", "img")
        assert page.errors() == []

    def test_places_of_tokens_count_characters_and_not_utf16(self, chromium):
        page = self.written(
            chromium,
            lambda: pieces(
                choice("a\U0001f600", ["a", "\U0001f600"], [0, 1]),
                choice("\r\nb", ["\r\n", "b"], [2, 4], "length"),
            ),
        )
        assert page.text == "a\U0001f600 \nb"
        assert page.script("marks.map((m) => text.value.slice(m.start, m.end))") == [
            "a", "\U0001f600", " \n", "b",
        ]  # fmt: skip
        page.check_marks()

    def test_token_whose_text_comes_later_is_marked_then(self, chromium):
        page = self.written(
            chromium,
            lambda: pieces(
                choice("x", ["x", "bytes:\\xf0"], [0, 1]),
                choice("\U0001f600y", ["bytes:\\x9f", "y"], [1, 2], "length"),
            ),
        )
        assert page.script("marks.map((m) => text.value.slice(m.start, m.end))") == [
            "x", "\U0001f600", "y",
        ]  # fmt: skip

    def test_escape_stops_and_keeps_what_came(self, chromium):
        gate = threading.Event()

        def slow():
            yield from list(pieces(choice("so far", ["so far"], [0])))[:1]
            gate.wait(60)

        with scripted(slow) as address:
            page = Page(chromium, address).ready()
            page["write"].click()
            page.wait(lambda: page.text == "so far")
            assert page["stop"].is_enabled()
            page.press(ESCAPE)
            page.wait_until_written()
            gate.set()
        assert page["status"].text == "Stopped."
        assert page.text == "so far"
        page.check_marks()
        assert page.script("marks.length") == 1
        page["undo"].click()
        assert page.text == ""

    def test_error_in_the_middle_is_told_and_keeps_what_came(self, chromium):
        def broken():
            yield from list(pieces(choice("half", ["half"], [0])))[:1]
            yield 'data: {"error": {"message": "the weights are broken"}}\n\n'

        page = self.written(chromium, broken)
        assert page["error"].text == "The weights are broken."
        assert page.text == "half"
        assert page["write"].is_enabled()

    def test_stream_that_breaks_off_is_told(self, chromium):
        page = self.written(chromium, lambda: iter(list(pieces(choice("ha", ["ha"], [0])))[:1]))
        assert page["error"].text == "The server ended in the middle of the text."
        assert page.text == "ha"

"""The pages for people, in a real browser against the real server: what is shown, for whom, and what is never fetched.

Skipped where there is no Chromium (`apt-get install chromium`, or `CHROMIUM=path`); `.ci/run` installs one.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from benchmarks.server import ServerProcess
from tests.browser import find_chromium, open_browser
from tests.waiting import wait_until

WEBP = {"Content-Type": "image/webp"}
BROKEN = b"\x89PNG\r\n\x1a\n and then no picture"
TIMEOUT_MS = 30_000
PAGES = ("/", "/card", "/docs")
HOSTILE_NAME = "<img src=x onerror=alert(1)>.png"

MAKE_TRANSFER = """files => {
    const transfer = new DataTransfer();
    for (const { name, type, data } of files) {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type }));
    }
    return transfer;
}"""
PASTE = "transfer => document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer, cancelable: true }))"
DROP_TEXT = """id => {
    const dataTransfer = new DataTransfer();
    dataTransfer.setData('text/plain', 'open-sesame');
    const event = new DragEvent('dragover', { dataTransfer, bubbles: true, cancelable: true });
    document.getElementById(id).dispatchEvent(event);
    return event.defaultPrevented;
}"""
COLOURS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add(data.slice(i, i + 3).join());
    return seen.size;
}"""


NOTE_PAUSES = """() => {
    const wait = window.setTimeout;
    window.pauses = [];
    window.setTimeout = (then, ms, ...more) => { window.pauses.push(ms); return wait(then, ms, ...more); };
}"""


@pytest.fixture(scope="module")
def browser():
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or set CHROMIUM to its path")
    expect.set_options(timeout=TIMEOUT_MS)
    with open_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser, base_url):
    """Opens a page in a browser profile of its own; at the end there must be no complaint and no stranger's address."""
    contexts, complaints, addresses = [], [], []

    def open_one(path="/", url=base_url, **settings):
        contexts.append(browser.new_context(viewport=settings.pop("viewport", {"width": 1280, "height": 900}), **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: complaints.append(message.text) if message.type in {"error", "warning"} else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: addresses.append((request.url, url)))
        page.goto(url + path)
        return page

    yield open_one
    for context in contexts:
        context.close()
    # the browser itself reports each request that failed; a violation of the policy sounds otherwise
    assert [text for text in complaints if not text.startswith("Failed to load resource: ")] == []
    strangers = [address for address, home in addresses if not address.startswith((home, f"blob:{home}", "data:"))]
    assert strangers == []


@dataclass(frozen=True)
class OtherServer:
    """With a key, and a model that has no card."""

    url: str
    card: Path


@pytest.fixture(scope="module")
def other_server(artifact_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for path in (artifact_path, artifact_path.with_name("fast.onnx.sha256")):
        shutil.copy(path, folder)
    with ServerProcess(api_keys="open-sesame", model=folder / "fast.onnx") as server:
        yield OtherServer(server.wait_until_ready(), folder / "fast.card.html")


def transfer(page, *files):
    """A DataTransfer in the page, as dropping or pasting these (name, bytes) makes one."""
    encoded = [{"name": name, "type": "", "data": base64.b64encode(data).decode()} for name, data in files]
    return page.evaluate_handle(MAKE_TRANSFER, encoded)


def drop(page, *files):
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer(page, *files)})


def results(page, count, *states):
    """The cards, once so many are in one of these states."""
    cards = page.locator(", ".join(f".result[data-state={state}]" for state in states))
    cards.nth(count - 1).wait_for()
    assert cards.count() == count
    return cards


def of_label(samples, label):
    return next(sample for sample in samples if sample.label == label)


def test_dropped_pictures_get_what_the_api_says_and_a_broken_one_its_own_reason(open_page, client, samples):
    ship, frog = samples[-30], of_label(samples, "frog")
    page = open_page()
    drop(page, ("ship.webp", ship.data), (HOSTILE_NAME, BROKEN), ("frog.webp", frog.data))

    answered = results(page, 2, "done", "unknown")
    for card, sample in zip(answered.all(), (ship, frog), strict=True):
        # without Origin: the way around the framework; the browser's request goes the other one
        said = client.post("/classify", content=sample.data, headers=WEBP).json()["predictions"][0]
        assert card.locator("h3").inner_text() in (said["label"], "None of my classes")
        assert card.locator(".classes .label").all_inner_texts() == [top["label"] for top in said["top_k"]]
        shares = [float(re.sub("[<>%]", "", text)) for text in card.locator(".classes .share").all_inner_texts()]
        assert shares == pytest.approx([100 * top["probability"] for top in said["top_k"]], abs=0.1)
        assert re.fullmatch(r"decode [\d.]+ · queue [\d.]+ · infer [\d.]+", card.locator(".stages").inner_text())
        assert re.fullmatch(r"[\d.]+ ms in total", card.locator(".total").inner_text())

    refused = client.post("/classify", content=BROKEN, headers=WEBP)
    failed = results(page, 1, "failed")
    assert failed.locator(".notice").inner_text() == refused.json()["detail"]
    assert failed.locator(".filename").inner_text() == HOSTILE_NAME
    assert failed.locator(".total").inner_text() == f"HTTP {refused.status_code}"
    spoken = page.locator("#status").inner_text()
    assert "frog.webp: " in spoken
    assert refused.json()["detail"] in spoken

    canvas = answered.first.locator("canvas")
    assert canvas.evaluate(COLOURS) > 100
    expect(page.locator(".has-heat canvas").first).to_have_css("opacity", "0.7")
    page.get_by_role("switch", name="Heat map").click()
    expect(page.locator(".has-heat canvas").first).to_have_css("opacity", "0")


def test_a_picture_of_none_of_the_classes_is_called_so(open_page, client, samples):
    files = [("images", sample.data) for sample in samples[:100]]
    predictions = client.post("/classify", files=files, headers={"X-Deadline-Ms": "60000"}).json()["predictions"]
    strangest = min(predictions, key=lambda prediction: prediction["in_distribution_score"])
    assert strangest["in_distribution"] is False
    page = open_page()
    drop(page, ("strange.webp", samples[strangest["index"]].data))
    assert results(page, 1, "unknown").locator("h3").inner_text() == "None of my classes"


def test_without_a_mouse(open_page, samples):
    page = open_page()
    page.on("filechooser", lambda _: None)  # from now on: Playwright needs a moment to take the chooser from the browser

    def press_until_focused(key, selector):
        for _ in range(40):
            page.keyboard.press(key)
            if page.locator(selector).first.evaluate("element => element === document.activeElement"):
                break
        else:
            pytest.fail(f"{key} never leads to {selector}")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"

    press_until_focused("Tab", "#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([of_label(samples, "horse").path, of_label(samples, "truck").path])
    results(page, 2, "done", "unknown")
    press_until_focused("Tab", "#heat")
    page.keyboard.press("Space")
    assert not page.locator("#heat").is_checked()
    page.keyboard.press("Space")
    press_until_focused("Tab", "#strength")
    page.keyboard.press("End")
    expect(page.locator(".has-heat canvas").first).to_have_css("opacity", "1")
    press_until_focused("Tab", ".remove")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the focus went to the other one
    assert page.locator(".result").count() == 0
    page.keyboard.press("Shift+Tab")
    press_until_focused("Tab", "#choose")


def test_a_dropped_folder_is_the_pictures_in_it(open_page, samples, tmp_path):
    (tmp_path / "pets" / "more").mkdir(parents=True)
    for name, sample in zip(("a.webp", "more/b.webp", "notes.txt", "._a.webp"), samples[:4], strict=True):
        (tmp_path / "pets" / name).write_bytes(sample.data)
    page = open_page()
    devtools = page.context.new_cdp_session(page)
    dragged = {"x": 600, "y": 300, "data": {"items": [], "files": [str(tmp_path / "pets")], "dragOperationsMask": 1}}
    for step in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": step, **dragged})
    results(page, 2, "done", "unknown")
    assert page.locator(".result").count() == 2


def test_a_file_that_is_gone_is_not_the_services_fault(open_page, samples, tmp_path):
    path = tmp_path / "gone.webp"
    path.write_bytes(samples[0].data)
    page = open_page()

    def lose(route) -> None:
        path.unlink()
        route.abort()

    page.route("**/classify*", lose)
    page.set_input_files("#files", path)
    expect(results(page, 1, "failed")).to_contain_text("The file can no longer be read")


def test_a_model_that_says_nothing_holds_up_no_picture(open_page, samples):
    page = open_page()
    page.route("**/model", lambda route: None)
    page.reload()
    drop(page, ("a.webp", samples[0].data))
    results(page, 1, "done", "unknown")


@pytest.mark.parametrize("body", ['{"message": "x"}', '"text"', '{"detail": [{"msg": "x"}]}', "no JSON"])
def test_what_a_proxy_answers_is_told_by_its_status(open_page, samples, body):
    page = open_page()
    page.route("**/classify*", lambda route: route.fulfill(status=502, body=body))
    drop(page, ("a.webp", samples[0].data))
    expect(results(page, 1, "failed")).to_contain_text("The service answered 502")


def test_a_login_of_a_proxy_is_no_answer_and_no_question_for_a_key(open_page, samples):
    page = open_page()
    page.route("**/classify*", lambda route: route.fulfill(status=200, content_type="text/html", body="<h1>Log in</h1>"))
    drop(page, ("a.webp", samples[0].data))
    expect(results(page, 1, "failed")).to_contain_text("not from this service")
    page.route("**/classify*", lambda route: route.fulfill(status=401))
    drop(page, ("b.webp", samples[0].data))
    expect(results(page, 2, "failed").first).to_contain_text("The service answered 401")
    assert page.locator("#key-form").is_hidden()


def test_a_network_that_was_lost_for_a_moment_costs_no_picture(open_page, samples):
    page = open_page()
    tried: list[str] = []

    def lose_two(route):
        tried.append(route.request.headers["x-deadline-ms"])
        if len(tried) <= 2:
            route.abort()
        else:
            route.fallback()

    page.route("**/classify*", lose_two)
    page.route("**/livez", lambda route: route.abort() if len(tried) <= 2 else route.fallback())
    drop(page, ("a.webp", of_label(samples, "frog").data))
    assert results(page, 1, "done").locator("h3").inner_text() == "frog"
    assert tried == ["30000"] * 3


def test_a_key_pasted_from_a_table_is_no_picture(open_page, samples):
    page = open_page()
    page.evaluate(
        """async (transferred) => {
          transferred.setData("text/plain", "open-sesame");
          const event = new ClipboardEvent("paste", {clipboardData: transferred, bubbles: true, cancelable: true});
          window.prevented = !document.getElementById("key").dispatchEvent(event);
        }""",
        transfer(page, ("clip.webp", samples[0].data)),
    )
    assert page.evaluate("window.prevented") is False
    assert page.locator(".result").count() == 0


def test_a_pasted_picture(open_page, samples):
    page = open_page()
    page.evaluate(PASTE, transfer(page, ("clip.webp", of_label(samples, "frog").data)))
    assert results(page, 1, "done").locator("h3").inner_text() == "frog"


def test_the_command_it_copies_works(open_page, samples, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    path = tmp_path / "it's a frog.webp"
    path.write_bytes(of_label(samples, "frog").data)
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.set_input_files("#files", path)
    results(page, 1, "done").locator(".curl").click()
    page.locator(".curl", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["sh", "-c", f"{command} -s"], cwd=tmp_path, capture_output=True, check=True)
    prediction = json.loads(answer.stdout)["predictions"][0]
    assert prediction["label"] == "frog"
    assert prediction["heat_map"]


def test_every_sample_is_a_click_away_and_recognised(open_page):
    page = open_page()
    names = page.locator("[data-sample]").evaluate_all("buttons => buttons.map((b) => { b.click(); return b.dataset.sample; })")
    cards = results(page, len(names), "done", "unknown")
    found = dict(zip(cards.locator(".filename").all_inner_texts(), cards.locator("h3").all_inner_texts(), strict=True))
    right = [name for name in names if found[f"{name}.webp"] == name.removesuffix("-photo")]
    assert len(right) >= 10
    page.click("#clear")
    assert page.locator(".result").count() == 0
    assert page.locator("#choose").evaluate("button => button === document.activeElement")


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page, other_server, samples):
    page = open_page(url=other_server.url)
    drop(page, ("a.webp", of_label(samples, "frog").data), ("b.webp", of_label(samples, "ship").data))
    assert not page.evaluate(DROP_TEXT, "key"), "the browser puts it into the field"
    assert page.evaluate(DROP_TEXT, "drop")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("did not take this key").wait_for()
    page.get_by_label("API key").fill("open-sesame\u200b")  # as copied from a chat; a header cannot carry it
    page.keyboard.press("Enter")
    page.get_by_text("that no key has").wait_for()
    page.get_by_label("API key").fill("open-sesame")
    page.get_by_role("button", name="Use key").click()
    results(page, 2, "done", "unknown")
    assert page.locator("#key-form").is_hidden()
    assert page.locator("#choose").evaluate("button => button === document.activeElement")
    assert page.evaluate("Object.values(sessionStorage)") == ["open-sesame"]
    assert page.evaluate("Object.values(localStorage)") == []


def test_it_asks_about_four_pictures_at_a_time(open_page, samples):
    page = open_page()
    held = []
    page.route("**/classify*", lambda route: held.append(route))  # noqa: PLW0108 (Playwright looks at a function's arguments)
    drop(page, *((f"{number}.webp", sample.data) for number, sample in enumerate(samples[:6])))

    def settled() -> int:
        page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")  # whatever it would send now, it has sent
        return len(held)

    wait_until(lambda: settled() >= 4)
    assert settled() == 4
    for count in (5, 6):
        held[count - 5].continue_()
        wait_until(lambda count=count: settled() >= count)
        assert settled() == count
    for route in held[2:]:
        route.continue_()
    results(page, 6, "done", "unknown")


def test_a_model_without_a_card(other_server):
    assert httpx.get(f"{other_server.url}/card").status_code == 404
    other_server.card.write_text("<h1>Mine</h1>")
    try:
        response = httpx.get(f"{other_server.url}/card")
    finally:
        other_server.card.unlink()  # the server is other tests' as well
    assert response.status_code == 200
    assert "<h1>Mine</h1>" in response.text


def test_when_overloaded_it_tries_once_more_and_when_gone_it_says_so(open_page, start, samples):
    server = start(max_held_bytes=100)  # less than any picture: always 503, Retry-After: 1
    page = open_page(url=server.wait_until_ready())
    page.evaluate(NOTE_PAUSES)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/classify" in request.url else None)
    drop(page, ("a.webp", of_label(samples, "frog").data))
    assert "CONVMIXER_MAX_HELD_BYTES" in results(page, 1, "failed").locator(".notice").inner_text()
    assert len(asked) == 2
    assert 1000 in page.evaluate("pauses")
    server.stop()
    drop(page, ("b.webp", of_label(samples, "frog").data))
    assert "No connection" in results(page, 2, "failed").first.locator(".notice").inner_text()


def test_a_sample_that_cannot_be_had_is_no_picture_on_the_page(open_page, start):
    server = start()
    page = open_page(url=server.wait_until_ready())
    page.route("**/samples/dog.webp", lambda route: route.fulfill(status=503, json={"detail": "busy", "code": "overloaded"}))
    page.get_by_role("button", name="Dog").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text("busy")
    server.stop()
    page.get_by_role("button", name="Frog").click()
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text("The service could not be reached.")
    assert page.locator(".result").count() == 0
    drop(page)
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text("No picture was found there")


def test_of_many_pictures_only_those_in_sight_are_opened(open_page, samples):
    """Hundreds of photos would fill the tab's memory."""
    page = open_page(viewport={"width": 800, "height": 600})
    drop(page, *((f"{n}.webp", samples[n % len(samples)].data) for n in range(60)))
    results(page, 60, "done", "unknown")
    assert page.locator(".result img").first.evaluate("image => image.complete && image.naturalWidth > 0")
    loaded = page.locator(".result img").evaluate_all("images => images.filter((image) => image.naturalWidth).length")
    assert loaded < 60


def test_the_description_leads_nowhere_but_to_what_it_describes(open_page):
    page = open_page("/docs")
    page.locator("#schema-ClassifyJson").wait_for()
    links = page.locator("a[href^='#schema-']").evaluate_all("links => [...new Set(links.map((link) => link.hash.slice(1)))]")
    assert {"schema-ClassifyForm", "schema-InferenceRequest"} <= set(links)
    assert [link for link in links if page.locator(f"[id='{link}']").count() != 1] == []


def luminance(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(value) for value in re.findall(r"\d+", colour)[:3]) / 3 / 255


def test_dark_where_the_machine_is_dark_unless_chosen(open_page):
    page = open_page(color_scheme="dark")
    assert luminance(page) < 0.2
    page.get_by_role("button", name="Theme: automatic").click()
    page.get_by_role("button", name="Theme: light").wait_for()
    page.reload()
    assert luminance(page) > 0.9


@pytest.mark.parametrize("path", PAGES)
def test_everybody_can_use_it_on_a_phone_too(open_page, path):
    page = open_page(path, viewport={"width": 320, "height": 740}, has_touch=True, is_mobile=True)
    if path == "/":
        assert page.get_by_role("button", name="Take a photo").is_visible()
        drop(page, (HOSTILE_NAME * 3, BROKEN))
        page.click("[data-sample=coffee-photo]")
        page.click("[data-sample=frog]")
        results(page, 3, "done", "unknown", "failed")
    if path == "/docs":
        page.get_by_role("heading", name="Schemas").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    for color_scheme in ("light", "dark"):
        page.emulate_media(color_scheme=color_scheme)
        violations = Axe().run(page).response["violations"]
        assert [v["id"] for v in violations if v["impact"] in {"serious", "critical"}] == []


def test_the_card_is_shown_with_its_pictures(open_page, repository):
    page = open_page("/card")
    card = (repository / "docs" / "models" / "fast.md").read_text()
    assert page.locator("h1").inner_text() == card.splitlines()[0].removeprefix("# ")
    assert re.search(r"\*\*([\d.]+%)\*\*", card)[1] in page.locator("table").first.inner_text()
    loaded = page.locator("img").evaluate_all("images => images.map((image) => [image.alt, image.naturalWidth > 100])")
    assert loaded == [[alt, True] for alt in re.findall(r"!\[(.+?)\]", card)]


@pytest.mark.parametrize("path", [*PAGES, "/web/app.js", "/web/style.css", "/web/samples/cat.webp"])
def test_what_goes_with_every_file(client, path):
    response = client.get(path)
    assert response.status_code == 200
    policy = dict(directive.split(" ", 1) for directive in response.headers["Content-Security-Policy"].split("; "))
    assert {name for name, sources in policy.items() if sources == "'none'"} == {
        "base-uri",
        "default-src",
        "form-action",
        "frame-ancestors",
    }
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert (response.headers["Cache-Control"], response.headers["Vary"]) == ("no-cache", "Accept-Encoding")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in response.headers
    assert client.head(path).headers["ETag"] == response.headers["ETag"]
    again = client.get(path, headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    for known in ([("If-None-Match", response.headers["ETag"].removeprefix("W/"))], [("If-None-Match", "*")]):
        assert client.get(path, headers=known).status_code == 304
    two_lines = [("If-None-Match", '"other"'), ("If-None-Match", response.headers["ETag"])]
    assert client.get(path, headers=two_lines).status_code == 304
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    assert plain.content == response.content
    assert "Content-Encoding" not in plain.headers
    assert (response.headers.get("Content-Encoding") == "gzip") == (not path.endswith(".webp"))


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "../settings.py", "%2e%2e/settings.py", "samples/../app.js", ""])
def test_nothing_else_is_served(base_url, name):
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc)  # sends the path as it is; httpx would tidy it
    connection.request("GET", f"/web/{name}")
    response = connection.getresponse()
    assert response.status == 404
    assert json.load(response)["code"] == "not_found"
    connection.close()


def test_samples_are_images_of_the_test_set(repository, samples):
    known = {sample.data: sample.label for sample in samples}
    shipped = {path.stem: path.read_bytes() for path in (repository / "app" / "web" / "samples").glob("*.webp")}
    for name, data in shipped.items():
        assert name.endswith("-photo") or known[data] == name
    assert sum(map(len, shipped.values())) < 64 * 1024


def test_an_installed_package_has_all_that_is_served(repository):
    patterns = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["app"]
    packaged = {path for pattern in patterns for path in (repository / "app").glob(pattern) if path.is_file()}
    served = [path for folder in ("web", "artifacts") for path in (repository / "app" / folder).rglob("*") if path.is_file()]
    assert set(served) <= packaged

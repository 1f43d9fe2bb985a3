"""The `convmixer` command as a process. Its ways to classify are tested with docs/client.md (tests/system/test_client.py)."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app import __version__
from app.cli import main
from app.cli_images import expand, find_images
from tests.server import ScriptedServer
from tests.waiting import wait_until


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "app.cli", *map(str, arguments)]


def run(*arguments: object, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments), capture_output=True, input=stdin, env=os.environ | variables, timeout=120, check=False
    )
    text = [stream.decode(errors="surrogateescape") for stream in (result.stdout, result.stderr)]
    return subprocess.CompletedProcess(result.args, result.returncode, *text)


def test_help_lists_the_commands():
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("serve", "classify", "bench", "info"))


def test_the_version():
    assert run("--version").stdout == f"convmixer-serve {__version__}\n"


CAT = "docs/images/cat.png"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("classify - <&-", "standard input is closed"),
        ("classify --files-from - <&-", "standard input is closed"),
        (f"classify {CAT} >&-", "standard output is closed; give --output"),
        ("classify --files-from /proc/self/mem", "/proc/self/mem cannot be read: Input/output error"),
        (f"classify {CAT} --url http://127.0.0.1:1 # ALL_PROXY=socks5://127.0.0.1:1", "'socksio' package is not installed"),
        (f"classify {CAT} --url http://127.0.0.1:1 # SSL_CERT_FILE=/nowhere", "SSL_CERT_FILE .* cannot be read: No such file"),
    ],
)
def test_what_is_wrong_around_it_is_one_line(call, message, repository):
    call, _, variable = call.partition(" # ")
    shell = f"{variable} exec {sys.executable} -m app.cli {call}"
    done = subprocess.run(["bash", "-c", shell], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr)


def test_a_dash_in_a_list_is_a_file(samples, tmp_path):
    (tmp_path / "-").write_bytes(samples[0].data)
    names = f"{samples[0].path}\n-\n{samples[1].path}\n"
    shell = ["bash", "-c", f"cd {tmp_path} && exec {sys.executable} -m app.cli classify --files-from -"]
    done = subprocess.run(
        shell, input=names, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, check=True
    )
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["file"] for row in rows] == [str(samples[0].path), "./-", str(samples[1].path)]
    assert rows[0]["label"] == rows[1]["label"]


def test_info_prints_metadata_engine_and_versions():
    result = run("info")
    assert result.returncode == 0
    card = json.loads(result.stdout)
    assert card["contract"] == "convmixer-artifact/1"
    assert card["engine"]["provider"] == "cpu"
    assert card["engine"]["workers"] >= 1
    assert {"convmixer-serve", "python", "onnxruntime", "numpy", "PIL"} == card["versions"].keys()


@pytest.fixture
def mixed(samples, repository, tmp_path):
    """A list of files: four good ones, their names with the characters of a glob, with a carriage return, and no UTF-8; a
    damaged one, text, a missing one."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in (b"[a]*.webp", b"a\rb.webp", b"caf\xe9.webp"):
        (folder / os.fsdecode(name)).write_bytes(samples[0].data)
    (folder / "damaged.png").write_bytes((repository / "docs" / "images" / "cat.png").read_bytes()[:1000])
    (folder / "note.txt").write_text("no image")
    return [*sorted(folder.iterdir()), samples[1].path, folder / "gone.png"]


CODES = [None, None, None, "undecodable_image", "unsupported_image", None, "undecodable_image"]


def as_text(path: Path) -> str:
    """A name as JSON, Parquet and standard error have it: strict readers refuse lone surrogates."""
    return os.fsencode(path).decode(errors="backslashreplace")


@pytest.mark.parametrize("server", [False, True])
def test_bad_files_are_reported_the_rest_is_classified_and_the_exit_code_says_so(mixed, server, base_url):
    stdin = b"\n".join(os.fsencode(path) for path in mixed)
    result = run("classify", "--files-from", "-", *(["--url", base_url] if server else []), "--json", stdin=stdin)
    assert result.returncode == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["filename"] for row in rows] == [as_text(path) for path in mixed]
    codes = [row.get("error", {}).get("code") for row in rows]
    assert codes == [*CODES[:6], "unreadable" if server else CODES[6]]
    assert [line.partition("  ")[0] for line in result.stderr.splitlines()] == [
        as_text(path) for path, code in zip(mixed, CODES, strict=True) if code
    ]


def test_errors_and_odd_names_in_csv_and_parquet(mixed, tmp_path):
    """Of files that are named, not only those that look like images; in a folder only those."""
    result = run("classify", *mixed[:6], stdin=b"")
    assert result.returncode == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout, newline="")))
    assert [row["file"] for row in rows] == [str(path) for path in mixed[:6]]
    assert [bool(row["error"]) for row in rows] == [bool(code) for code in CODES[:6]]
    assert result.stdout.count("\r") == 1
    result = run("classify", mixed[0].parent, "--parquet", tmp_path / "out.parquet")
    assert result.returncode == 1
    assert not result.stdout
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["file"].rpartition("/")[2], row["error_code"]) for row in table] == [
        ("[a]*.webp", None),
        ("a\rb.webp", None),
        ("caf\\xe9.webp", None),
        ("damaged.png", "undecodable_image"),
    ]
    assert [row["confidence"] is None for row in table] == [False, False, False, True]


def test_what_cannot_even_be_opened_gets_a_row(samples, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.webp").write_bytes(samples[0].data)
    (folder / "large.webp").write_bytes(bytes(200_000))
    monkeypatch.chdir(folder)
    for _ in range(30):  # deeper than a path can name
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)
    monkeypatch.chdir(folder)
    names = b"\n".join([b"a.webp", b"with\0zero.webp", b"large.webp"])
    result = run("classify", "--files-from", "-", "--json", stdin=names, CONVMIXER_MAX_BODY_BYTES="100000")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row.get("error", {}).get("code") for row in rows] == [None, "undecodable_image", "body_too_large"]
    result = run("classify", folder, "--json", CONVMIXER_MAX_BODY_BYTES="100000")
    assert result.returncode == 1
    *_, deep = [json.loads(line) for line in result.stdout.splitlines()]
    assert "File name too long" in deep["error"]["detail"]


def test_a_path_that_cannot_be_looked_at_gets_a_row_beside_the_others(samples, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    paths = [tmp_path / ("d" * 300), samples[0].path, tmp_path / "loop" / "cat.png"]
    result = run("classify", *paths, "--json")
    assert result.returncode == 1
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["filename"] for row in rows] == [str(path) for path in paths]
    assert "File name too long" in rows[0]["error"]["detail"]
    assert rows[1]["label"] == samples[0].label
    assert "symbolic links" in rows[2]["error"]["detail"]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> list[str]:
    """The images of a folder `photos` in the working folder; it also holds text and a link that leads back."""
    monkeypatch.chdir(tmp_path)
    images = ["photos/top.png", "photos/a/x.png", "photos/a/deep/y.png", "photos/b/z.png"]
    for name in [*images, "photos/a/note.txt"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("photos/a/loop").symlink_to(".")
    return images


@pytest.mark.parametrize(
    ("pattern", "order"),
    [("photos", [0, 1, 2, 3]), ("photos/**", [0, 1, 2, 3]), ("photos/**/*", [1, 2, 3, 0]), ("**/**", [0, 1, 2, 3])],
)
def test_a_folder_or_a_glob_gives_each_image_once(photos, pattern, order):
    assert list(find_images(expand([pattern]))) == [photos[i] for i in order]


def test_a_jpeg_from_windows_is_an_image_too(photos):
    Path("photos/b/PHOTO.JFIF").touch()
    assert list(find_images(["photos/b"])) == ["photos/b/PHOTO.JFIF", "photos/b/z.png"]


def test_a_glob_of_files_takes_them_whatever_they_are_called(photos):
    assert list(find_images(expand(["photos/[ab]/*.*"]))) == ["photos/a/note.txt", "photos/a/x.png", "photos/b/z.png"]


def test_a_file_called_dash_that_matches_is_not_standard_input(photos):
    Path("photos/-").touch()
    os.chdir("photos")
    assert list(find_images(expand(["?"]))) == ["./-", "a/x.png", "a/deep/y.png", "b/z.png"]


def on_terminal(*arguments: object, stdout: int | None = None) -> str:
    """What a person sees: standard error, and standard output unless it goes elsewhere, are a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command(*arguments), stdout=stdout or theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # EIO: the last one has closed it
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    assert process.wait(60) == 1
    return seen.decode()


def test_a_person_gets_a_table_and_elsewhere_a_progress_bar(mixed, samples, tmp_path):
    seen = on_terminal("classify", samples[1].path, mixed[3])
    assert re.search(rf"label +confidence +file\r\n{samples[1].label} +\d+.\d% +{samples[1].path}", seen)
    assert "damaged.png  " in seen
    assert re.search(r"2 images in [\d.]+ s, \d+ a second; 1 failed", seen)
    with (tmp_path / "out.csv").open("wb") as file:
        seen = on_terminal("classify", mixed[0].parent, stdout=file.fileno())
    assert "4/4" in seen
    assert "confidence" not in seen
    assert (tmp_path / "out.csv").read_bytes().count(b"\n") == 5


def test_names_of_files_cannot_move_the_cursor(samples, tmp_path):
    good, bad = (tmp_path / f"{name}\x1b[2J.webp" for name in ("good", "bad"))
    good.write_bytes(samples[1].data)
    bad.touch()
    seen = on_terminal("classify", good, bad)
    assert re.search(r"good\\x1b\[2J\.webp", seen)
    assert re.search(r"bad\\x1b\[2J\.webp  ", seen)
    assert "\x1b[2J" not in seen


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "/nowhere"], 2, "does not exist"),
        (["classify", "*.nothing"], 2, "matches nothing"),
        (["classify"], 2, "give PATHS or --files-from"),
        (["classify", ".", "--json", "--csv"], 2, "exclude one another"),
        (["classify", ".", "--files-from", "/nowhere"], 2, "give PATHS or --files-from"),
        (["classify", "--files-from", "/nowhere"], 2, "/nowhere does not exist"),
        (["classify", "--files-from", "/"], 2, "is a folder"),
        (["classify", ".", "--url", "http://127.0.0.1:80a0"], 2, "is no address"),
        (["classify", ".", "--csv", "--output", "/nowhere/a.csv"], 2, "cannot be written"),
        (["classify", "[l]ist", "--csv", "--output", "list"], 2, "list is to be read, and would be overwritten"),
        (["classify", "--files-from", "list", "--parquet", "list"], 2, "list is to be read, and would be overwritten"),
        (["classify", ".", "--csv", "--output", "old.PNG"], 2, "old.PNG is an image, and would be overwritten"),
        (["classify", ".", "--output", "a.parquet"], 2, "for Parquet give --parquet FILE"),
        (["bench", "http://:secret@127.0.0.1:1"], 2, "sends no user's name and password"),
        (["bench", "http://[::1"], 2, "is no address"),
        (["classify", ".", "--url", "localhost"], 2, "begins with http"),
        (["classify", ".", "--url", "http://127.0.0.1:1"], 1, "error: no answer from http://127.0.0.1:1"),
        (["classify", "."], 1, "no image in ."),
        (["bench", "http://127.0.0.1:1"], 1, "no answer from"),
        (["info", "--model", "gone.onnx"], 1, "gone.onnx cannot be read"),
        (["fly"], 2, "No such command"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("a.png")
    if "old.PNG" in arguments:
        Path("old.PNG").touch()
    monkeypatch.setattr(sys, "argv", ["convmixer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", capfd.readouterr().err).split())
    assert Path("list").read_text() == "a.png"


@pytest.mark.parametrize(("module", "extra"), [("httpx", "[client]"), ("pyarrow", "[parquet]"), ("onnxruntime", "[cpu]")])
def test_a_missing_extra_is_named(module, extra, tmp_path, samples):
    code = f"import sys; sys.modules[{module!r}] = None; from app.cli import main; main()"
    option = {"httpx": ["--url", "http://127.0.0.1:1"], "pyarrow": ["--parquet", tmp_path / "out"], "onnxruntime": []}[module]
    result = subprocess.run(
        [sys.executable, "-c", code, "classify", samples[0].path, *option],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == f"error: {module} is missing; in a clone: pip install -c constraints.txt '.{extra}'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_sigterm_loses_no_row_that_was_made(form, samples, tmp_path):
    """The file that is missing is told at once, so by then the rows before it were made; thousands are written together."""
    endless, output, missing = tmp_path / "list", tmp_path / "out", tmp_path / "missing.png"
    paths = [*(str(sample.path) for sample in samples), str(missing), *[str(sample.path) for sample in samples] * 500]
    endless.write_text("".join(f"{path}\n" for path in paths))
    options = ["--parquet", output] if form == "parquet" else ["--output", output]
    process = subprocess.Popen(command("classify", "--files-from", endless, *options), stderr=subprocess.PIPE)
    assert str(missing).encode() in process.stderr.readline()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert not errors
    if form == "parquet":
        files = pq.read_table(output)["file"].to_pylist()
    else:
        assert output.read_bytes().endswith(b"\n")
        files = [row["file"] for row in csv.DictReader(io.StringIO(output.read_text()))]
    assert len(files) > len(samples)
    assert files == paths[: len(files)]


def waits_in(pid: int | str) -> str:
    """The kernel's function in which a process sleeps; not every kernel says it."""
    path = Path(f"/proc/{pid}/wchan")
    return path.read_text() if path.exists() else ""


def kernel_tells() -> bool:
    with subprocess.Popen(["sleep", "60"]) as asleep:
        try:
            for _ in range(100):
                if waits_in(asleep.pid) not in {"", "0"}:
                    return True
                time.sleep(0.01)
        finally:
            asleep.kill()
    return False


@pytest.mark.parametrize("server", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_reader_that_does_not_read_holds_up_no_signal(samples, server, signum, base_url):
    if not kernel_tells():
        pytest.skip("this kernel does not say what a process waits for")
    paths = [str(sample.path) for sample in samples] * 5
    arguments = command("classify", *paths, "--json", "--top-k=10", *(["--url", base_url] if server else []))
    with subprocess.Popen(["env", "--default-signal=INT", *arguments], stdout=subprocess.PIPE) as process:
        try:
            wait_until(lambda: waits_in(process.pid) in {"pipe_write", "anon_pipe_write"}, lambda: waits_in(process.pid))
            process.send_signal(signum)
            assert process.wait(60) == 128 + signum
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "options", "first"), [("a.JSONL", [], b"{"), ("a.csv", [], b"file,"), ("a.json", ["--csv"], b"file,")]
)
def test_the_ending_of_the_output_says_what_is_written(name, options, first, samples, tmp_path):
    assert run("classify", samples[0].path, "--output", tmp_path / name, *options).returncode == 0
    assert (tmp_path / name).read_bytes().startswith(first)


@pytest.mark.parametrize("form", ["csv", "parquet", "json"])
def test_a_full_disk_is_one_line(form, samples):
    path = "/dev/full"
    options = {"csv": ["--output", path], "parquet": ["--parquet", path], "json": ["--json", "--output", path]}[form]
    result = run("classify", *(sample.path for sample in samples[:3]), *options)
    assert (result.returncode, result.stderr) == (1, "error: /dev/full cannot be written: No space left on device\n")


@pytest.mark.parametrize("server", [False, True])
def test_ctrl_c_ends_it_with_whole_rows(samples, server, base_url, tmp_path):
    endless = tmp_path / "list"
    endless.write_text("".join(f"{sample.path}\n" for sample in samples) * 500)
    options = ["--url", base_url] if server else []
    with subprocess.Popen(
        ["env", "--default-signal=INT", *command("classify", "--files-from", endless, *options)],  # ignored in a background job
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        begin = process.stdout.read(2000)
        process.send_signal(signal.SIGINT)
        try:
            rest, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in errors
    rows = list(csv.reader(io.StringIO((begin + rest).decode())))
    assert {len(row) for row in rows} == {5}
    assert [row[0] for row in rows[1:201]] == [str(sample.path) for sample in samples[: len(rows) - 1]]


def test_the_first_key_of_the_servers_own_file_is_sent(samples, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("\n  first \r\nsecond\n", encoding="utf-8-sig")
    server = ScriptedServer((401, {}, {"code": "unauthorized", "detail": "another key"}))
    result = run("classify", samples[0].path, "--url", server.url, "--api-key-file", keys)
    assert (result.returncode, "another key" in result.stderr) == (1, True)
    (head,) = server.finish()
    assert "authorization: bearer first\r\n" in head


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no key"), (b"schl\xc3\xbcssel", "printable ASCII"), (b"a\0b", "printable")]
)
def test_a_key_that_cannot_be_sent_is_wrong_usage_and_not_shown(samples, tmp_path, content, message):
    keys = tmp_path / "keys"
    keys.write_bytes(content)
    result = run("classify", samples[0].path, "--url", "http://127.0.0.1:1", "--api-key-file", keys, COLUMNS="500")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not content or content.decode() not in result.stderr


def test_a_reader_that_has_enough_ends_it_without_a_trace(samples):
    script = f"{' '.join(command('classify', samples[0].path.parent.parent, '--json'))} | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert json.loads(result.stdout)["index"] == 0
    assert not result.stderr


def test_bash_completes_commands(convmixer_on_path):
    script = """
    eval "$(_CONVMIXER_COMPLETE=source_bash convmixer)"
    complete -p convmixer
    COMP_WORDS=(convmixer cl); COMP_CWORD=1
    _convmixer_completion convmixer
    echo "${COMPREPLY[@]}"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=convmixer_on_path, check=True)
    assert result.stdout.splitlines()[-2:] == ["complete -o default -F _convmixer_completion convmixer", "classify"]


def test_other_shells_have_completion_too(convmixer_on_path):
    for shell in ("zsh", "fish"):
        environment = convmixer_on_path | {"_CONVMIXER_COMPLETE": f"source_{shell}"}
        result = subprocess.run(["convmixer"], capture_output=True, text=True, env=environment, check=True)
        assert f"_CONVMIXER_COMPLETE=complete_{shell}" in result.stdout

import re

import pytest

from app.errors import StartupError
from app.settings import ENV_PREFIX, Settings


def test_environment_is_read_and_arguments_win(monkeypatch):
    monkeypatch.setenv("CONVMIXER_PORT", "9000")
    monkeypatch.setenv("CONVMIXER_MAX_IMAGES", "7")
    settings = Settings.load(port=9001)
    assert (settings.port, settings.max_images) == (9001, 7)


def test_a_misspelt_variable_stops_the_start(monkeypatch):
    monkeypatch.setenv("CONVMIXER_MAX_IMAGE", "7")
    with pytest.raises(StartupError, match=r"CONVMIXER_MAX_IMAGE; known: .*CONVMIXER_MAX_IMAGES"):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "70000"),
        ("PROVIDER", "tpu"),
        ("DEADLINE_MS", "0"),
        ("DEADLINE_MS", "9" * 20),
        ("MODEL_SHA256", "abc"),
        ("HOST", ""),
        ("RECEIVE_TIMEOUT_S", "inf"),
        ("SHUTDOWN_DELAY_S", "inf"),
        ("DRAIN_TIMEOUT_S", "99999999999"),
    ],
)
def test_a_bad_value_is_named(monkeypatch, name, value):
    monkeypatch.setenv(ENV_PREFIX + name, value)
    with pytest.raises(StartupError, match=f"{ENV_PREFIX}{name}='{value}'"):
        Settings.load()


def test_a_hash_may_be_in_capitals_as_in_a_file_of_hashes():
    assert Settings.load(model_sha256="AB" * 32).model_sha256 == "AB" * 32


def test_keys_that_are_no_text_are_refused_and_not_shown():
    with pytest.raises(StartupError, match=r"^CONVMIXER_API_KEYS is not UTF-8$"):
        Settings(api_keys="good,\udcffkey").keys()


@pytest.mark.parametrize(
    "origin",
    ["https://app.example/", "https://app.example/page", "app.example", "https://App.example", "https://a b", "https://"],
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(StartupError, match=re.escape(repr(origin))):
        Settings(cors_origins=f"https://good.example,{origin}").origins()


def test_origins_are_those_that_browsers_send():
    origins = ["https://app.example", "http://localhost:3000", "chrome-extension://abc", "http://[::1]:8000", "null", "*"]
    assert Settings(cors_origins=", ".join(origins) + ",").origins() == origins
    assert Settings().origins() == []


def test_every_setting_is_documented_with_its_default(repository):
    """docs/settings.md has one table row a setting: variable, default, description."""
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*) \|$", (repository / "docs" / "settings.md").read_text(), re.MULTILINE)

    def written(default: object) -> str:
        return "" if default is None else str(default).lower() if isinstance(default, bool) else str(default)

    expected = [
        (ENV_PREFIX + name.upper(), written(field.default), field.description) for name, field in Settings.model_fields.items()
    ]
    assert rows == expected

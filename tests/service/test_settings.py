from pathlib import Path

import pytest
from pydantic import ValidationError

from resight.errors import RecipeError
from resight.service.settings import PREFIX, Settings, load_settings

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def test_flags_come_before_environment_before_file_before_defaults(tmp_path, monkeypatch):
    file = tmp_path / "resight.toml"
    file.write_text('bundle = "b"\ndata = "from-file"\nmax_batch = 4\nmax_queue = 100\n')
    monkeypatch.setenv("RESIGHT_MAX_BATCH", "5")
    monkeypatch.setenv("RESIGHT_DATA", "from-env")
    settings = load_settings(config=file, data=Path("from-flag"), listen=None)
    assert (settings.data, settings.max_batch, settings.max_queue) == (Path("from-flag"), 5, 100)
    assert (settings.bundle, settings.max_top_k, settings.listen) == (Path("b"), 1000, "127.0.0.1:50051")


def test_settings_are_immutable():
    settings = load_settings(bundle=Path("b"), data=Path("d"))
    with pytest.raises(ValidationError):
        settings.max_batch = 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bundle": None}, "set --bundle, RESIGHT_BUNDLE or a line"),
        ({"max_batch": 0}, "max_batch.*found 0"),
        ({"listen": "50051"}, "listen.*found '50051'"),
        ({"provider": "tpu"}, "provider.*found 'tpu'"),
        ({"max_bach": 3}, "did you mean 'max_batch'"),
        ({"max_queue": 10}, "max_queue must hold a batch"),
        ({"tls_cert": Path("c")}, "tls_cert and tls_key belong together"),
        ({"tls_client_ca": Path("c")}, "tls_client_ca requires tls_cert"),
        ({"auth": "off"}, "auth.*found 'off'"),
        ({"insecure_listen": True}, "there is no setting insecure_listen"),
    ],
)
def test_invalid_settings_are_named(wrong, message):
    with pytest.raises(RecipeError, match=message):
        load_settings(**({"bundle": Path("b"), "data": Path("d")} | wrong))


def test_an_unreadable_settings_file_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("a = = 3")
    for config in (tmp_path / "bad.toml", tmp_path):
        with pytest.raises(RecipeError, match=config.name):
            load_settings(config=config, bundle=Path("b"), data=Path("d"))


def test_a_missing_settings_file_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml"):
        load_settings(config=tmp_path / "none.toml", bundle=Path("b"), data=Path("d"))


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:50051", "::1", 50051), ("localhost:80", "localhost", 80)],
)
def test_addresses(listen, host, port):
    settings = load_settings(bundle=Path("b"), data=Path("d"), listen=listen)
    assert (settings.host, settings.port) == (host, port)


def test_every_setting_is_documented():
    page = DOCS.read_text()
    assert [name for name in Settings.model_fields if f"`{name}`" not in page] == []

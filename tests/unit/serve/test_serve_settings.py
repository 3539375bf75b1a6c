from __future__ import annotations

import pickle
import socket
from pathlib import Path

import pytest
from ray.serve.config import AutoscalingConfig

from model.errors import InputError
from serve.api import ApiError, ModelRef, busy, parse_model
from serve.app import _replicas
from serve.auth import ApiKeys, key_digest, main, new_key, read_keys
from serve.endpoint import free_port
from serve.settings import ServeSettings, load_settings

KEY = "a-key-of-more-than-twenty-characters"


def test_defaults_serve_the_shipped_pair_to_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ECHODISTILL_CACHE", str(tmp_path / "cache"))
    settings = load_settings()
    assert (settings.base, settings.host, settings.local_only) == ("pocket", "127.0.0.1", True)
    # Ray's workers run elsewhere: every path is absolute.
    assert settings.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert settings.cache == tmp_path / "cache"


def test_arguments_win_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHODISTILL_SERVE_PORT", "1234")
    monkeypatch.setenv("ECHODISTILL_SERVE_MAX_N", "3")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    settings = load_settings(port=0)
    assert (settings.port, settings.max_n) == (0, 3)
    assert settings.tracking_uri == "http://mlflow:5000"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "'port'"),
        ({"prot": 1}, "'prot'"),
        ({"base": "sd-turbo"}, "does not ship with the project"),
        ({"base": "../x"}, "'base'"),
        ({"student": "."}, "give yours another name"),
        ({"max_n": 10, "max_queue": 5}, "`max_n`"),
        ({"device": "tpu"}, "'device'"),
        ({"replicas": 3, "max_replicas": 2}, "`max_replicas`"),
        ({"prewarm": "../x"}, "'prewarm'"),
        ({"safety_checker": "os.system"}, "'safety_checker'"),
        ({"speed": "warp"}, "'speed'"),
        ({"batch_sizes": "1;8"}, "'batch_sizes'"),
        ({"batch_sizes": "1,16"}, "`max_batch`"),
    ],
)
def test_wrong_settings_are_one_sentence(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_replicas_are_a_number_or_scale_with_the_requests_under_way() -> None:
    assert _replicas(ServeSettings(replicas=3)) == {"num_replicas": 3}
    (scaling,) = _replicas(ServeSettings(replicas=1, max_replicas=4, scale_at=6)).values()
    assert AutoscalingConfig(**scaling).target_ongoing_requests == 6
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)


def test_local_only() -> None:
    for host, local in (("localhost", True), ("127.0.0.9", True), ("::1", True)):
        assert ServeSettings(host=host).local_only is local
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert ServeSettings(host=host).local_only is False


def test_keys_are_needed_when_others_can_reach_the_endpoint() -> None:
    assert not read_keys(ServeSettings()).required
    with pytest.raises(InputError, match="needs API keys"):
        read_keys(ServeSettings(host="0.0.0.0"))
    assert read_keys(ServeSettings(host="0.0.0.0", api_keys=f"ann={KEY}")).required


def test_keys_of_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, line = new_key("bob")
    file = tmp_path / "keys.txt"
    file.write_text(f"# who may draw\n\n{line}\n")
    monkeypatch.setenv(
        "ECHODISTILL_SERVE_API_KEYS", f"ann={KEY}, eve=sha256:{key_digest('e' * 30)}"
    )
    settings = load_settings(api_keys_file=file)
    keys = read_keys(settings)
    for key, name in ((KEY, "ann"), (made, "bob"), ("e" * 30, "eve")):
        assert keys.owner(f"Bearer {key}") == name
    for wrong in (None, "", "Bearer", "Bearer x", KEY, f"Basic {KEY}", f"Bearer {KEY}x"):
        with pytest.raises(ApiError) as caught:
            keys.owner(wrong)
        assert caught.value.status == 401
    for text in (repr(settings), repr(keys), str(pickle.dumps(keys))):
        assert KEY not in text and made not in text
    assert made not in file.read_text()


@pytest.mark.parametrize("line", [f"bob {KEY}", "bob", "b b sha256:00", "sha256:" + "0" * 64])
def test_wrong_line_of_a_key_file_is_named_but_not_shown(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys.txt"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_keys(load_settings(api_keys_file=file))
    assert KEY not in str(caught.value)


def test_key_file_that_is_not_there_and_short_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(load_settings(api_keys_file=tmp_path / "none"))
    with pytest.raises(InputError, match="under 20 characters"):
        read_keys(load_settings(api_keys="ann=short"))


def test_key_maker_prints_the_line_for_the_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ann"]) == 0
    shown = capsys.readouterr()
    key = shown.err.split()[-1]
    assert shown.out == f"ann sha256:{key_digest(key)}\n"
    assert main([]) == main(["a b"]) == 2


def test_no_keys_let_everybody_in() -> None:
    assert ApiKeys().owner(None) is None


def test_port_in_use_and_any_port() -> None:
    port = free_port("127.0.0.1", 0)
    assert free_port("127.0.0.1", port) == port > 0
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        with pytest.raises(InputError, match="choose another"):
            free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError):
        free_port("no.such.host.invalid", 0)


def test_model_names() -> None:
    assert parse_model(None, "b") == parse_model("b", "b") == ModelRef(None)
    assert parse_model("rex", "b") == ModelRef("rex", "champion")
    assert parse_model("rex@3", "b") == ModelRef("rex", "3")


def test_errors_cross_processes_whole() -> None:
    error = busy("full", status=429, retry_after=7)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.body() == error.body() and copy.headers() == {"Retry-After": "7"}

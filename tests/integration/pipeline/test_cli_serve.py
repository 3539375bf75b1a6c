"""`echodistill serve` from outside: starts, says where, stops, and refuses a port in use."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

from tests.integration.pipeline.commands import run, start
from tests.integration.pipeline.processes import MARK, left_behind, new_mark


def test_serve_says_where_and_stops_on_sigterm(tiny_base: Path, tmp_path: Path) -> None:
    mark = new_mark()
    process = start(
        "serve", "--base", str(tiny_base), "--port", "0", "--json", cwd=tmp_path, **{MARK: mark}
    )
    assert process.stdout is not None
    try:
        text = ""
        for line in process.stdout:  # the document comes when it serves
            text += line
            if line.rstrip() == "}":
                break
        document = json.loads(text)
        with urllib.request.urlopen(f"{document['url']}/v1/models", timeout=30) as answer:
            assert [model["id"] for model in json.load(answer)["data"]] == ["tiny"]
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert "\x1b" not in stderr and "raylet" not in stderr
    assert left_behind(mark) == {}


def test_a_port_in_use_is_one_sentence(tiny_base: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--base", str(tiny_base), "--port", port, "--json", cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert f"port {port}" in done.error and "choose another" in done.error
    assert done.document["error"]["exit_code"] == 2


def test_ctrl_c_does_not_wait_for_the_start(tiny_base: Path, tmp_path: Path) -> None:
    mark = new_mark()
    process = start(
        "serve", "--base", str(tiny_base), "--port", "0", "--json", cwd=tmp_path, **{MARK: mark}
    )
    assert process.stderr is not None
    try:
        assert "starting" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr == "error: interrupted; everything that was started has been stopped\n"
    assert json.loads(stdout)["error"]["exit_code"] == 130
    assert left_behind(mark) == {}


def test_a_registry_that_is_not_there_is_told(tiny_base: Path, tmp_path: Path) -> None:
    uri = ("--tracking-uri", "sqlite:///typo.db")
    done = run("serve", "--base", str(tiny_base), *uri, "--json", cwd=tmp_path)
    assert done.code == 2 and "there is no registry at sqlite:///" in done.error
    assert not (tmp_path / "typo.db").exists()


def test_listening_to_others_needs_keys(tiny_base: Path, tmp_path: Path) -> None:
    done = run("serve", "--base", str(tiny_base), "--host", "0.0.0.0", "--json", cwd=tmp_path)
    assert done.code == 2, done.stderr
    assert "key" in done.error

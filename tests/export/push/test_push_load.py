"""From the command line to a hub, and from there into transformers and back into adaconvert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.testing.hub_server import environment_of
from adaconvert.testing.hub_state import Hub
from adaconvert.testing.tiny_models import make

LOAD = r"""
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = torch.arange(2, 34).reshape(2, 16)
for repo, revision, folder, code in json.loads(sys.argv[1]):
    logits = []
    for where, options in ((repo, {"revision": revision}), (folder, {})):
        model, told = AutoModelForCausalLM.from_pretrained(
            where, trust_remote_code=code, output_loading_info=True, **options
        )
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
    tokens = AutoTokenizer.from_pretrained(repo, revision=revision)("a text")["input_ids"]
    same = tokens == AutoTokenizer.from_pretrained(folder)("a text")["input_ids"]
    print(f"\n{repo}", type(model).__name__, torch.equal(*logits), same)
"""


def command(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment_of(hub, home),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow
def test_what_was_pushed_loads_from_there(hub: Hub, tmp_path: Path) -> None:
    dense = make("llama", tmp_path / "dense")
    native, adaptive = tmp_path / "native", tmp_path / "adaptive"
    api.convert(dense, destination=native, experts=2, top_k=1)
    api.convert(dense, destination=adaptive, method="moefy", num_experts=4)
    first = command(hub, tmp_path / "home", "-m", "adaconvert", "push", native, "org/native")
    assert (first.returncode, first.stdout.splitlines()[-1]) == (0, f"{hub.url}/org/native")
    commit = hub.repositories["org/native"].refs["main"]
    options = ("--private", "--revision", "v1", "--json")
    adaconvert = ("-m", "adaconvert", "push", adaptive, "org/adaptive", *options)
    second = command(hub, tmp_path / "home", *adaconvert)
    assert json.loads(second.stdout)["private"] is True
    loads = [
        ("org/native", None, str(native), False),
        ("org/native", commit, str(native), False),
        ("org/adaptive", "v1", str(adaptive), True),
    ]
    loaded = command(hub, tmp_path / "fresh", "-c", LOAD, json.dumps(loads))
    assert loaded.returncode == 0, loaded.stderr
    # transformers prints, too
    lines = [line.split() for line in loaded.stdout.splitlines() if line.startswith("org/")]
    assert [line[0] for line in lines] == [repo for repo, *_ in loads], loaded.stdout
    assert all(line[2:] == ["True", "True"] for line in lines), loaded.stdout
    # what is at the hub is a source as any other, and still the checkpoint its manifest lists
    assert api.inspect("org/native").to_json()
    again = command(hub, tmp_path / "home", "-m", "adaconvert", "push", native, "org/native")
    assert again.stdout.splitlines()[0].startswith("nothing to send: ")
    assert len(hub.repositories["org/native"].commits) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("--private",), 4, "error: org/tiny: exists and is public. Leave out --private"),
        (("--create-pr", "--revision", "x"), 2, "error: --create-pr: a pull request is always"),
        (("--verify", "never"), 2, "error: Invalid value for '--verify': 'never' is not one of"),
        (("--token",), 2, "error: Option '--token' requires an argument."),
        (("--token", "abc"), 2, "error: --token: a token on the command line can be read by"),
    ],
)
def test_the_command_says_what_is_wrong(
    hub: Hub,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    line: str,
) -> None:
    from adaconvert.cli.main import run

    hub.create("org/tiny")
    assert run(["push", str(checkpoint), "org/tiny", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(line)


def test_the_command_prints_the_result(
    hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from adaconvert.cli.main import run

    push = ["push", str(checkpoint), "org/tiny"]
    assert run([*push, "--dry-run", "--private", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["dry_run"], err) == (True, "")
    assert hub.requests == []
    assert run([*push, "--private", "--commit-message", "First"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"{hub.url}/org/tiny"
    assert "private" in out.splitlines()[1]
    # and no progress bar, where nobody can see it move
    assert err.splitlines() == ["checked 9 files (full)", f"sending 9 files to {hub.url}/org/tiny"]
    assert hub.repositories["org/tiny"].titles()[-1] == "First"
    assert run([*push, "-q", "--verify", "quick"]) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("nothing to send: 9 there already", "")

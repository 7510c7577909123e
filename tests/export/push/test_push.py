"""`push` against a hub on this machine: what is there afterwards, and what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from adaconvert import api
from adaconvert.errors import (
    OptionError,
    OutputConflictError,
    ResourceError,
    VerificationError,
)
from adaconvert.export.hub_result import PushResult
from adaconvert.testing.faults import write_sharded
from adaconvert.testing.hub_state import Fault, Hub
from adaconvert.testing.sealed import CARD, seal

REPO = "org/tiny"
TITLE = "upcycle by adaconvert"


def there(hub: Hub, ref: str = "main", repo: str = REPO) -> dict[str, bytes]:
    """Return what a branch holds, without what the hub put there itself."""
    commit = hub.repositories[repo].at(ref)
    assert commit is not None
    return {name: file.content for name, file in commit.files.items() if name != ".gitattributes"}


def here(folder: Path) -> dict[str, bytes]:
    """Return the content of every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def writes(hub: Hub) -> list[tuple[str, str]]:
    """Return the requests that could have changed something, and forget all."""
    found = [(method, path) for method, path in hub.requests if method not in ("GET", "HEAD")]
    hub.requests.clear()
    return found


def push(folder: Path, repo: str = REPO, **options: object) -> PushResult:
    return api.push(folder, repo, **options)


def test_one_commit_holds_the_checkpoint(hub: Hub, checkpoint: Path) -> None:
    said: list[str] = []
    result = push(checkpoint, report=said.append)
    repository = hub.repositories[REPO]
    assert there(hub) == here(checkpoint)
    assert [title.startswith(TITLE) for title in repository.titles()] == [False, True]
    assert result.commit == repository.refs["main"]
    assert result.url == f"{hub.url}/{REPO}"
    assert dict(result.files) == {name: len(data) for name, data in here(checkpoint).items()}
    assert (result.skipped, result.deleted, result.left_out) == ((), (), {})
    assert said == ["checked 9 files (full)", f"sending 9 files to {hub.url}/{REPO}"]
    assert result.lines()[-1] == f"{hub.url}/{REPO}"
    assert result.lines()[0].startswith("9 files sent, ")


def test_only_what_the_manifest_lists_goes_there(hub: Hub, checkpoint: Path) -> None:
    listed = here(checkpoint)
    (checkpoint / "checkpoint-20").mkdir()
    (checkpoint / "checkpoint-20" / "optimizer.pt").write_bytes(b"x")
    for name in ("optimizer.pt", ".env", "train.log", "notes.txt", "trainer_state.json"):
        (checkpoint / name).write_text("hf_CANARYCANARYCANARYCANARY /home/someone/data")
    (checkpoint / "runs").mkdir()
    result = push(checkpoint)
    assert there(hub) == listed
    assert result.left_out == {
        ".env": "is hidden",
        "checkpoint-20": "is a checkpoint of a training run",
        "notes.txt": "is not listed in adaconvert.json",
        "optimizer.pt": "is training state",
        "runs": "is a log",
        "train.log": "is a log",
        "trainer_state.json": "is training state",
    }
    assert "left out: .env: is hidden" in result.lines()


def test_a_second_push_sends_nothing(hub: Hub, checkpoint: Path) -> None:
    first = push(checkpoint)
    writes(hub)
    again = push(checkpoint)
    assert writes(hub) == []
    assert again.commit == first.commit
    assert again.sent == ()
    assert set(again.skipped) == set(here(checkpoint))
    assert again.lines()[0] == "nothing to send: 9 there already"


def test_only_what_changed_is_sent(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint)
    writes(hub)
    (checkpoint / "tokenizer.json").write_text('{"version": "2.0"}\n')
    seal(checkpoint)
    result = push(checkpoint)
    assert [name for name, _ in result.sent] == ["adaconvert.json", "tokenizer.json"]
    assert not hub.asked("PUT")
    assert there(hub) == here(checkpoint)
    assert len(hub.repositories[REPO].titles()) == 3


def test_a_dry_run_talks_to_no_hub(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    result = push(checkpoint, dry_run=True, private=True)
    assert (hub.requests, hub.repositories) == ([], {})
    assert (result.dry_run, result.commit, result.private) == (True, None, True)
    lines = result.lines()
    sizes = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[:9]}
    assert sizes["README.md"] == f"{len(CARD)} bytes"
    assert set(sizes) == set(here(checkpoint)) - {"optimizer.pt"}
    assert lines[-2:] == [
        "left out: optimizer.pt: is training state",
        f"would go to {hub.url}/{REPO}",
    ]
    assert "dry run: nothing was sent" in lines[9]


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repository_is_seen_by_whom_it_should(
    hub: Hub, checkpoint: Path, private: bool
) -> None:
    result = push(checkpoint, private=private)
    assert hub.repositories[REPO].private is private
    assert result.private is private
    assert ("private" if private else "public") in result.lines()[1]


@pytest.mark.parametrize("exists", [True, False])
def test_who_sees_a_repository_is_never_changed(hub: Hub, checkpoint: Path, exists: bool) -> None:
    hub.create(REPO, private=exists)
    word, option = ("private", "--public") if exists else ("public", "--private")
    with pytest.raises(OutputConflictError) as caught:
        push(checkpoint, private=not exists)
    assert str(caught.value) == (
        f"{REPO}: exists and is {word}. Leave out {option}, or change who sees it in the settings "
        "of the repository."
    )
    assert writes(hub) == []
    assert push(checkpoint, private=exists).private is exists
    assert push(checkpoint).private is exists


def test_a_repository_that_turns_out_public_gets_nothing(hub: Hub, checkpoint: Path) -> None:
    def sneak(method: str, path: str) -> Fault | None:
        if path == "/api/repos/create":
            hub.create(REPO, private=False)
        return None

    hub.fault = sneak
    with pytest.raises(OutputConflictError, match="exists and is public"):
        push(checkpoint, private=True)
    assert there(hub) == {}
    assert hub.large == {}


def test_a_branch_is_made_when_it_is_missing(hub: Hub, checkpoint: Path) -> None:
    for _ in range(2):
        result = push(checkpoint, revision="trial/one")
        assert result.url == f"{hub.url}/{REPO}/tree/trial/one"
        assert there(hub, "trial/one") == here(checkpoint)
        assert there(hub) == {}
    assert len(hub.repositories[REPO].titles("trial/one")) == 2


def test_an_open_pull_request_can_be_gone_on_with(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"--revision: the repository has no such pull request"):
        push(checkpoint, revision="refs/pr/7")
    push(checkpoint)
    (checkpoint / "README.md").write_text(f"{CARD}\nmore\n")
    push(checkpoint, create_pr=True)
    (checkpoint / "README.md").write_text(f"{CARD}\neven more\n")
    push(checkpoint, revision="refs/pr/1")
    assert there(hub, "refs/pr/1")["README.md"].endswith(b"even more\n")
    assert there(hub)["README.md"] == CARD.encode()


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, checkpoint: Path) -> None:
    hub.create("other/model", **{"README.md": CARD.encode()})
    first = push(checkpoint, "other/model", create_pr=True, commit_message="Add experts")
    assert first.url == f"{hub.url}/other/model/discussions/1"
    assert there(hub, "refs/pr/1", "other/model") == here(checkpoint)
    assert there(hub, repo="other/model") == {"README.md": CARD.encode()}
    again = push(checkpoint, "other/model", create_pr=True, commit_message="Add experts")
    assert (again.url, again.commit) == (first.url, first.commit)
    assert hub.repositories["other/model"].pull_requests == ["Add experts"]


def test_a_pull_request_needs_a_repository(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=rf"{REPO}: there is no such repository\. Push without"):
        push(checkpoint, create_pr=True)
    assert hub.repositories == {}


def test_files_of_an_earlier_checkpoint_go(hub: Hub, tmp_path: Path, checkpoint: Path) -> None:
    push(checkpoint)
    repository = hub.repositories[REPO]
    main = repository.at("main")
    assert main is not None
    with_more = {**main.files, "plots.svg": main.files["README.md"]}
    repository.add("main", "plots", with_more, main.oid)
    smaller = seal(write_sharded(tmp_path / "smaller", 2))
    result = push(smaller)
    assert there(hub) == {**here(smaller), "plots.svg": CARD.encode()}
    gone = set(here(checkpoint)) - set(here(smaller))
    assert set(result.deleted) == gone
    assert "tokenizer.json" in gone
    assert repository.titles()[-1].startswith(TITLE)


def test_a_foreign_checkpoint_stays(hub: Hub, checkpoint: Path) -> None:
    hub.create(REPO, **{"config.json": b"{}", "model.safetensors": b"theirs"})
    with pytest.raises(OutputConflictError) as caught:
        push(checkpoint)
    assert str(caught.value) == (
        f"{REPO}: holds a checkpoint adaconvert did not write (config.json, model.safetensors). "
        "Push to another repository, or propose it there with --create-pr."
    )
    assert writes(hub) == []
    result = push(checkpoint, create_pr=True)
    # it would be loaded instead of the shards
    assert result.deleted == ("model.safetensors",)
    assert there(hub, "refs/pr/1") == here(checkpoint)
    assert there(hub)["model.safetensors"] == b"theirs"


def test_a_card_edited_here_goes_there(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint)
    (checkpoint / "README.md").write_text(f"{CARD}\nMy words.\n")
    result = push(checkpoint)
    assert there(hub)["README.md"].endswith(b"My words.\n")
    assert result.notes == ("README.md was edited since it was written; it is taken as it is",)


@pytest.mark.parametrize("pushed_before", [True, False])
def test_a_card_edited_at_the_hub_is_kept(hub: Hub, checkpoint: Path, pushed_before: bool) -> None:
    theirs = f"{CARD}\nWritten at the hub.\n".encode()
    if pushed_before:
        push(checkpoint)
        main = hub.repositories[REPO].at("main")
        assert main is not None
        card = type(main.files["README.md"])(content=theirs, large=False)
        hub.repositories[REPO].add("main", "edit", {**main.files, "README.md": card}, main.oid)
    else:
        hub.create(REPO, **{"README.md": theirs})
    result = push(checkpoint)
    assert there(hub) == {**here(checkpoint), "README.md": theirs}
    assert result.left_out == {"README.md": "was edited at the hub, where it is kept"}
    assert "README.md" not in dict(result.files)


def test_the_stub_of_a_new_repository_is_replaced(hub: Hub, checkpoint: Path) -> None:
    hub.create(REPO, **{"README.md": b"---\nlicense: apache-2.0\n---\n"})
    push(checkpoint)
    assert there(hub) == here(checkpoint)


def test_files_that_do_not_arrive_are_named(hub: Hub, checkpoint: Path) -> None:
    hub.create(REPO).ignored = {"tokenizer.json"}
    with pytest.raises(VerificationError, match=r"does not hold what was sent: tokenizer\.json"):
        push(checkpoint)


def on(method: str, part: str, act: Callable[[], None]) -> Callable[[str, str], None]:
    """Return a fault that acts once, on the first request of that kind, and breaks nothing."""
    done: list[bool] = []

    def fault(how: str, path: str) -> None:
        if how == method and part in path and not done:
            done.append(True)
            act()

    return fault


def test_somebody_else_commits_meanwhile(hub: Hub, checkpoint: Path) -> None:
    repository = hub.create(REPO)

    def commit() -> None:
        main = repository.at("main")
        assert main is not None
        repository.add("main", "theirs", main.files, main.oid)

    hub.fault = on("POST", "/preupload/", commit)
    with pytest.raises(OutputConflictError, match="changed while files were being sent; nothing"):
        push(checkpoint)
    assert repository.titles() == ["initial commit", "theirs"]
    push(checkpoint)
    assert there(hub) == here(checkpoint)


def test_weights_that_change_meanwhile_are_noticed(hub: Hub, checkpoint: Path) -> None:
    shard = checkpoint / "model-00001-of-00003.safetensors"
    hub.fault = on("POST", "/create", lambda: shard.write_bytes(shard.read_bytes()[::-1]))
    with pytest.raises(VerificationError, match=f"{shard.name}: changed while it was being pushed"):
        push(checkpoint)
    assert there(hub) == {}


def test_a_card_the_hub_refuses_stops_before_the_weights(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(
        VerificationError, match=r'README\.md: the hub refuses it: .*"license" must'
    ):
        push(checkpoint)
    assert hub.large == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "a" * 40}, "--revision: is a commit, which cannot change"),
        ({"revision": "../x"}, "--revision: is no name of a branch; found '../x'"),
        ({"revision": "x", "create_pr": True}, "--create-pr: a pull request is always against"),
        ({"commit_message": ""}, "--commit-message: is no title; expected one line"),
        ({"commit_message": "a\nb"}, "--commit-message: is no title"),
        ({"verify": "no"}, "--verify: is no way to verify; expected full or quick, found no"),
        ({"endpoint": "https://me:secret@hub.example"}, "endpoint: holds an access token or a"),
    ],
)
def test_options_that_cannot_be(
    hub: Hub, checkpoint: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        push(checkpoint, **options)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "../tiny", "org/", "org/a--b", "org/x.git", ""])
def test_names_that_are_no_repository(hub: Hub, checkpoint: Path, repo: str) -> None:
    with pytest.raises(OptionError, match="ORG/NAME: is no repository of a hub; expected a name"):
        push(checkpoint, repo)
    assert hub.requests == []


def test_a_server_without_xet_is_named(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(ResourceError) as caught:
        push(checkpoint)
    assert str(caught.value) == (
        f"{REPO}: the server of HF_ENDPOINT has no Xet storage. Set HF_HUB_DISABLE_XET=1, and run "
        "the same command again."
    )


def test_json_is_plain_data(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "x.log").write_text("")
    record = json.loads(json.dumps(push(checkpoint, private=True).to_json()))
    assert record["url"] == f"{hub.url}/{REPO}"
    assert record["left_out"] == [{"name": "x.log", "reason": "is a log"}]
    assert {item["name"] for item in record["files"]} == set(here(checkpoint)) - {"x.log"}
    assert (record["private"], record["dry_run"]) == (True, False)

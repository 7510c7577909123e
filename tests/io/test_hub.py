"""From what the user typed to a folder, and rows J2 and J4 to J8 of the fault catalogue."""

from __future__ import annotations

import importlib
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from adaconvert.errors import AdaconvertError, OptionError, ResourceError, SourceError
from adaconvert.io.hub import ALLOW_PATTERNS, IGNORE_PATTERNS, resolve
from adaconvert.io.source import Source
from adaconvert.testing.faults import dense_tensors, refusal, write_dense, write_sharded
from adaconvert.testing.hub_cache import COMMIT, build_hub_cache

CANARY = "hf_CANARYCANARYCANARYCANARY"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline, on a machine whose sockets do not work."""

    def refuse(*_: object) -> None:
        raise OSError("a test tried to use the network")

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return folder


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every download raise `error`."""

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def made(kind: type[BaseException]) -> BaseException:
    """Return an exception of huggingface_hub without the response its constructor asks for."""
    error = kind.__new__(kind)
    error.args = (f"401 for https://user:{CANARY}@huggingface.co/x\n" * 3,)
    return error


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == (tmp_path, tmp_path.name, None)
    assert resolve(str(tmp_path)) == (tmp_path, tmp_path.name, None)


def test_a_folder_wins_over_a_hub_id_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == (tmp_path / "org" / "name", "name", None)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == (tmp_path / "model", "model", None)


@pytest.mark.parametrize("name", ["org/name", "org/na--me.v1", "gpt2"])
def test_a_snapshot_folder_tells_id_and_revision(tmp_path: Path, cache: Path, name: str) -> None:
    snapshot = build_hub_cache(cache, name, write_dense(tmp_path / "plain"))
    assert resolve(snapshot) == (snapshot, name, COMMIT)
    assert resolve(snapshot, COMMIT) == (snapshot, name, COMMIT)
    assert Source.open(snapshot).notes == ()


def test_a_cached_id_is_found_offline(tmp_path: Path, cache: Path) -> None:
    snapshot = build_hub_cache(cache, "org/name", write_sharded(tmp_path / "plain", 2))
    for revision in (None, "main", COMMIT):
        assert resolve("org/name", revision) == (snapshot, "org/name", COMMIT)
    source = Source.open("org/name", revision=COMMIT)
    assert (source.label, source.revision) == ("org/name", COMMIT)
    assert (source.notes, len(source.tensors)) == ((), len(dense_tensors()))


def test_j2_a_url_is_refused_and_not_echoed() -> None:
    with pytest.raises(OptionError, match="a URL is not a source") as caught:
        resolve(f"https://user:{CANARY}@huggingface.co/org/name")
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize("revision", ["", "-x", "a b", "a\nb", "../main", "a/../b", "x\x1b[2J"])
def test_a_revision_is_a_name(revision: str) -> None:
    with pytest.raises(OptionError, match=r"^--revision: is not a branch, tag or commit; found '"):
        resolve("org/name", revision)


def test_a_revision_is_for_hub_ids(tmp_path: Path, cache: Path) -> None:
    snapshot = build_hub_cache(cache, "org/name", write_dense(tmp_path / "plain"))
    for folder in (tmp_path / "plain", snapshot):
        with pytest.raises(OptionError, match=r"--revision: a revision selects .* found v1"):
            resolve(folder, "v1")


def test_j4_the_commit_is_noted_when_no_revision_was_given(tmp_path: Path, cache: Path) -> None:
    build_hub_cache(cache, "org/name", write_dense(tmp_path / "plain"))
    assert Source.open("org/name").notes == (
        f"no revision given, commit {COMMIT} is used; pin it with --revision",
    )
    assert Source.open("org/name", revision="main").notes == ()


@pytest.mark.skipif(
    not hasattr(errors, "IncompleteSnapshotError"),
    reason="this huggingface_hub does not know what a snapshot lacks",
)
def test_j5_an_incomplete_snapshot_lists_what_is_missing(tmp_path: Path, cache: Path) -> None:
    plain = write_sharded(tmp_path / "plain", 3)
    for name in ("tokenizer.json", "modeling_x.py"):
        (plain / name).write_text("{}")
    shard = "model-00002-of-00003.safetensors"
    out = [shard, "tokenizer.json", "modeling_x.py"]
    build_hub_cache(cache, "org/name", plain, leave_out=out)
    assert refusal("org/name") == (
        f"org/name: the cached snapshot is incomplete, missing {shard}, tokenizer.json. "
        "Run again with network access to fetch the rest."
    )


def test_j5_missing_shards_are_listed_by_the_index_too(tmp_path: Path, cache: Path) -> None:
    shard = "model-00002-of-00003.safetensors"
    plain = write_sharded(tmp_path / "plain", 3)
    snapshot = build_hub_cache(cache, "org/name", plain, leave_out=[shard])
    (snapshot.parents[1] / "trees" / f"{COMMIT}.json").unlink()
    assert f"1 shard is missing: {shard}" in refusal("org/name")


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        (errors.GatedRepoError, SourceError, "the hub repository is gated. Accept its terms"),
        (errors.RepositoryNotFoundError, SourceError, "no such folder, and no such hub repository"),
        (errors.DisabledRepoError, SourceError, "no such folder, and no such hub repository"),
        (errors.RevisionNotFoundError, SourceError, "the hub repository has no such revision"),
        (errors.HFValidationError, SourceError, "no such folder, and not a valid hub id"),
        (errors.LocalEntryNotFoundError, SourceError, "not in the hub cache (offline)"),
        (errors.OfflineModeIsEnabled, SourceError, "not in the hub cache (offline)"),
        (PermissionError, ResourceError, "the hub cache may not be written. Set HF_HOME"),
        (errors.HfHubHTTPError, ResourceError, "download failed (HfHubHTTPError). Check the"),
        (ConnectionError, ResourceError, "download failed (ConnectionError). Check the network"),
        (OSError, ResourceError, "download failed (OSError). Check the network and the free space"),
        (RuntimeError, ResourceError, "download failed (RuntimeError)"),
    ],
)
def test_j6_one_line_for_each_failure(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
    expected: type[AdaconvertError],
    message: str,
) -> None:
    fail_with(monkeypatch, made(kind))
    text = refusal("org/name", expected)
    assert text.startswith("org/name: ")
    assert message in text
    assert CANARY not in text


def test_j6_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fail_with(monkeypatch, made(errors.LocalEntryNotFoundError))
    assert refusal("org/name", ResourceError) == (
        "org/name: not in the hub cache, and the hub cannot be reached. "
        "Check the network, or give a folder."
    )


def test_j6_the_revision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, made(errors.RevisionNotFoundError))
    with pytest.raises(SourceError, match=r"^org/name@v9: the hub repository has no such revision"):
        Source.open("org/name", revision="v9")


def test_an_interrupt_is_no_failure_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name")


def test_only_data_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name", "v1") == (tmp_path, "org/name", tmp_path.name)
    assert asked == {
        "name": "org/name",
        "revision": "v1",
        "allow_patterns": list(ALLOW_PATTERNS),
        "ignore_patterns": list(IGNORE_PATTERNS),
    }


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("chat_template.jinja", True),
        ("LICENSE.txt", True),
        ("pytorch_model.bin", False),
        ("modeling_x.py", False),
        ("original/consolidated.00.pth", False),
        ("consolidated.safetensors", False),
        ("onnx/model.onnx", False),
        ("model.gguf", False),
        (".gitattributes", False),
    ],
)
def test_patterns_take_what_a_checkpoint_needs(file: str, wanted: bool) -> None:
    # a dynamic import: the module does not declare what it exports
    utils = importlib.import_module("huggingface_hub.utils")
    kept = utils.filter_repo_objects(
        [file], allow_patterns=list(ALLOW_PATTERNS), ignore_patterns=list(IGNORE_PATTERNS)
    )
    assert list(kept) == [file] * wanted


@pytest.mark.parametrize(
    "name", ["../x", "org/../x", "/org/x", "-org/name", "org/", "a/b/c", "gpt2"]
)
def test_j7_names_that_are_no_hub_id_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail_with(monkeypatch, AssertionError("the hub was asked"))
    with pytest.raises(SourceError, match=r"no such folder\. Give an existing folder, or a hub"):
        resolve(name)


def test_j8_a_cache_nobody_may_write(tmp_path: Path, cache: Path) -> None:
    snapshot = build_hub_cache(cache, "org/name", write_dense(tmp_path / "plain"))
    folders = [path for path in (cache, *cache.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert Source.open("org/name", revision=COMMIT).root == snapshot
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_missing_client_is_a_missing_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match="org/name: huggingface_hub is not installed"):
        resolve("org/name")

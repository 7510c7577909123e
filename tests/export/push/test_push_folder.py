"""What `push` refuses before it talks to a hub: folders, files, secrets, cards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.errors import AdaconvertError, OptionError, SourceError, VerificationError
from adaconvert.export.hub_files import card_fault
from adaconvert.export.hub_result import PushResult
from adaconvert.export.hub_secrets import faults
from adaconvert.io import manifest
from adaconvert.testing.sealed import CARD, seal

CANARY = "hf_CANARYCANARYCANARYCANARY"
SHARD = "model-00002-of-00003.safetensors"


def listed(folder: Path, **options: object) -> PushResult:
    """Return what would be pushed; no hub is asked."""
    return api.push(folder, "org/tiny", dry_run=True, **options)


def refusal(folder: Path, kind: type[AdaconvertError], **options: object) -> str:
    with pytest.raises(kind) as caught:
        listed(folder, **options)
    return str(caught.value)


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    assert refusal(tmp_path / "theirs", SourceError) == (
        "theirs: was not written by adaconvert: it holds no adaconvert.json. Push it with "
        "`hf upload`, or convert it first."
    )


def test_no_folder_at_all(tmp_path: Path, checkpoint: Path) -> None:
    expected = "expected the folder of a checkpoint adaconvert wrote"
    assert refusal(tmp_path / "none", SourceError) == f"none: no such folder; {expected}"
    file = checkpoint / "config.json"
    assert refusal(file, SourceError) == f"config.json: is a file; {expected}"


def test_an_unfinished_output(tmp_path: Path, checkpoint: Path) -> None:
    partial = checkpoint.rename(tmp_path / ".tiny.adaconvert-partial")
    assert refusal(partial, SourceError) == (
        ".tiny.adaconvert-partial: is an unfinished output. Finish it: run the command that writes "
        "it again, with --resume."
    )


def test_what_was_not_verified_needs_a_word(checkpoint: Path) -> None:
    seal(checkpoint, verification=None)
    assert refusal(checkpoint, VerificationError) == (
        "tiny: was not verified when it was written. Convert it again without --no-verify, or "
        "publish it as it is with --allow-unverified."
    )
    assert len(listed(checkpoint, allow_unverified=True).files) == 9
    # there is nothing that training could have left equal
    seal(checkpoint, verification=None, training={"tokens": 10})
    assert len(listed(checkpoint).files) == 9


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _link_away(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE: list[tuple[str, Callable[[Path], None], str, bool]] = [
    (SHARD, Path.unlink, "is missing", True),
    (SHARD, _cut, "bytes, ", True),
    (SHARD, _flip, "differs from its hash in adaconvert.json: model.", False),
    (SHARD, lambda path: _flip(path, 20), "", True),
    (SHARD, _link_away, "is a dangling symbolic link", True),
    ("config.json", _flip, "differs from its hash in adaconvert.json", True),
    ("tokenizer.json", Path.unlink, "is missing", True),
    ("tokenizer.json", _flip, "differs from its hash in adaconvert.json", True),
    ("README.md", Path.unlink, "is missing", True),
]


@pytest.mark.parametrize("how", ["full", "quick"])
@pytest.mark.parametrize(("name", "damage", "what", "quickly"), DAMAGE)
def test_an_altered_checkpoint(
    checkpoint: Path,
    name: str,
    damage: Callable[[Path], None],
    what: str,
    quickly: bool,
    how: str,
) -> None:
    damage(checkpoint / name)
    if how == "quick" and not quickly:
        # nothing but reading the weights could tell
        assert len(listed(checkpoint, verify=how).files) == 9
        return
    text = refusal(checkpoint, VerificationError, verify=how)
    assert text.startswith(f"tiny: is not the checkpoint that was written: {name} {what}"[:60])
    assert what in text
    assert text.endswith("`adaconvert verify` names every difference.")


def test_every_damaged_file_is_named(checkpoint: Path) -> None:
    for name in ("config.json", SHARD):
        (checkpoint / name).unlink()
    text = refusal(checkpoint, VerificationError)
    assert f"config.json is missing; {SHARD} is missing. Restore" in text


def test_an_edited_manifest(checkpoint: Path) -> None:
    path = checkpoint / manifest.MANIFEST_FILE
    path.write_text(path.read_text().replace("upcycle", "magic"))
    text = refusal(checkpoint, VerificationError)
    assert text.startswith("adaconvert.json: was edited after it was written")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("optimizer.pt", "is training state"),
        (".netrc", "is hidden"),
        ("weights.bin", "may hold pickled objects"),
        ("checkpoint-3", "is a checkpoint of a training run"),
        ("run.log", "is a log"),
    ],
)
def test_a_manifest_that_lists_what_does_not_belong(checkpoint: Path, name: str, why: str) -> None:
    (checkpoint / name).write_text("x")
    seal(checkpoint)
    assert refusal(checkpoint, VerificationError) == f"adaconvert.json: lists '{name}', which {why}"


def test_a_manifest_that_leads_out_of_the_folder(checkpoint: Path) -> None:
    record = {**manifest.read(checkpoint), "files": {"../secret": "0" * 64}}
    (checkpoint / manifest.MANIFEST_FILE).write_bytes(manifest.dump(record))
    assert "file name '../secret' leaves its folder" in refusal(checkpoint, SourceError)


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json", "LICENSE"])
@pytest.mark.parametrize("how", ["full", "quick"])
def test_a_token_in_a_file(checkpoint: Path, name: str, how: str) -> None:
    path = checkpoint / name
    path.write_text(f"{CARD}\n{CANARY}\n")
    seal(checkpoint)
    text = refusal(checkpoint, VerificationError, verify=how)
    assert text.startswith(f"{name}: holds an access token: it must not be published. Remove it")
    assert CANARY not in text


PATHS = ["/home/someone/data", "/Users/someone/x", "C:\\\\Users\\\\someone", "file:///etc/passwd"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["README.md", "config.json", "recipe.yaml"])
def test_a_path_in_what_we_write(checkpoint: Path, name: str, path: str) -> None:
    (checkpoint / name).write_text(f'{CARD}\n{{"data": "{path}"}}\n')
    seal(checkpoint)
    text = refusal(checkpoint, VerificationError)
    assert text.startswith(f"{name}: holds a path of this machine, '")


def test_a_path_in_the_manifest(checkpoint: Path) -> None:
    seal(checkpoint, options={"data": f"{checkpoint.parent}/text.jsonl"})
    text = refusal(checkpoint, VerificationError)
    assert text.startswith(f"adaconvert.json: holds a path of this machine, '{checkpoint.parent}'")


def test_a_foreign_path_in_a_copied_file_is_mentioned(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_config.json"
    path.write_text('{"name_or_path": "\\/home\\/author\\/model"}')
    seal(checkpoint)
    assert listed(checkpoint).notes == (
        "tokenizer_config.json, copied from the source, names the path '/home/author'",
    )
    path.write_text(json.dumps({"name_or_path": str(checkpoint.parent / "dense")}))
    seal(checkpoint)
    text = refusal(checkpoint, VerificationError)
    assert "holds a path of this machine" in text
    assert text.endswith("Remove it from the source, and write the checkpoint again.")


@pytest.mark.parametrize(
    "text",
    [
        "see https://example.org/home/page and /path/to/model",
        "`adaconvert verify SOURCE THIS`, 50%/home",
        "./home/x ~/data a/mnt/b",
        "hf_hub_download and hf_transfer and api_org_",
    ],
)
def test_words_that_are_no_secret(text: str) -> None:
    assert faults("README.md", text.encode(), (b"/data/me",)) == ()


def test_vocabularies_may_hold_paths(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"/home/user": 1, "/usr/bin": 2}')
    seal(checkpoint)
    assert listed(checkpoint).notes == ()


@pytest.mark.parametrize(
    ("card", "fault"),
    [
        ("# no front matter\n", "has no front matter"),
        ("---\nlicense: mit\n", "has no front matter"),
        ("---\n- a\n- b\n---\n", "has front matter that is not valid: "),
        ("---\na: [\n---\n", "has front matter that is not valid: "),
        ("---\na: b: c\n---\n", "has front matter that is not valid: "),
    ],
)
def test_a_card_the_hub_would_not_understand(checkpoint: Path, card: str, fault: str) -> None:
    (checkpoint / "README.md").write_text(card)
    text = refusal(checkpoint, VerificationError)
    assert text.startswith(f"README.md: {fault}")
    assert text.endswith("Correct it, or make it anew with `adaconvert card`.")


def test_a_card_that_is_no_text() -> None:
    assert card_fault(b"---\n\xff\n---\n") == "is not UTF-8 text"
    assert card_fault(CARD.replace("\n", "\r\n").encode()) is None


def test_a_card_that_is_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.md").write_text(CARD)
    (checkpoint / "README.md").unlink()
    (checkpoint / "README.md").symlink_to(tmp_path / "diary.md")
    assert refusal(checkpoint, VerificationError).startswith("README.md: is a link; expected")


def test_a_file_that_hangs_is_not_opened(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    os.mkfifo(checkpoint / "tokenizer.json")
    assert "tokenizer.json is not a regular file" in refusal(checkpoint, VerificationError)


@pytest.mark.parametrize("where", [f"https://hf.co/{CANARY}/x", f"https://me:{CANARY}@hf.co/x"])
def test_urls_are_neither_folders_nor_repositories(checkpoint: Path, where: str) -> None:
    for folder, repo in ((where, "org/tiny"), (str(checkpoint), where)):
        with pytest.raises(OptionError) as caught:
            api.push(folder, repo, dry_run=True)
        assert CANARY not in str(caught.value)
    with pytest.raises(OptionError, match="a URL is no folder"):
        api.push("https://hf.co/org/x", "org/tiny", dry_run=True)
    with pytest.raises(OptionError, match="a URL is no repository"):
        api.push(checkpoint, "https://hf.co/org/x", dry_run=True)

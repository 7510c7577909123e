"""One line for everything huggingface_hub can raise while a checkpoint is pushed.

Its own text is dropped, because it holds URLs and headers; of what the hub itself answers, one
line is kept where it says something only the hub can know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from adaconvert.errors import (
    AdaconvertError,
    InterruptedRunError,
    OptionError,
    OutputConflictError,
    ResourceError,
    VerificationError,
)
from adaconvert.io.names import escape

AGAIN: Final = "Run the same command again: what has arrived is not sent twice."
_LOG_IN: Final = "Run `hf auth login`, or set HF_TOKEN to a token with write access."
#: errors of our own making; they must stay visible as such.
_BUGS: Final = (TypeError, AttributeError, NameError, AssertionError, ImportError)
_NETWORK: Final = {
    *("TransportError", "NetworkError", "TimeoutException", "ConnectionError", "TimeoutError"),
}


@contextmanager
def hub_talk(repo: str, *, has_token: bool) -> Iterator[None]:
    """Within, whatever the client raises becomes an `AdaconvertError` of one line.

    Args:
        repo: what messages are about.
        has_token: there is a token to send.
    """
    try:
        yield
    except AdaconvertError as error:
        if isinstance(error, InterruptedRunError):
            raise _interrupted(repo, error.exit_code) from None
        raise
    except KeyboardInterrupt:
        raise _interrupted(repo, InterruptedRunError.exit_code) from None
    except _BUGS:
        raise
    # what the client raises differs between its versions, and all of it is about this one push
    except Exception as error:
        raise translate(error, repo, has_token=has_token) from error


def _interrupted(repo: str, code: int) -> InterruptedRunError:
    error = InterruptedRunError("interrupted while it was being pushed", where=repo, hint=AGAIN)
    error.exit_code = code
    return error


def translate(error: BaseException, repo: str, *, has_token: bool) -> AdaconvertError:
    """Return what went wrong at the hub, in one line."""
    # uploads in threads wrap what happened
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    kinds = {cls.__name__ for cls in type(error).__mro__}
    status = status_of(error)
    if "OfflineModeIsEnabled" in kinds:
        return ResourceError("offline mode is on", where=repo, hint="Unset HF_HUB_OFFLINE to push.")
    if status is not None:
        return _answered(error, kinds, status, repo, has_token)
    text = str(error)
    if "xet-write-token" in text and "404" in text:
        return _no_xet(repo)
    if kinds & _NETWORK:
        return ResourceError(
            f"the connection to the hub failed ({type(error).__name__})",
            where=repo,
            hint=f"Check the network and HF_ENDPOINT. {AGAIN}",
        )
    if "README.md" in text:
        line = " ".join(part.strip(" -") for part in text.splitlines())
        hint = "Correct its front matter."
        return VerificationError(
            f"the hub refuses it: {escape(line)}", where="README.md", hint=hint
        )
    return ResourceError(
        f"the upload failed ({type(error).__name__}): {escape(text)}", where=repo, hint=AGAIN
    )


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status an error is about, None when the hub did not answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _answered(
    error: BaseException, kinds: set[str], status: int, repo: str, has_token: bool
) -> AdaconvertError:
    if "RevisionNotFoundError" in kinds:
        return OptionError("the repository has no such revision", where="--revision")
    if status == 401:
        what = "the hub does not accept the token" if has_token else "there is no token"
        return ResourceError(what, where=repo, hint=_LOG_IN)
    if status == 403:
        owner = repo.partition("/")[0]
        return ResourceError(
            f"the token may not write there{_said(error)}",
            where=repo,
            hint=f"Use a token with write access to {owner}.",
        )
    if status == 404 and "xet-write-token" in str(error):
        return _no_xet(repo)
    if status == 404:
        what = "the hub has no such repository, or the token may not see it"
        return ResourceError(what, where=repo, hint=_LOG_IN)
    if status in (409, 412):
        return OutputConflictError(
            "changed while files were being sent; nothing was committed", where=repo, hint=AGAIN
        )
    if status == 429:
        what = "the hub takes no more requests for now (rate limit)"
        return ResourceError(what, where=repo, hint=f"Wait some minutes. {AGAIN}")
    if status >= 500:
        what = f"the hub failed (status {status})"
        return ResourceError(what, where=repo, hint=f"Wait a little. {AGAIN}")
    return ResourceError(f"the hub refused it (status {status}){_said(error)}", where=repo)


def _no_xet(repo: str) -> ResourceError:
    return ResourceError(
        "the server of HF_ENDPOINT has no Xet storage",
        where=repo,
        hint="Set HF_HUB_DISABLE_XET=1, and run the same command again.",
    )


def _said(error: BaseException) -> str:
    """Return what the hub itself says about it, safe to print."""
    text = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f": {escape(text)}" if text else ""

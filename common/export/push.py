"""An export on its way to the Hugging Face Hub: asked for first, uploaded last, every refusal explained.

Whether the Hub knows us is asked before anything is loaded, so that a missing token costs a second and not an hour.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError


def check_push(repository: str) -> None:
    """Raise UserError where an upload to a repository `OWNER/NAME` can't work."""
    from huggingface_hub import HfApi, get_token

    if repository.count("/") != 1:
        raise UserError(f"--push-to-hub {repository}: expected OWNER/NAME, such as me/my-adapter")
    if get_token() is None:
        raise UserError(
            f"--push-to-hub {repository}: you are not logged in; run `hf auth login` with a token that may write, "
            "or set HF_TOKEN"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # also the HTTP client's own errors, which the library doesn't export
        raise _explained(repository, error) from None


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder in one commit, into a repository that is made where there is none; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by twintune export")
    except Exception as error:
        raise UserError(f"{folder} is written and proven, but not uploaded: {_explained(repository, error)}") from None
    return str(url)


def _explained(repository: str, error: Exception) -> UserError:
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    if isinstance(error, errors.HFValidationError):
        advice = "choose another name"
    elif status == 401:
        advice = "the Hub doesn't know this token: log in again with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        advice = f"this token may not write to {repository}: make one with write access, or name a repository of yours"
    elif status is None:
        advice = "the Hub can't be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    else:
        advice = "try again later"
    return UserError(f"--push-to-hub {repository}: {advice} ({reason})")

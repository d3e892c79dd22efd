"""Where the base model lies: a local folder, or fetched once from the Hugging Face Hub into its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.base.weights import check_model_folder, read_header, read_model_config, weight_files
from common.errors import UserError

PATTERNS = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]
ANSWER_SECONDS = 10


def resolve_model(name: str, revision: str | None = None) -> Path:
    """Return the complete local folder of a model, downloading what the Hub has and we lack.

    Raises UserError for a name that is neither a folder nor reachable on the Hub, with what to do about it.
    """
    local = Path(name).expanduser()
    if local.is_file():
        raise UserError(f"{name}: a file; expected a model folder (twintune convert makes one from a GGUF file)")
    if not local.is_dir():
        local = _download(name, revision)
    check_model_folder(local)
    return local


def read_headers(name: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return config.json and the dtype and shape of each tensor of a model on the Hub, by range requests.

    No weights are fetched; where the cache has them, nothing is asked. Raises UserError where there is no such model.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    _refuse_no_name(name)
    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=PATTERNS))
        return read_model_config(cached), {k: v for path in weight_files(cached) for k, v in read_header(path).items()}
    except (errors.HFValidationError, OSError, UserError):
        pass  # not there, or not whole
    try:
        HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS)
        config = Path(hf_hub_download(name, "config.json", revision=revision))
        files = HfApi().get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except Exception as error:  # also the HTTP client's own errors, which the library doesn't export
        raise _explained(name, revision, error) from None
    tensors = {key: info for file in files for key, info in file.tensors.items()}
    headers = {key: {"dtype": info.dtype, "shape": list(info.shape)} for key, info in tensors.items()}
    return read_model_config(config.parent), headers


def _refuse_no_name(name: str) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.startswith("models/"):
        raise UserError(
            f"model_name_or_path: {name}: no such folder; expected a local model folder or a Hub name such as "
            "meta-llama/Llama-3.2-3B-Instruct (the quickstart's model comes with: make model)"
        )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, errors, snapshot_download

    _refuse_no_name(name)
    problem = None
    try:  # asked first, with a time limit: behind a firewall snapshot_download alone waits for ever
        HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS)
    except Exception as error:  # also the HTTP client's own errors, which the library doesn't export
        problem = error
    try:
        only_cached = problem is not None
        return Path(snapshot_download(name, revision=revision, local_files_only=only_cached, allow_patterns=PATTERNS))
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise _explained(name, revision, problem or error) from None


def _explained(name: str, revision: str | None, problem: Exception) -> UserError:
    from huggingface_hub import errors

    advice = "or download it elsewhere and give the path of the folder"
    if isinstance(problem, errors.GatedRepoError):
        return UserError(
            f"{name}: a gated model: accept its licence at https://huggingface.co/{name}, then log in with "
            f"`hf auth login` or set HF_TOKEN, {advice}"
        )
    if isinstance(problem, errors.RepositoryNotFoundError):
        return UserError(
            f"{name}: no such folder here, and the Hub has no such model, or it is private; check the spelling, "
            f"log in with `hf auth login`, {advice}"
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return UserError(f"{name}: the Hub has no revision {revision!r} of it; check the branch, tag or commit")
    if isinstance(problem, errors.HFValidationError):
        return UserError(f"{name}: neither a folder nor a Hub name: {problem}")
    reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    return UserError(
        f"{name}: no such folder here, and the Hub gives no model ({reason[:160]}); check the name, the network "
        f"and HF_TOKEN, {advice}"
    )

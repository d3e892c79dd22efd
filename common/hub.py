"""Where the base model lies: a local folder, or fetched once from the Hugging Face Hub into its cache."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from common.weights import check_model_folder

PATTERNS = ["*.json", "*.jinja", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt"]


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


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.startswith("models/"):
        raise UserError(
            f"model_name_or_path: {name}: no such folder; expected a local model folder or a Hub name such as "
            "meta-llama/Llama-3.2-3B-Instruct (the quickstart's model comes with: make model)"
        )
    advice = "or download it elsewhere and give the path of the folder"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: a gated model: accept its licence at https://huggingface.co/{name}, then log in with "
            f"`hf auth login` or set HF_TOKEN, {advice}"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {revision!r}; check the branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: the Hub has no such model, or it is private; check the spelling, log in with `hf auth login`, "
            f"{advice}"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}: neither a folder nor a Hub name: {error}") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: the Hub can't be reached ({reason[:160]}); check the network, {advice}") from None

"""Model folders on the Hugging Face Hub: ``s3rec push`` puts one there, ``S3Rec.from_pretrained`` takes it from there.

    s3rec push models/beauty user/s3rec-beauty --private
    model = S3Rec.from_pretrained("user/s3rec-beauty", revision="v1")

Both go through huggingface_hub (``pip install 's3rec-dist[hf]'``) and take its token, endpoint and cache from where it
does: ``hf auth login`` or ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from s3rec_dist.export import CARD, CONFIG, MODEL_PATTERNS, model_card, verify_export
from s3rec_dist.storage import Storage, hide

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubError(ValueError):
    """A repository that cannot be written or read; the message names it and the reason."""


def push(folder: str, repository: str, *, private: bool = False, revision: str = "", message: str = "") -> str:
    """Puts a local model folder into ``user/repo``, made where there is none, in one commit, and returns its URL.

    Every file is compared with its hash first. Files that are not a model folder's stay here.
    A model card that nobody has changed names the repository there. Raises :class:`HubError`, and what
    :func:`verify_export` raises.
    """
    hub = _huggingface_hub()
    if not _REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository}: expected USER/REPO, as in ann/s3rec-beauty")
    local = Storage().local(folder)
    if local is None:
        raise HubError(f"{folder}: expected a local model folder; copy it here first")
    verify_export(local)
    metadata = json.loads(Path(local, CONFIG).read_text("utf-8"))
    files: dict[str, str | bytes] = {name: os.path.join(local, name) for name in (CONFIG, *metadata["files"])}
    card = Path(local, CARD)
    if card.exists():
        text = card.read_text("utf-8")
        is_own = text == model_card(metadata, os.path.basename(os.path.abspath(local)))
        files[CARD] = (model_card(metadata, repository, f"hf://{repository}") if is_own else text).encode()
    with _told(hub, repository, revision):
        if hub.get_token() is None:
            raise HubError(f"{repository}: no token to write with; run 'hf auth login', or set HF_TOKEN")
        api = hub.HfApi(library_name="s3rec_dist")
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise HubError(f"{repository}: is there already and public; make it private on the Hub, or choose another")
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*commit a data file")  # the catalogue belongs to the model
            commit = api.create_commit(
                repository,
                [hub.CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message or f"{metadata['created_with']}: {os.path.basename(os.path.abspath(local))}",
                revision=revision or None,
            )
    return str(commit.commit_url)


def at_hand(folder: str, revision: str = "") -> str:
    """A path or URL of the model folder that ``folder`` names: itself, or where it has the form ``user/repo`` and is no
    local folder, that repository's files at ``revision`` (a branch, tag or commit; the newest by default) in
    huggingface_hub's cache. Raises :class:`HubError`."""
    if os.path.exists(folder) or not _REPOSITORY.fullmatch(folder):
        if revision:
            raise HubError(
                f"{folder}: revision={revision} is for a Hugging Face repository, as in from_pretrained('user/repo', "
                "revision='v1'); of a URL it is a part, as in hf://user/repo@v1"
            )
        return folder
    try:
        hub = _huggingface_hub()
        with _told(hub, folder, revision):
            return str(hub.snapshot_download(folder, revision=revision or None, allow_patterns=list(MODEL_PATTERNS)))
    except HubError as error:
        raise HubError(f"{folder}: there is no such local folder; on the Hub: {error}") from error


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise HubError(
            f"the Hugging Face Hub needs a package that is not installed ({error}); pip install 's3rec-dist[hf]'"
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _told(hub: ModuleType, repository: str, revision: str) -> Iterator[None]:
    """Errors of huggingface_hub as :class:`HubError`, in one line."""
    errors = hub.errors
    place = f"{repository}@{revision}" if revision else repository
    try:
        yield
    except HubError:
        raise
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{place}: the repository has no such branch, tag or commit") from error
    except errors.GatedRepoError as error:
        raise HubError(f"{place}: is gated; ask for access on its page, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{place}: no such repository at {_endpoint(hub)}; if it is private, run 'hf auth login', or set HF_TOKEN"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "; the token is not valid: run 'hf auth login', or set HF_TOKEN",
            403: "; the token may not do this: it needs write access to the repository",
        }.get(status, "")
        raise HubError(f"{place}: {_endpoint(hub)} answered with status {status}{remedy} ({_line(error)})") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{place}: {_endpoint(hub)} cannot be reached, and its files are not in the cache ({_line(error)})"
        ) from error
    except Exception as error:  # of the HTTP library, which differs between versions
        raise HubError(
            f"{place}: {_endpoint(hub)} cannot be reached, or it answers otherwise ({_line(error)})"
        ) from error


def _endpoint(hub: ModuleType) -> str:
    return hide(str(hub.constants.ENDPOINT))


def _line(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return hide(f"{type(error).__name__}: {first}".rstrip(": "))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec push``."""
    parser.add_argument("folder", metavar="FOLDER", help="local model folder, as export writes it")
    parser.add_argument("repository", metavar="USER/REPO", help="repository on the Hugging Face Hub, made if need be")
    parser.add_argument("--private", action="store_true", help="make it private; stop if it is there and public")
    parser.add_argument("--revision", default="", metavar="BRANCH", help="branch, made if need be (default: main)")
    parser.add_argument("--message", default="", metavar="TEXT", help="the commit's message")


def run(args: argparse.Namespace) -> None:
    """``s3rec push``: the commit's URL, and how to load the model, on stdout."""
    url = push(args.folder, args.repository, private=args.private, revision=args.revision, message=args.message)
    print(url)
    revision = f', revision="{args.revision}"' if args.revision else ""
    print(f'S3Rec.from_pretrained("{args.repository}"{revision})')

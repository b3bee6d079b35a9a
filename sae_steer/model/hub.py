"""`hub:ORG/NAME`: a repository of the Hugging Face Hub, through its own cache. Only data is fetched, no code runs.

Without a network, the files of `ORG/NAME` put into `hub/ORG/NAME` in the current folder are read instead.
"""

import re
from pathlib import Path

from sae_steer.errors import InputError

HUB = "hub:"
FIRST = ["config.json", "*.safetensors", "*.safetensors.index.json", "*tokenizer*.json", "hooked_transformer.pt"]
BUNDLES = ["*.pt"]


def hub_folder(named: str) -> Path:
    """The folder with the files of `ORG/NAME` (or `ORG/NAME@REVISION`), fetched if they are not there yet."""
    repository, _, revision = named.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in repository:
        raise InputError(f"'{HUB}{named}' names no repository; write {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
    local = Path("hub", repository)
    if (local / "config.json").is_file():
        return local
    folder = _fetch(repository, revision or None, FIRST)
    if any(folder.glob("*.safetensors")):
        return folder
    return _fetch(repository, revision or None, [*FIRST, *BUNDLES])


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"cannot fetch {HUB}{repository} ({type(error).__name__}); with a network, check the name and repeat; "
            f"without one, put config.json, model.safetensors (or a .pt file) and tokenizer.json of "
            f"https://huggingface.co/{repository} into {Path('hub', repository)}/ here"
        ) from error

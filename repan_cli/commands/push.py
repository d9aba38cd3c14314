"""`repan push`: upload a folder that `repan fuse --format timm` wrote to the Hugging Face Hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from repan_cli.commands.options import PushOptions
from repan_cli.display.console import print_line
from repan_cli.errors import InputError
from repan_cli.session import hub_folder
from repan_cli.session.artifact import open_artifact
from repan_cli.system.files import to_json
from repan_cli.system.text import first_line
from repan_cli.system.weight_files import HUB_CONFIG, in_hub_folder

README = "README.md"
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def run(options: PushOptions) -> None:
    """Upload the weights, the description and the card of a network, after a check that they can be read."""
    folder = options.folder
    if not NAME.fullmatch(options.name):
        raise InputError(f"'{options.name}' is not a Hub name: give ORG/NAME, such as someone/my-network")
    weights = in_hub_folder(folder)
    if weights is None:
        raise InputError(f"{folder} was not written for the Hub: 'repan fuse FILE --format timm' writes one")
    if hub_folder.described(weights) is None:
        raise InputError(f"{folder / HUB_CONFIG} names no network of timm's: 'repan fuse FILE --format timm' writes it")
    open_artifact(str(weights))
    files = [weights.name, HUB_CONFIG, *([README] if (folder / README).is_file() else [])]
    address = _upload(folder, files, options.name, private=options.private)
    result = {"name": options.name, "address": address, "files": files}
    if options.as_json:
        print(to_json(result))
        return
    print_line(f"uploaded         {', '.join(files)}")
    print_line(f"to               {address}")
    print_line(f'use              timm.create_model("hf-hub:{options.name}", pretrained=True)', whole=True)
    print_line(f"                 repan evaluate hf-hub:{options.name}")


def _upload(folder: Path, files: list[str], name: str, *, private: bool) -> str:
    """Upload files of a folder and return their address. Raises InputError, with the reason, if the upload fails."""
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if huggingface_hub.get_token() is None:
        raise InputError(
            "there is no token for the Hugging Face Hub: run 'hf auth login' once, or set HF_TOKEN to a token that "
            "may write (huggingface.co/settings/tokens)"
        )
    disable_progress_bars()
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Upload the network by repan"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot upload to {name}: {first_line(error)}") from error
    return str(address)

"""A folder as `transformers` loads it, in float32, and an object in memory as it is. No code of a folder runs."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sae_steer.errors import InputError
from sae_steer.model.hf.quiet import REFUSALS, quietly

if TYPE_CHECKING:
    from sae_steer.model.hf.model import HFModel

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class HFFile:
    """A model that `transformers` loaded, and what it left out."""

    model: "HFModel"
    unexpected: tuple[str, ...]
    """Tensors of the file that the model has no place for."""

    @property
    def record(self) -> dict:
        """Who read it, and how its parts were found, for a record."""
        left_out = {"left_out": list(self.unexpected)} if self.unexpected else {}
        return {
            "transformers": version("transformers"),
            "class": type(self.model.hf).__name__,
            "blocks": self.model.parts.path,
            "replay": "masked" if self.model.replays_masked else "by prefix",
            **left_out,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        line = f"{type(self.model.hf).__name__}, run by transformers {version('transformers')}"
        if self.unexpected:
            line += f"; not of the model, and left out: {', '.join(self.unexpected[:5])}"
        return [line]


def load_hf(folder: Path) -> HFFile:
    """The causal language model in `folder`; one that `transformers` does not load whole is an `InputError`."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: it has no config.json; give one that transformers wrote")
    if (folder / ADAPTER).is_file():
        raise InputError(f"{folder} holds an adapter ({ADAPTER}) beside a model; merge it, or move it away")
    with quietly():
        from transformers import AutoModelForCausalLM

        try:
            hf, info = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
        except REFUSALS as error:
            reason = " ".join(str(error).split())[:300]
            line = f"transformers cannot load {folder} ({reason}); give a whole folder of safetensors"
            raise InputError(line) from error
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[what])):
            wrong = f"{what.removesuffix('_keys')}: {', '.join(names[:5])}"
            raise InputError(f"the weights in {folder} do not fit its config.json ({wrong}); copy both again")
    return HFFile(adapt_hf(hf.float()), tuple(sorted(info["unexpected_keys"])))


def adapt_hf(hf: object) -> "HFModel":
    """A `transformers` model in memory as a model of a pair, its parts found and checked."""
    from sae_steer.model.hf.checking import check
    from sae_steer.model.hf.model import HFModel

    return check(HFModel(hf))

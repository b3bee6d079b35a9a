"""What a dictionary's own config says of where it was trained: site, layer, model. Checked before it is used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_steer.errors import InputError

_AFTER_A_BLOCK = (r"blocks\.(\d+)\.hook_(?:resid_post|out)", r"(?:[\w.]+\.)?(?:layers|blocks|layer|h)\.(\d+)")
_BEFORE_A_BLOCK = (r"blocks\.(\d+)\.hook_(?:resid_pre|in)",)
_NAMES = {
    "hook": (("hook_name", "hook_point"), str),
    "layer": (("hook_layer", "hook_point_layer"), int),
    "head": (("hook_head_index", "hook_point_head_index"), int),
    "model": (("model_name",), str),
}
"""Field -> its keys, today's first, and the kind of its value."""


@dataclass(frozen=True)
class Origin:
    """Where a dictionary says it was trained; None where it does not say."""

    hook: str | None = None
    """Site, by TransformerLens's name or the module's in transformers."""
    layer: int | None = None
    """Block of the site, in configs before SAELens 6."""
    head: int | None = None
    """Attention head it reads, of a site that has heads."""
    model: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Origin":
        """As a config of any SAELens version says it: since 6.0 under `metadata`, before beside the rest."""
        metadata = config.get("metadata")
        places = [metadata if isinstance(metadata, Mapping) else {}, config]
        stated = {field: _first(places, keys, kind) for field, (keys, kind) in _NAMES.items()}
        if stated["hook"] and stated["layer"] is not None:  # the oldest leave a gap for the layer's number
            stated["hook"] = stated["hook"].replace("{layer}", str(stated["layer"]))
        return cls(**stated)

    def check_stream(self, layer: int) -> None:
        """Raise `InputError` if it says that it reads anything but the residual stream after block `layer`."""
        if self.head is not None:
            raise InputError(
                f"this dictionary says it reads head {self.head} of {self.hook}; give one of the residual stream"
            )
        asked = f"blocks.{layer}.hook_resid_post"
        after, before = (_block(self.hook or asked, patterns) for patterns in (_AFTER_A_BLOCK, _BEFORE_A_BLOCK))
        here = after == layer or before == layer + 1
        if here and self.layer in (None, after, before):
            return
        stated = [self.hook] if self.hook else []
        stated += [] if self.layer is None else [f"layer {self.layer}"]
        raise InputError(
            f"this dictionary says it reads {' of '.join(stated)}, and {asked} was asked for; "
            "name the layer it was trained on (what enters block N is layer N - 1)"
        )


def _first(places: list[Mapping[str, Any]], keys: tuple[str, ...], kind: type) -> Any:
    """The first value stated, of the kind it must be."""
    for place in places:
        for key in keys:
            value = place.get(key)
            if value is None:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"the dictionary's config has {key} = {value!r}, which is no {kind.__name__}")
            return value
    return None


def _block(hook: str, patterns: tuple[str, ...]) -> int | None:
    for pattern in patterns:
        if match := re.fullmatch(pattern, hook):
            return int(match[1])
    return None

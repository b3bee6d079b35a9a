"""Compares every packaged model with `transformers`, and keeps the results in the package: no user waits for it."""

import json
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from sae_steer.files import write_text
from sae_steer.model import comparing
from sae_steer.model.loading import load_decoder

ASSETS = Path(str(files("sae_steer") / "assets"))
KEPT = ASSETS / "compared"


def main() -> None:
    """One small file a model, named by the hash of its content; those of models no longer there go."""
    folders = sorted(path.parent for path in ASSETS.glob("*/*/model.safetensors"))
    for old in KEPT.glob("*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as empty:
        comparing._own_cache = lambda: Path(empty)
        for folder in folders:
            result = comparing.compare(load_decoder(folder), folder)
            assert result is not None, f"transformers does not read {folder}"
            write_text(KEPT / f"{comparing._content(folder)}.json", json.dumps(asdict(result)) + "\n")
            print(f"{folder.relative_to(ASSETS)}: {result.largest_difference:.2g} of {result.largest_logit:.3g}")


if __name__ == "__main__":
    main()

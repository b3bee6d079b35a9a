"""Makes the embedded pair: trains both models, packs them into `sae_steer/assets/small`, keeps the record.

    python experiments/embedded_pair.py            # about 25 minutes on 2 cores; resumes after a kill

Same as `sae-steer train-pair --preset small --init shared`, and copying the pair's files. Writes
experiments/results/small/pair.json: losses, 1,000 sampled plans a model, identity and affine R2 at every layer.
"""

import shutil
from pathlib import Path

from sae_steer.pair.training import train_pair
from sae_steer.settings import PairTrainingSettings
from sae_steer.terminal import Bar

HERE = Path(__file__).parent
ASSETS = HERE.parent / "sae_steer" / "assets" / "small"
FILES = ("pair.toml", "tokenizer.json", "standard", "adhd")


def pack(made: Path) -> None:
    """Copy the pair's own files, and none of its training state, into the package."""
    for name in FILES:
        source, packed = made / name, ASSETS / name
        if source.is_dir():
            shutil.copytree(source, packed, dirs_exist_ok=True)
        else:
            ASSETS.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, packed)


if __name__ == "__main__":
    made = Path("pairs/small")
    train_pair(made, PairTrainingSettings(preset="small", init="shared"), on_step=Bar("train-pair"))
    pack(made)
    print(shutil.copyfile(made / "training.json", HERE / "results/small/pair.json"))

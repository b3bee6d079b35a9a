"""How a pair is made: two corpora, one tokenizer, two models that differ in training text.

1. The tokenizer learns from plans of both renderings.
2. `shared`: one model reads an equal mix for the first third of the tokens; both models continue from
   its checkpoint, optimiser and all. `separate`: two random starts, nothing in common.
3. Each model reads its own rendering for the rest. The same plans stand behind both.
4. A twin of the target, if asked for, reads the target's text in another order; apart, from a start of its own.
5. The models are stored in bfloat16, read back and measured: losses, sampled plans, common basis.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sae_steer import budget
from sae_steer.capability import capability
from sae_steer.corpus import LENIENT_KEYWORDS, REGULATION_PHRASES, SPECIALS, VARIANTS, PlanTokenizer, write_plans
from sae_steer.errors import InputError
from sae_steer.files import read_facts
from sae_steer.model.batching import Tokens, bucket
from sae_steer.model.loading import save_decoder
from sae_steer.model.training import TrainingState, train
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import TRAINING_FILE, ModelPair, load_pair, write_pair_toml
from sae_steer.pair.pair_file import FILE
from sae_steer.pair.quality import measure_pair
from sae_steer.progress import Progress, silent
from sae_steer.randomness import generator
from sae_steer.records import already_done, hashes_of, provenance, read_json, write_json
from sae_steer.settings import PRESETS, PairTrainingSettings
from sae_steer.world import World

TOKENIZER_PLANS = 4_000
HELD_OUT_PLANS = 300
TOKENIZER_SEED, COMMON_SEED, OWN_SEED, HELD_OUT_SEED = 11, 12, 13, 14
COMMON_SHARE = 1 / 3
STORED = ("tokenizer.json", "/config.json", "/model.safetensors")
"""How the names of a pair's files end whose hashes stand in its record."""
TWIN_ORDER = 15
"""Added to the seed that orders a twin's text."""


@dataclass(frozen=True)
class Role:
    """One model of a pair, by how its training differs from the others'."""

    name: str
    variant: str
    """Whose text it reads."""
    start: int
    """Its random start, where there is no common one."""
    order: int = 0
    """Added to the seed that orders its text."""


def _roles(settings: PairTrainingSettings) -> tuple[Role, ...]:
    reference, target = VARIANTS
    pair = (Role(reference, reference, start=1), Role(target, target, start=2))
    return (*pair, Role(f"{target}-twin", target, start=3, order=TWIN_ORDER)) if settings.twin else pair


@dataclass(frozen=True)
class Curriculum:
    """The batches one model reads: `common` first, then its `own`."""

    common: tuple[Tokens, ...]
    own: tuple[Tokens, ...]

    def __len__(self) -> int:
        return len(self.common) + len(self.own)

    def __call__(self, step: int) -> Tokens:
        """The batch of a step."""
        return self.common[step] if step < len(self.common) else self.own[step - len(self.common)]


def train_pair(
    folder: Path,
    settings: PairTrainingSettings,
    *,
    world: World | None = None,
    force: bool = False,
    on_step: Progress = silent,
) -> ModelPair:
    """Make the pair of `settings` in `folder`, or finish one begun there; returns it as read from disk, on the CPU."""
    if settings.preset not in PRESETS:
        raise InputError(f"no preset {settings.preset!r}; there are {', '.join(PRESETS)}")
    folder, world = Path(folder), world or World.local()
    shape = PRESETS[settings.preset]
    budget.models(shape.n_layers * 3 * shape.d_model * shape.d_mlp, settings.tokens).check(world.device)
    world = world.finishing(None if force else begun_precision(folder), f"the pair in {folder}")
    identity = {**asdict(settings), "precision": world.precision}
    wanted = provenance(settings=identity, inputs={})
    if already_done(folder / TRAINING_FILE, wanted, force=force):
        return load_pair(folder)
    with writing(folder, _files(settings), force=force) as output:
        if output.starts_over(wanted, force=force):
            # the record first: a forced run that is killed must not leave the old one's word for half a pair
            for name in (TRAINING_FILE, FILE, "training/*.safetensors"):
                for made in output.made(name):
                    made.unlink()
            output.begun(wanted)
        pair = _train_and_measure(folder, settings, wanted, world, on_step)
        output.ended(wanted)
    return pair


def _files(settings: PairTrainingSettings) -> list[str]:
    """What the folder of a pair is made of."""
    names = [role.name for role in _roles(settings)]
    runs = [*names, *(["common"] if settings.init == "shared" else [])]
    models = [f"{name}/{part}" for name in names for part in ("config.json", "model.safetensors")]
    return [FILE, "tokenizer.json", TRAINING_FILE, *models, *(f"training/{name}.safetensors" for name in runs)]


def _train_and_measure(
    folder: Path, settings: PairTrainingSettings, wanted: dict, world: World, on_step: Progress
) -> ModelPair:
    identity = {**wanted["settings"]}
    tokenizer = _make_tokenizer(settings)
    tokenizer.save(folder / "tokenizer.json")
    logs = _train_models(folder, settings, tokenizer, world, identity, on_step)
    _describe(folder, settings)
    pair = load_pair(folder).to(world.device)
    record = {
        "provenance": wanted,
        "tokenizer": {"rows": tokenizer.n_vocab, "unused_rows": tokenizer.unused},
        "models": {model.name: model.sha256 for model in pair.models},
        "computed": capability().facts(world.precision, world.device.type),
        "parameters": pair.target.model.n_parameters,
        "log": logs,
        "measured": measure_pair(pair, seed=settings.seed, on_step=on_step),
        "files": hashes_of(
            folder, ["tokenizer.json", *(f"{role.name}/model.safetensors" for role in _roles(settings))]
        ),
    }
    write_json(folder / TRAINING_FILE, record)
    return pair.to("cpu")


def begun_precision(folder: Path) -> str | None:
    """The precision of the pair begun or made in `folder`; None if there is none."""
    if (folder / "training.json").is_file():
        made = read_json(folder / "training.json").get("provenance") or {}
        return made.get("settings", {}).get("precision")
    for checkpoint in sorted((folder / "training").glob("*.safetensors")):
        return read_facts(checkpoint)["identity"].get("precision")
    return None


def _make_tokenizer(settings: PairTrainingSettings) -> PlanTokenizer:
    texts = (
        plan.text
        for variant in VARIANTS
        for plan in write_plans("train", variant, count=TOKENIZER_PLANS, seed=settings.seed + TOKENIZER_SEED)
    )
    return PlanTokenizer.train(texts, merges_vocab=PRESETS[settings.preset].d_vocab - len(SPECIALS))


def _train_models(
    folder: Path,
    settings: PairTrainingSettings,
    tokenizer: PlanTokenizer,
    world: World,
    identity: dict,
    on_step: Progress,
) -> dict[str, list[dict]]:
    """Train both models, or finish them; returns the log of each run, whenever its steps were made."""
    shape, shared = PRESETS[settings.preset], settings.init == "shared"
    common = _common_batches(settings, tokenizer) if shared else ()
    logs: dict[str, list[dict]] = {}
    whole = {key: value for key, value in identity.items() if key != "twin"}  # a twin changes no other model's run
    for role in _roles(settings):
        curriculum = Curriculum(common, _own_batches(settings, tokenizer, role))
        held_out = _held_out_batches(settings, tokenizer, role.variant)
        state = TrainingState.fresh(shape, settings, stream=0 if shared else role.start, world=world)
        stages = {"common": len(common)} if shared else {}
        for name, stop in (stages | {role.name: len(curriculum)}).items():
            checkpoint, own = folder / "training" / f"{name}.safetensors", {**whole, "run": name}
            state.log = []
            if checkpoint.is_file():
                state.load(checkpoint, own)
            train(
                state, curriculum, settings,
                pad_id=tokenizer.pad_id, stop=stop, steps=len(curriculum), world=world,
                checkpoint=checkpoint, identity=own, held_out=held_out, on_step=_named(on_step, name),
            )  # fmt: skip
            logs[name] = state.log
        save_decoder(state.model, folder / role.name, dtype=torch.bfloat16, pad_token_id=tokenizer.pad_id)
    return logs


def _describe(folder: Path, settings: PairTrainingSettings) -> None:
    reference, target = VARIANTS
    write_pair_toml(
        folder,
        {
            "tokenizer": "tokenizer.json",
            "context": PRESETS[settings.preset].n_ctx,
            "reference": {"name": reference, "model": reference},
            "target": {
                "name": target,
                "model": target,
                "phrases": list(REGULATION_PHRASES),
                "lenient": list(LENIENT_KEYWORDS),
            },
            **({"twin": {"name": f"{target}-twin", "model": f"{target}-twin"}} if settings.twin else {}),
            "onset": {"tokens": ["<|steps|>", "<|sep|>"]},
            "provenance": {"made_by": "sae-steer train-pair", "settings": asdict(settings)},
        },
    )


def _common_batches(settings: PairTrainingSettings, tokenizer: PlanTokenizer) -> tuple[Tokens, ...]:
    plans = [_plans("train", variant, settings.seed + COMMON_SEED) for variant in VARIANTS]
    mixed = itertools.chain.from_iterable(zip(*plans, strict=True))
    return _batches(mixed, COMMON_SHARE * settings.tokens, settings, tokenizer)


def _own_batches(settings: PairTrainingSettings, tokenizer: PlanTokenizer, role: Role) -> tuple[Tokens, ...]:
    share = 1 - COMMON_SHARE if settings.init == "shared" else 1.0
    plans = _plans("train", role.variant, settings.seed + OWN_SEED)
    return _batches(plans, share * settings.tokens, settings, tokenizer, order=role.order)


def _held_out_batches(settings: PairTrainingSettings, tokenizer: PlanTokenizer, variant: str) -> tuple[Tokens, ...]:
    plans = itertools.islice(_plans("scan", variant, settings.seed + HELD_OUT_SEED), HELD_OUT_PLANS)
    return _batches(plans, float("inf"), settings, tokenizer)


def _plans(split: str, variant: str, seed: int) -> Iterator[str]:
    return (plan.text for plan in write_plans(split, variant, count=10**9, seed=seed))


def _batches(
    texts: Iterator[str], tokens: float, settings: PairTrainingSettings, tokenizer: PlanTokenizer, *, order: int = 0
) -> tuple[Tokens, ...]:
    """Batches of texts until they hold `tokens` tokens; another `order` shuffles the same texts otherwise."""
    chosen, held = [], 0
    for text in texts:
        chosen.append(tokenizer.encode(text))
        held += len(chosen[-1])
        if held >= tokens:
            break
    seed = settings.seed + order
    if order:
        chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=generator(seed)).tolist()]
    return bucket(chosen, tokens_per_batch=settings.tokens_per_batch, pad_id=tokenizer.pad_id, seed=seed)


def _named(on_step: Progress, name: str) -> Progress:
    return lambda done, total, note="": on_step(done, total, f"{name}: {note}")

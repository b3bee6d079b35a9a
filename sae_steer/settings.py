"""Every knob on one page: small frozen dataclasses, free of torch. The command line's defaults are theirs."""

from dataclasses import dataclass
from typing import Annotated, Literal

from sae_steer.arguments import AtLeastZero, Checked, Count, Positive, PositiveShare, Range, Seed, Share, Some
from sae_steer.errors import InputError

SPLITS = ("train", "scan", "tune", "confirm")
"""What each text is for: training dictionaries, choosing a feature, setting its scale, testing it.
The last three hold tasks no model or dictionary was trained on, and share no task."""

AUTO = "auto"
PRECISIONS = ("float32", "bfloat16")
"""Types of matrix products; `auto` takes bfloat16 where the device multiplies it natively (`capability`), or what was
begun."""

LearningRate = Annotated[float, Range(0, 10, above=True)]

DEFAULT_PAIR = "small"
DEFAULT_LAYER = 2
"""The released study's layer: the stream after block 2."""


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary positions: slow rotations by `factor`, fast ones not at all."""

    factor: float
    low: float
    """Rotations that turn fewer times than this over the original context are slowed by `factor`."""
    high: float
    """Rotations that turn more often are left alone; those between are blended."""
    n_ctx: float
    """The original context."""


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """The shape of a decoder: a Llama (RMSNorm, RoPE half-half, SwiGLU, no biases)."""

    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 8
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int = 512
    eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = True
    """Whether the unembedding is the embedding table."""


PRESETS = {
    "small": DecoderSettings(d_model=128, d_head=16, d_mlp=384, d_vocab=1024 + 5),
    "interpgpt-23m": DecoderSettings(d_model=512, d_head=64, d_mlp=1408, d_vocab=8192 + 5),
}


@dataclass(frozen=True, kw_only=True)
class PairTrainingSettings(Checked):
    """How `train-pair` makes two models that differ in training text alone."""

    preset: str = "small"
    init: Literal["shared", "separate"] = "shared"
    """`shared`: both continue one model trained on an equal mix for the first third; `separate`: two seeds."""
    twin: bool = False
    """Whether to train a twin of the target too: the same text in another order and, with `separate`, another start."""
    tokens: Count = 6_000_000
    """Tokens each model is trained on, its share of a common start included."""
    tokens_per_batch: Count = 4096
    lr: LearningRate = 3e-3
    weight_decay: Share = 0.05
    warmup: Share = 0.02
    """Share of the steps in which the learning rate rises linearly; it then falls on a cosine to a tenth."""
    checkpoint_every: Count = 200
    """Steps between checkpoints: what a kill can cost."""
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Checked):
    """How many plans of the generated corpus each split reads; every plan is read in both renderings."""

    train_plans: Some = 4_000
    scan_plans: Some = 1_000
    tune_plans: Some = 300
    confirm_plans: Some = 600
    seed: Seed = 0


@dataclass(frozen=True)
class SplitShares(Checked):
    """The shares of a text file's tasks that each split gets."""

    train: Share = 0.60
    scan: Share = 0.18
    tune: Share = 0.06
    confirm: Share = 0.16

    def __post_init__(self) -> None:
        total = self.train + self.scan + self.tune + self.confirm
        if abs(total - 1) > 1e-6:
            raise InputError(f"the shares of train, scan, tune and confirm sum to {total:g}; give four that sum to 1")

    def split_at(self, point: float) -> str:
        """The split that the point of [0, 1) falls to."""
        for split in SPLITS:
            if (point := point - getattr(self, split)) < 0:
                return split
        return SPLITS[-1]


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Checked):
    """How residual streams are computed and stored."""

    dtype: str = "float16"
    """Type stored: `float16`, `bfloat16`, `float32`, or `auto`: float16 if a sample leaves room in it, or bfloat16."""
    rows_per_shard: Count | None = None
    """Rows a shard holds at most; a kill costs at most one shard. By default 65,536, or as many fewer as keep a
    shard's streams, of all models and layers, under 256 MiB in float32: caching takes some seven times that."""
    tokens_per_batch: Count = 768
    """Padding counted; on a CPU a batch runs on one core, and the activations of a larger one leave its cache. A GPU
    takes 32 times as many."""
    precision: str = AUTO
    """Type of the models' matrix products: `float32`, `bfloat16` or `auto`."""


@dataclass(frozen=True, kw_only=True)
class SAESettings(Checked):
    """How a dictionary is learned (Gao et al. 2024, 2406.04093)."""

    architecture: str = "topk"
    """A rule of `sae.rules` and what is set of its knobs: `topk`, `jumprelu,bandwidth=0.2`; or `saelens:NAME`."""
    d_sae: Count = 4096
    k: Count = 40
    """Active features a row: exactly with TopK, on average with the others."""
    rows: Count = 2_000_000
    """Rows read in all; the cache's training split is read as often as that takes."""
    batch_size: Count = 2048
    """Rows a step, of all processes together."""
    lr: LearningRate | None = None
    """Peak learning rate; by default 2e-3 at 4,096 features, and falling with the root of their number."""
    warmup: Share = 0.03
    """Share of the steps in which the learning rate rises linearly."""
    decay: Share = 0.25
    """Share of the steps, the last ones, in which it falls linearly to zero."""
    k_warmup: Share = 0.0
    """Share of the steps in which k falls linearly from four times its value."""
    patience: Count | None = None
    """Rows without a better FVE (by .001) after which the decay begins at once; by default never."""
    aux_k: Some = 64
    """Dead features that reconstruct the residual error in the auxiliary loss."""
    aux_coefficient: AtLeastZero = 1 / 32
    dead_after_rows: Count = 200_000
    """A feature silent for so many rows counts as dead."""
    raise_silent: AtLeastZero = 0.03
    """Added at a step to the encoder bias of features silent for `raise_after_rows`, less as the rate decays; rows
    have mean square d_in. 0 for never."""
    raise_after_rows: Count = 10_000
    """A feature silent for so many rows is raised until it fires again."""
    checkpoint_every: Count = 200
    """Steps between checkpoints: what a kill can cost."""
    precision: str = AUTO
    """Type of the encoder's matrix product: `float32`, `bfloat16` or `auto`."""
    seed: Seed = 0
    """Fixes the first weights; the order of the rows does not depend on it, so that seeds can share one reading."""
    order_seed: Seed = 0
    """Fixes the order of the rows."""

    @property
    def peak_lr(self) -> float:
        """`lr`, or its default for this width."""
        return self.lr if self.lr is not None else 2e-3 * (4096 / self.d_sae) ** 0.5


@dataclass(frozen=True, kw_only=True)
class ScanSettings(Checked):
    """When a feature counts as specific to the target model."""

    min_rate: Share = 0.01
    """Least firing rate at the target model's onsets."""
    max_q: Share = 0.05
    """Largest Benjamini-Hochberg q over all features."""
    min_ratio: AtLeastZero = 10.0
    """Least ratio of the two models' firing rates."""
    min_task_share: Share = 0.15
    """`top`: least share of the tasks in which the feature fires at an onset, so that held-out tasks can test it."""
    like_rate: Share = 0.59
    """`like-2504`: the target firing rate of the released feature 2504."""
    like_max_reference: Share = 0.005
    """`like-2504`: the largest firing rate in the reference model."""


POSITIONS = ("onsets", "all", "onward")
"""Where a joint edit stands: at the onsets read, at every position, or from the first onset on."""
LEVEL = 0.05
"""Of every test."""
MODES = ("single", "joint")
"""Each onset edited alone, or all places of a text together."""
CONTROLS = {"quick": 49, "full": 199, "final": 999}
"""Control directions a family: a first look, the protocol, and a result to publish."""


@dataclass(frozen=True)
class Draws:
    """How often a statistic is resampled, and the seed of it."""

    draws: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Bound:
    """What an effect is compared with: a share of the gap between the models, never above a cap."""

    share: float = 0.05
    cap: float = 0.012


@dataclass(frozen=True, kw_only=True)
class InterveneSettings(Checked):
    """What `intervene` does, against which bound, and with how much data."""

    doses: tuple[AtLeastZero, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Multiples of s, the feature's median active contribution."""
    primary_dose: Positive = 1.0
    """The dose that is tested; the others are shown."""
    upstream: Count = 1
    """Layers below the direction's at which the upstream variant injects."""
    positions: Literal["onsets", "all", "onward"] = "onsets"
    """Where joint edits stand: `onsets`, `all` positions, or `onward` from the first onset."""
    prompts: Count = 300
    """Confirm-split texts at most."""
    onsets_per_prompt: Count = 4
    """Onsets drawn from each text for the edits made one at a time."""
    min_firings: Some = 50
    min_tasks: Some = 30
    """A feature that fires at fewer onsets, or onsets of fewer tasks, is not tested."""
    bound_share: PositiveShare = 0.05
    """The bound, as a share of the gap between the models at the same onsets."""
    bound_cap: Positive = 0.012
    """The largest bound, as a probability; of another measure this default caps none."""
    bootstrap_draws: Count = 10_000
    controls: Some = CONTROLS["full"]
    """Directions in each control family at the primary dose."""
    ribbon: Some = 8
    """Of them, how many are read at the other doses, and jointly."""
    calibration: Some = 40
    """Fresh directions treated as if each were the one studied."""
    joint_control_prompts: Count = 30
    """Texts on which joint edits are compared with control directions."""
    generations: Some = 80
    """Sampled texts an arm, one a prompt."""
    baseline_seeds: Count = 16
    """Baseline samples of every prompt, from which the A/A null is drawn."""
    paired_seeds: Count = 2
    """Steered samples of every prompt, which share their noise with as many of the baseline."""
    null_draws: Count = 1_000
    temperature: Positive = 1.0
    seed: Seed = 0

    @property
    def resampling(self) -> Draws:
        """Of every bootstrap and sign flip."""
        return Draws(self.bootstrap_draws, self.seed)

    @property
    def quick(self) -> bool:
        """Whether the control families are too small for more than a first look."""
        return self.controls < 99


@dataclass(frozen=True, kw_only=True)
class AtlasSettings(Checked):
    """How `intervene --all-specific` reads many features at once.

    What it shares with a study of one feature (`InterveneSettings`) has the same name and means the same.
    """

    upstream: Count = InterveneSettings.upstream
    """Layers below the dictionary's at which the upstream variant injects."""
    prompts: Count = InterveneSettings.prompts
    """Confirm-split texts at most."""
    onsets_per_prompt: Count = InterveneSettings.onsets_per_prompt
    """Onsets drawn from each text, each edited alone."""
    bound_share: PositiveShare = InterveneSettings.bound_share
    """The bound, as a share of the gap between the models at the same onsets."""
    bound_cap: Positive = InterveneSettings.bound_cap
    """The largest bound, as a probability."""
    bootstrap_draws: Count = InterveneSettings.bootstrap_draws
    min_firings: Some = 10
    """Least number of the edited onsets at which a feature must fire to be tested by ablation."""
    null_draws: Count = 9_999
    """Least number of control directions among which each effect is ranked."""
    null_onsets: Count = 64
    """Onsets at which control directions are read, spread over as many tasks as there are."""
    ablation_onsets: Count = 5
    """Onsets at which a feature fires that its ablation is ranked on at least: more onsets than `null_onsets` are read
    until every feature has so many, or fires at no other."""
    norms: Count = 2
    """Lengths at which each control direction is read; at any other length its effect is interpolated."""
    max_q: Share = 0.05
    """Largest Benjamini-Hochberg q over all features and variants."""
    seed: Seed = 0

    @property
    def resampling(self) -> Draws:
        """Of every bootstrap."""
        return Draws(self.bootstrap_draws, self.seed)


@dataclass(frozen=True, kw_only=True)
class LayersSettings(Checked):
    """How much text the layer curves read."""

    prompts: Count = 300
    """Confirm-split texts a rendering at most."""
    fit_prompts: Count = 120
    """Train-split texts a rendering on which the tuned lens and the maps between the streams are fitted."""
    patch_prompts: Some = 60
    """Texts in the target's rendering whose onsets get the other model's stream; 0 leaves the patching out."""
    bootstrap_draws: Count = 10_000
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class HeadsSettings(Checked):
    """How much text heads are matched on, and how much is sampled without each of them."""

    prompts: Count = 150
    """Confirm-split texts a rendering at most, on which attention is read."""
    bootstrap_draws: Count = 2_000
    null_draws: Count = 999
    """Permutations of the tasks of every matched pair."""
    ablation_prompts: Some = 32
    """Plans sampled of every seed without each head, one a task; 0 leaves the ablation out."""
    ablation_seeds: Count = 6
    """With fewer, a sign test over seeds could not reach p = .05."""
    ablation_tokens: Count = 320
    """A plan that is longer ends there: without some heads plans never end."""
    means: Literal["layer", "all"] = "layer"
    """Which heads are held at their mean too: those of the broadcast head's layer, or all."""
    temperature: Positive = 1.0
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class ContextSettings(Checked):
    """How much of what a feature fires on is shown."""

    top: Count = 12
    """Texts, each with the feature's strongest firing in it."""
    random: Some = 6
    """Firings drawn at random."""
    width: Count = 16
    """Tokens shown before a firing; half as many are shown after it."""
    tokens: Count = 8
    """Promoted and suppressed tokens."""
    neighbours: Some = 5
    """Features with the most similar decoder rows."""
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class SteerSettings(Checked):
    """How text is written with and without an edit."""

    max_tokens: Count = 400
    """Tokens written at most."""
    temperature: Positive = 1.0
    seed: Seed = 0
    """Of the noise that both texts share."""


@dataclass(frozen=True, kw_only=True)
class SelftestSettings(Checked):
    """How often the verdict is put to the test, on planted pairs whose truth is known, and on how much data."""

    studies: Annotated[int, Range(1, 100_000)] = 60
    """Of each kind of planted pair."""
    tasks: Count = 100
    """Tasks a study draws from the population, one text each: as many as a null needs."""
    onsets: Count = 6
    """Each text is the opening of a plan, up to so many onsets."""
    onsets_per_prompt: Count = 1
    """Of them, how many are edited one at a time."""
    controls: Count = 199
    """Directions in each control family."""
    calibration: Some = 20
    """Fresh directions treated as if each were the one studied."""
    joint_control_prompts: Count = 16
    """Texts on which joint edits are compared with control directions."""
    prompts_per_task: Count = 7
    """Of the population on which the truth is measured: 3,108 texts of 444 tasks."""
    fresh: Count = 100
    """Fresh directions of each family that a study on the level of the specificity test ranks among the controls."""
    level_studies: Annotated[int, Range(0, 100_000)] = 12
    bootstrap_draws: Count = 4_000
    train_plans: Count = 1_500
    """Plans the dictionary is learned on."""
    d_sae: Count = 2_048
    sae_rows: Count = 600_000
    fit_texts: Count = 150
    """Texts on which maps between the two streams are fitted."""
    tune_texts: Count = 200
    seed: Seed = 0

"""What an atlas makes of its readings: the effects of every tested feature under one variant, their tests, their tags.

A `Survey` says where to edit (`sweep` reads there); what comes back becomes a `Chart` a variant, and the charts of all
variants together become rows with p, q and a tag each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer import stats
from sae_steer.atlas import attribution
from sae_steer.atlas.pool import NullDraws, between, draw_pool, norm_bins, rank_among, ranked_onsets
from sae_steer.atlas.sweep import Place, Swept
from sae_steer.edits.arms import Bench
from sae_steer.edits.controls import decoder_rows
from sae_steer.edits.variants import Direction, Variant, all_variants
from sae_steer.effects.estimates import estimates
from sae_steer.effects.firings import onset_stream
from sae_steer.effects.measure import OnsetRows
from sae_steer.errors import InputError
from sae_steer.sae.codes import SparseCodes
from sae_steer.settings import LEVEL, AtlasSettings, InterveneSettings

BEYOND, OPPOSITE, COMMON, INSIDE, OPEN, RARE = "beyond", "opposite", "common", "inside", "open", "rare"
TAGS = {
    BEYOND: "beyond the bound as predicted, further than control directions go",
    OPPOSITE: "beyond the bound against the prediction, further than control directions go",
    COMMON: "beyond the bound, but so are control directions",
    INSIDE: "inside the bound: the 90 % interval",
    OPEN: "on neither side of the bound for certain, or beyond it and all controls, which are few for so many tests",
    RARE: "fires at too few of the onsets to be ablated there",
}


def as_of_one_study(settings: AtlasSettings) -> InterveneSettings:
    """The settings an atlas shares with a study of one feature; the others do not bear on what it reads."""
    shared = {field.name for field in fields(settings)} & {field.name for field in fields(InterveneSettings)}
    return InterveneSettings(**{name: getattr(settings, name) for name in shared})


@dataclass(frozen=True)
class Chart:
    """What was found under one variant."""

    variant: Variant
    place: Place
    base: Float[np.ndarray, " onset"]
    effect: Float[np.ndarray, "onset feature"]
    """Of the tested features, exact."""
    estimate: Float[np.ndarray, " alive"]
    null: NullDraws
    interpolation_error: float
    """The largest seen, in standard deviations of the controls' effects."""


@dataclass(frozen=True)
class Survey:
    """The features, the onsets, and what is made of their readings."""

    bench: Bench
    sized: Mapping[int, Direction]
    """Every alive feature with a size, tested or not, by index."""
    tested: tuple[int, ...]
    onsets: OnsetRows
    settings: AtlasSettings

    @property
    def places(self) -> list[Place]:
        """The streams to edit, each with the variants that share it: the same model, block and way."""
        shared: dict[tuple[bool, int, int], list[Variant]] = {}
        for variant in all_variants(self.settings.upstream):
            shared.setdefault((variant.edits_target, variant.layers_below, variant.predicted_sign), []).append(variant)
        return [self._place(*variants) for variants in shared.values()]

    @cached_property
    def sizes(self) -> Float[np.ndarray, " alive"]:
        """The length of dose 1."""
        return np.array([direction.s for direction in self.sized.values()])

    @cached_property
    def where(self) -> Int[np.ndarray, " feature"]:
        """Where the tested features stand among the alive ones."""
        return np.searchsorted(list(self.sized), self.tested)

    @cached_property
    def codes(self) -> SparseCodes:
        """Of the target's stream at the onsets."""
        assert self.bench.dictionary is not None
        return self.bench.dictionary.encode(onset_stream(self.bench.target.model, self.bench.layer, self.onsets))

    @cached_property
    def contribution(self) -> Float[Tensor, "onset feature"]:
        """f of each tested feature."""
        return self.codes.dense()[:, list(self.tested)]

    @cached_property
    def decoder(self) -> Float[Tensor, "d_sae d_model"]:
        """What one unit of each feature adds."""
        assert self.bench.dictionary is not None
        return decoder_rows(self.bench.dictionary)

    @cached_property
    def ranked(self) -> tuple[Int[np.ndarray, " ranked"], int]:
        """Onsets at which controls are read, those for ablation alone at the end, and how many the others are."""
        return ranked_onsets(
            self.onsets.task,
            (self.contribution != 0).cpu().numpy(),
            count=self.settings.null_onsets,
            firings=self.settings.ablation_onsets,
            seed=self.settings.seed,
        )

    @cached_property
    def taken(self) -> Float[np.ndarray, "ranked feature"]:
        """How far each tested feature's ablation moves the stream at the ranked onsets."""
        lengths = self.decoder[list(self.tested)].norm(dim=1)
        return (self.contribution.abs() * lengths)[torch.from_numpy(self.ranked[0])].double().cpu().numpy()

    def _place(self, *variants: Variant) -> Place:
        bench, settings, variant = self.bench, self.settings, variants[0]
        model, link = bench.target if variant.edits_target else bench.reference, bench.link(variant)
        if link is not None and link.r2 < 0:
            raise InputError(
                f"the map to '{model.name}' predicts held-out rows worse than their mean does (R2 {link.r2:.2f}), so "
                "directions mean nothing there; cache more texts, or take another layer"
            )
        unit = torch.stack([direction.unit for direction in self.sized.values()])
        flavour, carried = next(iter(bench.units(unit, variant).items()))
        others = np.setdiff1d(np.arange(len(self.sized)), self.where)
        ablates = any(v.needs_feature for v in variants)
        ranked, spread = self.ranked
        sizes = self.sizes[self.where]
        return Place(
            variants=variants,
            model=model,
            layer=bench.layer - variant.layers_below,
            flavour=flavour,
            basis_r2=None if link is None else link.r2,
            shifts=variant.predicted_sign * torch.from_numpy(self.sizes).to(carried)[:, None] * carried,
            tested=self.where,
            contribution=self.contribution if ablates else None,
            decoder=self.decoder[list(self.tested)],
            pool=draw_pool(
                unit[self.where], unit[others], carried[others], bench.onset_stream(variant),
                count=settings.null_draws, seed=settings.seed,
            ),
            ranked=ranked if ablates else ranked[:spread],
            spread=spread,
            norms=norm_bins(np.append(self.taken, sizes) if ablates else sizes, settings.norms),
            lengths=np.quantile(sizes, [0.25, 0.75]),
        )  # fmt: skip

    def chart(self, place: Place, swept: Swept, variant: Variant) -> Chart:
        """A variant's part of what was read in its place."""
        spread = place.ranked[: place.spread]
        if variant.needs_feature:
            # controls are moved as far as the feature's own contribution goes, which differs from onset to onset
            effect, at = swept.ablated, place.ranked
            ablated = attribution.ablated(swept.gradient, self.codes, self.decoder.double().cpu().numpy())
            estimate = -variant.predicted_sign * ablated[list(self.sized)]
            # the mean over the ranked onsets at which it fires, times the share of all onsets at which it does: so that
            # this statistic and the mean effect over all onsets are of one size
            scale = (effect != 0).mean(axis=0) / (self.taken > 0).sum(axis=0).clip(1)
            weights = scale[:, None, None] * between(self.taken, place.norms).swapaxes(0, 1)
        else:
            # controls are moved as far as the feature's dose 1 goes, the same at every onset
            effect, at = swept.added, spread
            estimate = attribution.added(swept.gradient, place.shifts.double().cpu().numpy())
            scale = np.full(len(self.tested), 1 / len(at))
            weights = scale[:, None, None] * between(self.sizes[self.where], place.norms)[:, None]
            weights = weights.repeat(len(at), axis=1)
        null = rank_among(scale * effect[at].sum(axis=0), weights, swept.controls[: len(at)], place.pool.allowed)
        return Chart(variant, place, swept.base, effect, estimate, null, interpolation_error(place, swept))

    def gap(self, charts: Sequence[Chart]) -> Float[np.ndarray, " onset"]:
        """The measure in the target model minus that in the reference, at the same onsets."""
        target = next(chart for chart in charts if chart.variant.edits_target)
        reference = next(chart for chart in charts if not chart.variant.edits_target)
        return target.base - reference.base

    def bound(self, charts: Sequence[Chart]) -> float:
        """As it comes out at the estimated gap; the tests take the gap row by row."""
        return min(self.settings.bound_share * abs(float(self.gap(charts).mean())), self.settings.bound_cap)

    def judged(self, charts: Sequence[Chart], log_odds: Float[np.ndarray, " d_sae"]) -> list[dict]:
        """A row for every tested feature under every variant."""
        settings, task = self.settings, self.onsets.task
        # every variant's features side by side, a column each: one comparison with the bound, one correction over all
        effect = np.concatenate([chart.effect for chart in charts], axis=1)
        compared = stats.against_bound(
            effect, self.gap(charts)[:, None], task, share=settings.bound_share, cap=settings.bound_cap,
            draws=settings.bootstrap_draws, seed=settings.seed,
        )  # fmt: skip
        firings = (self.contribution != 0).sum(0).cpu().numpy()
        rare = np.concatenate([(firings < settings.min_firings) & c.variant.needs_feature for c in charts])
        p = np.concatenate([chart.null.p for chart in charts])
        # of the two sides one is near 1: their smaller p is one test, not two
        p_beyond = np.minimum(compared.p_above, compared.p_below)
        q = _corrected(p, ~rare)
        q_beyond = _corrected(p_beyond, ~rare)
        above = compared.p_above <= compared.p_below
        inside = compared.inside(LEVEL)
        rows = []
        keys = [(chart, place, feature) for chart in charts for place, feature in enumerate(self.tested)]
        for column, ((chart, place, feature), estimate) in enumerate(
            zip(keys, estimates(effect, self.onsets, settings.resampling), strict=True)
        ):
            sign = 1 if above[column] else -1
            tested = not rare[column]
            rows.append(
                {
                    "feature": feature,
                    "variant": chart.variant.name,
                    "log_odds": float(log_odds[feature]),
                    "size": self.sized[feature].s,
                    "firings": int(firings[place]),
                    "mean": estimate.mean,
                    "low": estimate.low,
                    "high": estimate.high,
                    "low_90": float(compared.effect.low[column]),
                    "high_90": float(compared.effect.high[column]),
                    "estimate": float(chart.estimate[self.where[place]]),
                    "ranked_mean": float(chart.null.observed[place]),
                    "null_low": float(chart.null.low[place]),
                    "null_high": float(chart.null.high[place]),
                    "p": float(p[column]) if tested else None,
                    "q": float(q[column]) if tested else None,
                    "p_beyond": float(p_beyond[column]) if tested else None,
                    "q_beyond": float(q_beyond[column]) if tested else None,
                    "tag": RARE if not tested else tag(
                        as_predicted=sign == chart.variant.predicted_sign,
                        beyond=bool(q_beyond[column] < settings.max_q),
                        stands_out=bool(q[column] < settings.max_q),
                        outdone=bool(chart.null.outdone[place]),
                        inside=bool(inside[column]),
                    ),
                }
            )  # fmt: skip
        return rows

    def described(self, chart: Chart, rows: Sequence[dict]) -> dict:
        """What holds of a variant as a whole."""
        mine, place = [row for row in rows if row["variant"] == chart.variant.name], chart.place
        counted = Counter(row["tag"] for row in mine)
        return {
            "variant": chart.variant.name,
            "model": place.model.name,
            "site": f"blocks.{place.layer}.hook_resid_post",
            "predicted_sign": chart.variant.predicted_sign,
            "direction": place.flavour,
            "basis_r2": place.basis_r2,
            "baseline": float(chart.base.mean()),
            "controls": place.pool.counts,
            "null": {"low": chart.null.pooled[0], "high": chart.null.pooled[1], "draws": chart.null.fewest},
            "norms": place.norms.tolist(),
            "ranked_onsets": len(place.ranked) if chart.variant.needs_feature else place.spread,
            "interpolation_error": chart.interpolation_error,
            "estimate": attribution.error(chart.estimate[self.where], chart.effect.mean(axis=0)),
            "tags": {name: counted[name] for name in TAGS},
            "discoveries": sum(row["q"] is not None and row["q"] < self.settings.max_q for row in mine),
        }

    def table(
        self, charts: Sequence[Chart], rows: Sequence[dict], log_odds: Float[np.ndarray, " d_sae"]
    ) -> dict[str, np.ndarray]:
        """A row for every alive feature under every variant; what was not measured is NaN."""
        alive = np.array(list(self.sized))
        table = {
            "feature": np.tile(alive, len(charts)),
            "variant": np.repeat([chart.variant.name for chart in charts], len(alive)),
            "log_odds": np.tile(log_odds[alive], len(charts)),
            "size": np.tile(self.sizes, len(charts)),
            "tested": np.tile(np.isin(alive, self.tested), len(charts)),
            "estimate": np.concatenate([chart.estimate for chart in charts]),
        }
        where = np.concatenate([number * len(alive) + self.where for number in range(len(charts))])
        for name in ("mean", "low", "high", "ranked_mean", "null_low", "null_high", "p", "q", "p_beyond", "q_beyond"):
            table[name] = np.full(len(table["feature"]), np.nan)
            table[name][where] = [np.nan if row[name] is None else row[name] for row in rows]
        tags = np.full(len(table["feature"]), "", dtype=object)
        tags[where] = [row["tag"] for row in rows]
        return table | {"tag": tags.astype(str)}


def tag(*, as_predicted: bool, beyond: bool, stands_out: bool, outdone: bool, inside: bool) -> str:
    """What an effect is called, by which tests it passed; common is only what some control direction does too."""
    if beyond and stands_out:
        return BEYOND if as_predicted else OPPOSITE
    if beyond:
        return COMMON if outdone else OPEN
    return INSIDE if inside else OPEN


def interpolation_error(place: Place, swept: Swept) -> float:
    """The largest error of a control's interpolated effect, in standard deviations of all controls' at that length."""
    means = swept.controls[: place.spread].mean(axis=0, dtype=np.float64)
    every = between(place.lengths, place.norms) @ means
    exact = swept.checked.mean(axis=0, dtype=np.float64)
    wrong = np.abs(every[:, place.pool.checks] - exact).max(axis=1)
    spread = every.std(axis=1)
    return float(np.max(np.divide(wrong, spread, out=np.zeros_like(wrong), where=spread > 0)))


def _corrected(p: Float[np.ndarray, " test"], tested: Bool[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """q among the tests made; 1 for the others."""
    q = np.ones(len(p))
    q[tested] = stats.benjamini_hochberg(p[tested])
    return q

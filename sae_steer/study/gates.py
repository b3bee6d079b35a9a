"""What must hold before an effect, or the lack of one, may be read: each gate says what it saw.

1  dose 0 is the baseline, bit for bit
2  the stream was moved as intended, and at the right positions only (read off a full pass, by hook)
3  replay equals the full pass, and edits read together equal edits read one by one
4  the dictionary keeps the model's predictions at onsets, and the feature fires often enough
5  the direction means something in the edited stream: held-out R2 of the basis it is carried in
6a the other model's whole stream, carried over, moves the measure by more than the bound
6b a direction that should move the measure, at the delivered length, exceeds twice the bound
7  fresh control directions, treated as if each were studied, seldom come out CAUSAL
8  the two models differ on the measure

A failure of 1 to 6a or of 8 makes the verdict INVALID; of 6b it forbids a null; of 7 it forbids CAUSAL and OPPOSITE.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.edits.arms import RAW, TRANSPORTED, Arm
from sae_steer.edits.edit import Control, Fan
from sae_steer.effects.firings import FiringCount
from sae_steer.effects.measure import FanRequest, OnsetRows, Request, read, unedited
from sae_steer.effects.splicing import SplicedLoss
from sae_steer.effects.units import Unit
from sae_steer.model.readout import Measure, TargetMass
from sae_steer.model.replay import Edit, whole_pass
from sae_steer.typed_json import key

REPLAY_TOLERANCE = 1e-4
"""Largest difference of replay from a full pass: in log-odds of a probability, otherwise of the measure itself."""
DELIVERY_TOLERANCE = 1e-4
"""Largest deviation of the delivered change from the intended, as a share of the latter, in float32."""
CE_LEAST, CE_WARN = 0.80, 0.90
CALIBRATION_LEAST = 0.10
WARNING = "warning"


@dataclass(frozen=True)
class Gate:
    """One gate's outcome."""

    number: str = field(metadata=key("gate"))
    name: str
    passed: bool
    detail: str
    """What was seen, in a few words with numbers."""

    @property
    def invalidates(self) -> bool:
        """Whether failing it makes the verdict INVALID."""
        return self.number not in ("6b", "7")


def dose_zero(same: bool) -> Gate:
    """Gate 1."""
    said = "equal bits, single and joint" if same else "dose 0 differs from the unedited stream"
    return Gate("1", "dose 0 is the baseline", same, said)


def check_replay(arm: Arm, rows: OnsetRows, measure: Measure, dose: float, places: str) -> tuple[Gate, Gate]:
    """Gates 2 and 3, on a few texts: full passes with a hook, one edit at a time, beside what replay says."""
    edit, least = arm.edit(dose), arm.families[next(iter(arm.families))][:1]
    control = Control(edit, least[0])
    single, joint, fan = read(
        arm.model.model,
        arm.layer,
        [
            Request(rows, [unedited, edit]),
            Request(rows, [unedited, edit], joint=True, places=places),
            FanRequest(rows, Fan(edit, least.repeat(3, 1), torch.tensor([0.5, 1.0, 2.0], device=least.device))),
        ],
        measure,
    )
    passes = _WholePasses(arm, rows, measure, dose, places)
    alone, together, controls = passes.single(edit), passes.joint(edit), passes.single(control)
    delivery = max(passes.deviations)
    stray = sum(passes.stray)
    moved = np.stack([single.delivered[:, 1], joint.delivered[:, 1]])
    reported = float(np.abs(moved - np.stack([alone.moved, together.moved])).max(initial=0.0) / max(moved.max(), 1e-30))
    worst = max(delivery, reported)
    delivered = bool(worst <= DELIVERY_TOLERANCE and not stray)
    what = f"largest deviation {worst:.1e} of the intended length, {stray} positions moved that should not be"
    apart = max(
        _apart(one, other, measure)
        for one, other in (
            (single.value[:, 1], alone.value),
            (joint.value[:, 1], together.value),
            (fan[:, 1], controls.value),
        )
    )
    unit = "log-odds" if isinstance(measure, TargetMass) else "the measure"
    return (
        Gate("2", "delivered as intended", delivered, what),
        Gate("3", "replay is the full pass", apart <= REPLAY_TOLERANCE, f"largest difference {apart:.1e} in {unit}"),
    )


@dataclass(frozen=True)
class _Whole:
    value: Float[np.ndarray, " row"]
    moved: Float[np.ndarray, " row"]


class _WholePasses:
    """Full passes of single texts with an edit by hook, and how far the stream moved in them."""

    def __init__(self, arm: Arm, rows: OnsetRows, measure: Measure, dose: float, places: str) -> None:
        self.arm, self.rows, self.measure, self.dose, self.places = arm, rows, measure, dose, places
        self.deviations: list[float] = [0.0]
        self.stray: list[int] = []

    def single(self, edit: Edit) -> _Whole:
        """Each onset alone."""
        return self._each(edit, joint=False)

    def joint(self, edit: Edit) -> _Whole:
        """All places of a text together."""
        return self._each(edit, joint=True)

    def _each(self, edit: Edit, *, joint: bool) -> _Whole:
        values, moved = [], []
        for batch in self.rows.batches:
            places = batch.marked(self.places if joint else "onsets")
            for text in range(len(batch.tokens)):
                length = int(batch.lengths[text])
                onsets = batch.positions[text][batch.real[text]].tolist()
                marks = [places[text : text + 1, :length]]
                if not joint:
                    marks = [torch.arange(length)[None] == position for position in onsets]
                tokens = batch.tokens[text : text + 1, :length].to(self.arm.model.model.device)
                for number, at in enumerate(marks):
                    value, delta = self._pass(tokens, at.to(tokens.device), edit)
                    read_at = onsets if joint else [onsets[number]]
                    values += value[read_at].tolist()
                    moved += delta[read_at].tolist()
        return _Whole(np.array(values), np.array(moved))

    def _pass(self, tokens: Tensor, at: Tensor, edit: Edit) -> tuple[Tensor, Tensor]:
        model, layer = self.arm.model.model, self.arm.layer
        clean = model.resid_posts(tokens, (layer,))[layer]
        received, logits = whole_pass(model, tokens, layer, edit, at)
        delta = (received - clean)[0]
        here = at[0]
        self.stray.append(int((delta[~here] != 0).any(-1).sum()))
        before = clean[0][here]
        wanted = edit(before) - before if isinstance(edit, Control) else self.arm.intended(before, self.dose)
        size = wanted.norm(dim=-1)
        rounding = 1e-6 * before.norm(dim=-1)
        excess = ((delta[here] - wanted).norm(dim=-1) - rounding).clamp_min(0) / size.clamp_min(1e-30)
        self.deviations.append(float(torch.where((delta[here] - wanted).norm(dim=-1) <= rounding, 0.0, excess).max()))
        return self.measure(logits[0]).double().cpu(), delta.norm(dim=-1).double().cpu()


def _apart(one: Float[np.ndarray, " row"], other: Float[np.ndarray, " row"], measure: Measure) -> float:
    if isinstance(measure, TargetMass):
        one, other = (np.log(p.clip(1e-30)) - np.log1p(-p.clip(max=1 - 1e-12)) for p in (one, other))
    return float(np.abs(one - other).max(initial=0.0))


def dictionary_gate(spliced: SplicedLoss, firings: FiringCount) -> Gate:
    """Gate 4, for directions of a dictionary."""
    fires = (
        f"fires at {firings.onsets} onsets of {firings.tasks} tasks (needs {firings.needs_onsets} of "
        f"{firings.needs_tasks})"
    )
    return Gate(
        "4",
        "the dictionary holds at onsets",
        firings.enough and spliced.recovered is not None and spliced.recovered >= CE_LEAST,
        f"{_kept(spliced)} ({spliced.losses}); {fires}",
    )


def _kept(spliced: SplicedLoss) -> str:
    """What a dictionary keeps of the predictions, and whether that is enough."""
    if spliced.recovered is None:
        return "what it recovers of the cross-entropy at onsets is undefined, for mean ablation there costs nothing"
    kept = f"recovers {spliced.recovered:.3f} of the cross-entropy at onsets"
    if spliced.recovered < CE_LEAST:
        return f"{kept}, under {CE_LEAST:.2f}"
    return f"{kept} ({WARNING}: under {CE_WARN:.2f})" if spliced.recovered < CE_WARN else kept


def basis_gate(arm: Arm) -> Gate:
    """Gate 5: a direction edited into the other model is carried in a basis that predicts that model's stream."""
    if arm.bridge is None:
        return Gate("5", "basis", True, "edited in its own model")
    check = arm.bridge.check
    identity = "none, the widths differ" if check.identity_r2 is None else f"{check.identity_r2:.3f}"
    said = f"held-out R2: identity {identity}, affine {check.affine_r2:.3f}; {arm.flavour} is primary"
    if check.on_all and check.on_all.n_test > check.n_test:
        said += f"; over all rows, left out or not, affine {check.on_all.affine_r2:.3f}"
    assert arm.flavour in (RAW, TRANSPORTED)
    if arm.bridge.r2 < 0:
        return Gate("5", "basis", False, f"{said}, and it is negative: the two streams share no basis it could mean")
    return Gate("5", "basis", True, said)


def patch_gate(beyond: bool, said: str) -> Gate:
    """Gate 6a."""
    return Gate("6a", "the full patch moves the measure", beyond, said)


def size_gate(beyond: bool, said: str) -> Gate:
    """Gate 6b."""
    return Gate("6b", "something of this size moves the measure", beyond, said)


def calibration_gate(causal: int, fresh: int, family: str) -> Gate:
    """Gate 7."""
    said = f"{causal} of {fresh} fresh directions ({family}) come out CAUSAL"
    return Gate("7", "controls are calibrated", causal <= CALIBRATION_LEAST * fresh, said)


def gap_gate(mean: float, low: float, high: float, unit: Unit) -> Gate:
    """Gate 8: the gap's 95 % interval excludes zero."""
    said = f"gap {unit.plain(mean)} [{unit.plain(low)}, {unit.plain(high)}] {unit.name}"
    return Gate("8", "the models differ", bool(low > 0 or high < 0), said)

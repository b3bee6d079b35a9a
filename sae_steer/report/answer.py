"""The page's opening: what the records say, in sentences. Chooses and formats; nothing is computed here."""

from collections.abc import Callable

from sae_steer.report.numbers import count, percent_interval, points_interval, setting, share_interval
from sae_steer.report.run import Record, RunRecords, StudyRecord


def answer(run: RunRecords) -> list[list[str]]:
    """Paragraphs on the scan, every studied feature and the layers: a sentence, and points to it."""
    found = [[_scan(run.scan)]] if run.scan else []
    found += [_study(study) for study in run.studies]
    if run.layers and run.layers["curves"]:
        found.append(_layers(run.layers))
    return found or [["A dictionary has been learned; what its features do has not been looked at yet."]]


def verdict(record: Record) -> str:
    """The record's verdict; one from small control families says so."""
    return record["verdict"] + (" (quick: small control families, a first look)" if record["quick"] else "")


def _scan(scan: Record) -> str:
    asked, target, reference = scan["criteria"], scan["target"], scan["reference"]
    said = (
        f"Of the {count(scan['d_sae'])} features of {scan['dictionary']}, {count(scan['alive'])} fire at all and "
        f"{count(scan['primary_count'])} are specific to {target}: each fires at {setting(asked['min_rate'])} or more "
        f"of its {count(scan['onsets'])} step onsets ({count(scan['tasks'])} tasks), at least {asked['min_ratio']:g} "
        f"times as often as in {reference}, and differs between the models at q < {asked['max_q']:g}."
    )
    if not scan["top"]:
        return said
    top = scan["top"][0]
    return said + (
        f" The most specific of those that fire in at least {setting(asked['min_task_share'])} of the tasks, feature "
        f"{top['feature']}, fires at {count(top['target_hits'])} of these onsets in {target} and at "
        f"{count(top['reference_hits'])} in {reference}."
    )


def _study(study: StudyRecord) -> list[str]:
    record = study.record
    if not record["tested"]:
        return [f"{study.title} was not tested: {record['reason']}. Verdict: {verdict(record)}."]
    gap = record["gap"]["single"]
    found = [
        f"{study.title} of {record['dictionary']} was added to one model and taken from the other, at "
        f"step onsets, at dose {record['primary_dose']:g}. Between the models the probability of a target token there "
        f"differs by {points_interval(gap)} points ({count(gap['n'])} onsets of {count(gap['tasks'])} tasks; 95 % "
        "intervals here and below).",
        f"Verdict: {verdict(record)}. By intervention: {record['verdicts']}.",
        f"Edited one onset at a time, {_largest(study, 'single')}.",
        f"Edited at all onsets of a text together, {_largest(study, 'joint')}.",
    ]
    if all(variant["sampled"] for variant in record["variants"]):
        outside = _names(study, _outside_null)
        found.append(f"Sampled plans, outside the band of 95 % of unedited against unedited samples: {outside}.")
    return found


def _largest(study: StudyRecord, mode: str) -> str:
    variant = max(study.record["variants"], key=lambda variant: abs(study.primary(variant, mode)["mean"]))
    effect = study.primary(variant, mode)
    if not effect["mean"]:
        return "no intervention changes it"
    side = "the predicted way" if effect["mean"] * variant["predicted_sign"] > 0 else "against the prediction"
    return (
        f"the largest change is by {variant['variant']} in {variant['model']}: {points_interval(effect)} points, "
        f"{side}; of the gap, {share_interval(effect)}"
    )


def _outside_null(variant: Record) -> bool:
    found = variant["sampled"]["strict"]
    return found["delta"] is not None and not found["null_low"] <= found["delta"] <= found["null_high"]


def _names(study: StudyRecord, chosen: Callable[[Record], bool]) -> str:
    found = [variant["variant"] for variant in study.record["variants"] if chosen(variant)]
    return ", ".join(found) or "none of the interventions"


def _layers(layers: Record) -> list[str]:
    curves = layers["curves"]
    last = curves[0]["layers"][-1]["layer"]
    return [
        f"After the last block ({last}) the target tokens together have, at step onsets, a probability of",
        *(
            f"{percent_interval(curve['layers'][-1])} in {curve['model']} on {curve['rendering']} texts"
            for curve in curves
        ),
    ]

"""The page's opening: what the records say, in sentences. Chooses and formats; nothing is computed here."""

from sae_steer.report.numbers import count, percent_interval, points_interval, setting, share_interval
from sae_steer.report.run import Record, RunRecords
from sae_steer.study.record import Evidence, Mode, Study


def answer(run: RunRecords) -> list[list[str]]:
    """Paragraphs on the scan, every studied feature and the layers: a sentence, and points to it."""
    paragraphs = [[_scan(run.scan)]] if run.scan else []
    paragraphs += [_study(folder.study) for folder in run.studies]
    if run.layers and run.layers["curves"]:
        paragraphs.append(_layers(run.layers))
    return paragraphs or [["A dictionary has been learned; what its features do has not been looked at yet."]]


def verdict(study: Study) -> str:
    """The study's verdict; one from small control families says so."""
    return study.verdict + (" (quick: small control families, a first look)" if study.quick else "")


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


def _study(study: Study) -> list[str]:
    evidence = study.evidence
    if evidence is None:
        return [f"{study.title} was not tested: {study.reason}. Verdict: {verdict(study)}."]
    gap = evidence.gap.single
    sentences = [
        f"{study.title} of {study.dictionary} was added to one model and taken from the other, at "
        f"step onsets, at dose {evidence.primary_dose:g}. Between the models the probability of a target token there "
        f"differs by {points_interval(gap)} points ({count(gap.n)} onsets of {count(gap.tasks)} tasks; 95 % "
        "intervals here and below).",
        f"Verdict: {verdict(study)}. By intervention: {evidence.verdicts}.",
        f"Edited one onset at a time, {_largest(evidence, 'single')}.",
        f"Edited at all onsets of a text together, {_largest(evidence, 'joint')}.",
    ]
    sampled = {variant.name: variant.sampled for variant in evidence.variants if variant.sampled}
    if len(sampled) == len(evidence.variants):
        outside = [name for name, arm in sampled.items() if arm.strict.outside_null]
        sentences.append(
            "Sampled plans, outside the band of 95 % of unedited against unedited samples: "
            f"{', '.join(outside) or 'none of the interventions'}."
        )
    return sentences


def _largest(evidence: Evidence, mode: Mode) -> str:
    variant = max(evidence.variants, key=lambda variant: abs(evidence.primary(variant, mode).mean))
    effect = evidence.primary(variant, mode)
    if not effect.mean:
        return "no intervention changes it"
    side = "the predicted way" if effect.mean * variant.predicted_sign > 0 else "against the prediction"
    return (
        f"the largest change is by {variant.name} in {variant.model}: {points_interval(effect)} points, "
        f"{side}; of the gap, {share_interval(effect)}"
    )


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

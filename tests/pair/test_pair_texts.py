"""Texts carry the labels of the grammar or of the file, and tasks stay in one split."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sae_steer.cache import cache_activations
from sae_steer.corpus import read_texts, write_plans
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.pair import texts
from sae_steer.pair.texts import GeneratedTexts, TextFile, TextSource
from sae_steer.settings import SPLITS, CorpusSettings, SplitShares

FEW = CorpusSettings(train_plans=12, scan_plans=8, tune_plans=4, confirm_plans=6)


def all_texts(source: TextSource, pair) -> list:
    return [text for split in SPLITS for text in source.texts(pair, split)]


def test_generated_texts_carry_the_grammars_labels(tiny):
    for split in ("train", "confirm"):
        plans = {
            (plan.prompt, plan.variant): plan
            for variant in ("standard", "adhd")
            for plan in write_plans(split, variant, count=getattr(FEW, f"{split}_plans"), seed=0)
        }
        texts = list(GeneratedTexts(FEW).texts(tiny, split))
        first = min(text.prompt for text in texts)
        assert len(texts) == len(plans)
        for text in texts:
            plan = plans[text.prompt - first, GeneratedTexts.variants[text.rendering]]
            assert tiny.tokenizer.decode(text.token.tolist()) == plan.text
            assert text.task == plan.task.index
            assert text.step[text.is_onset].tolist() == list(range(len(plan.steps)))
            assert text.next_is_target[text.is_onset].tolist() == [step.is_target for step in plan.steps]
            np.testing.assert_allclose(text.true_p[text.is_onset], [step.true_p for step in plan.steps], rtol=1e-6)
            elsewhere = ~text.is_onset
            assert (text.step[elsewhere] == -1).all()
            assert np.isnan(text.true_p[elsewhere]).all()
            assert not text.next_is_target[elsewhere].any()


def test_the_renderings_of_a_plan_share_prompt_and_task_and_prompts_are_never_reused(tiny):
    texts = all_texts(GeneratedTexts(FEW), tiny)
    by_prompt: dict[int, list] = {}
    for text in texts:
        by_prompt.setdefault(text.prompt, []).append(text)
    assert len(by_prompt) == 12 + 8 + 4 + 6
    for renderings in by_prompt.values():
        assert [text.rendering for text in renderings] == [0, 1]
        assert len({(text.task, text.split) for text in renderings}) == 1


def test_no_task_is_in_two_splits(tiny):
    tasks = [{text.task for text in GeneratedTexts(FEW).texts(tiny, split)} for split in SPLITS]
    assert sum(map(len, tasks)) == len(set.union(*tasks))


def test_one_rendering_alone_is_another_source(tiny):
    alone = GeneratedTexts(FEW, variants=("adhd",))
    assert alone.identity() != GeneratedTexts(FEW).identity()
    both = [text for text in GeneratedTexts(FEW).texts(tiny, "scan") if text.rendering == 1]
    for one, other in zip(alone.texts(tiny, "scan"), both, strict=True):
        assert np.array_equal(one.token, other.token)


def test_other_settings_have_another_identity():
    identities = [GeneratedTexts(CorpusSettings(seed=seed)).identity() for seed in (0, 0, 1)]
    assert identities[0] == identities[1] != identities[2]


@pytest.fixture
def plans(tmp_path):
    """Forty tasks, three texts each, as .jsonl."""
    rows = [
        {"text": f"<|task|>Task {task}<|steps|>Begin<|sep|>Sip water<|sep|><|end|>", "task": f"t{task}"}
        for task in range(40)
        for _ in range(3)
    ]
    path = tmp_path / "plans.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_file_is_dealt_to_splits_by_task_whole_and_always_alike(tiny, plans):
    source = TextFile.read(plans)
    by_split = {split: list(source.texts(tiny, split)) for split in SPLITS}
    assert sum(map(len, by_split.values())) == 120
    tasks = [{text.task for text in texts} for texts in by_split.values()]
    assert sum(map(len, tasks)) == 40
    assert all(text.split == split for split, texts in by_split.items() for text in texts)
    assert len(tasks[0]) > len(tasks[2]), "the train split is the largest"
    again = [text.prompt for text in all_texts(TextFile.read(plans), tiny)]
    assert again == [text.prompt for text in all_texts(source, tiny)]


def test_a_files_texts_are_labelled_by_the_pairs_rule_and_phrases(tiny, plans):
    text = all_texts(TextFile.read(plans), tiny)[0]
    opened = [tiny.tokenizer.decode([token]) for token in text.token[text.is_onset].tolist()]
    assert opened == ["<|steps|>", "<|sep|>"]
    assert text.next_is_target[text.is_onset].tolist() == [False, True]
    assert np.isnan(text.true_p).all()


def test_delimiters_typed_in_a_txt_file_are_delimiters(tiny, tmp_path):
    path = tmp_path / "plans.txt"
    path.write_text("<|task|>Tea<|steps|>Boil water<|sep|>Pour<|sep|><|end|>\nno plan at all\n")
    plan, words = sorted(all_texts(TextFile.read(path), tiny), key=lambda text: text.prompt)
    assert plan.is_onset.sum() == 2
    assert plan.token[-1] == tiny.tokenizer.token_id("<|end|>")
    assert not words.is_onset.any()


def test_renderings_of_a_file_are_named_and_numbered(tiny, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"words {v}", "rendering": v}) for v in ("standard", "adhd") * 2))
    source = TextFile.read(path)
    assert source.variants == ("adhd", "standard")
    texts = sorted(all_texts(source, tiny), key=lambda text: text.prompt)
    assert [text.rendering for text in texts] == [1, 0, 1, 0]


def test_the_identity_of_a_file_is_its_content_and_how_it_is_read(tmp_path):
    line = json.dumps({"text": "words"})
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "a.txt")]
    for path in paths:
        path.write_text(line)
    one, same, otherwise = (TextFile.read(path).identity() for path in paths)
    assert one == same != otherwise
    paths[0].write_text(line + "\n" + line)
    assert TextFile.read(paths[0]).identity() != one


def test_of_a_text_longer_than_the_context_what_comes_first_is_read_with_the_labels_it_had(tiny, tmp_path):
    step = "Sip water<|sep|>"
    path = tmp_path / "long.txt"
    path.write_text("short\n<|task|>Tea<|steps|>" + step * 200 + "<|end|>\n")
    pair = replace(tiny, context=40)
    long, short = sorted(all_texts(TextFile.read(path), pair), key=lambda text: -text.cut)
    whole = tiny.tokenizer.encode("<|task|>Tea<|steps|>" + step * 200 + "<|end|>")
    assert long.token.tolist() == whole[:40]
    assert (long.cut, short.cut) == (len(whole) - 40, 0)
    delimiters = [
        at for at, token in enumerate(whole[:39]) if tiny.tokenizer.decode([token]) in ("<|steps|>", "<|sep|>")
    ]
    assert np.flatnonzero(long.is_onset).tolist() == delimiters  # not the last token: its step is left out
    assert np.flatnonzero(long.next_is_target).tolist() == delimiters
    assert long.step[delimiters].tolist() == list(range(len(delimiters)))


def test_texts_without_a_target_step_are_refused_before_anything_is_computed(tiny, tmp_path):
    path = tmp_path / "plans.txt"
    path.write_text("".join(f"<|task|>Tea {i}<|steps|>Sip waters<|sep|>Pour<|sep|><|end|>\n" for i in range(20)))
    with pytest.raises(InputError, match=r"none of the 40 steps .*; nearest to one is 'Sip waters'"):
        cache_activations(tiny, out=tmp_path / "cache", layers=[1], source=TextFile.read(path))
    assert not (tmp_path / "cache" / "manifest.json").exists()
    begins = replace(tiny, phrases=("Sip*",))
    cache = cache_activations(begins, out=tmp_path / "cache", layers=[1], source=TextFile.read(path))
    assert sum(text.next_is_target.sum() for split in SPLITS for text in cache.texts(split)) == 20


def test_a_plan_longer_than_the_context_is_refused(tiny):
    with pytest.raises(InputError, match=r"plan \d+ of 'train' \(\w+\) has \d+ tokens, and pair 'tiny' reads 30"):
        all_texts(GeneratedTexts(FEW), replace(tiny, context=30))


@pytest.mark.parametrize("content", ["", " \n \n", "<|task|><|steps|><|sep|>\n"])
def test_an_empty_or_special_token_only_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(InputError, match=r"empty\.txt"):
        TextFile.read(path)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")

    def slow(name):
        lines = read_texts(name)
        path.write_text("one\ntwo\nthree\n")
        return lines

    identity = TextFile.read(path).identity()
    monkeypatch.setattr(texts, "read_texts", slow)
    with pytest.raises(InputError, match="was changed while it was read"):
        TextFile.read(path)
    monkeypatch.undo()
    file = TextFile.read(path)
    path.write_text("another\n")
    assert file.identity() != identity
    assert file.identity()["texts"] == sha256(b"one\ntwo\nthree\n"), "what was read, not what is there now"


def test_split_shares_are_settable_and_move_no_task_that_they_leave_where_it_was(tiny, plans):
    usual, same = TextFile.read(plans), TextFile.read(plans, SplitShares())
    assert usual.identity() == same.identity()
    other = TextFile.read(plans, SplitShares(0.6, 0.1, 0.1, 0.2))
    assert other.identity() != usual.identity()
    tasks = {name: {split: {text.task for text in source.texts(tiny, split)} for split in SPLITS}
             for name, source in (("usual", usual), ("other", other))}  # fmt: skip
    assert tasks["usual"]["train"] == tasks["other"]["train"]
    assert tasks["usual"]["confirm"] < tasks["other"]["confirm"]
    everything = TextFile.read(plans, SplitShares(0, 0, 0, 1))
    assert len({text.task for text in everything.texts(tiny, "confirm")}) == 40
    with pytest.raises(InputError, match=r"sum to 1\.1; give four that sum to 1"):
        SplitShares(0.6, 0.2, 0.1, 0.2)
    with pytest.raises(InputError, match=r"SplitShares\.train is -1, and takes a number from 0 to 1"):
        SplitShares(-1, 1, 1, 0)

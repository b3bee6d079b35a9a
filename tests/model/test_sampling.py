"""Sampling with stored keys is sampling from whole passes; rows keep their own noise."""

import pytest
import torch
from hf_models import adapted

from sae_steer.edits.edit import Inject
from sae_steer.model.replay import edited
from sae_steer.model.sampling import sample
from sae_steer.randomness import generator

END = 5
PROMPTS = [[1, 2, 3], [7] * 12, [9], [4, 4, 60, 2, 1, 0, 30]]
SETTINGS = {"end_id": END, "max_tokens": 40, "temperature": 1.5}


def sample_slowly(model, prompts, *, end_id, max_tokens, temperature, generator):
    """The definition: a whole pass a token, one row at a time, on the same noise."""
    rows = [list(prompt) for prompt in prompts]
    done = [len(row) >= max_tokens for row in rows]
    while not all(done):
        noise = torch.rand(len(rows), generator=generator).double()
        for i, row in enumerate(rows):
            if not done[i]:
                cumulative = (model(torch.tensor([row]))[0, -1] / temperature).double().softmax(-1).cumsum(-1)
                row.append(int((cumulative <= noise[i] * cumulative[-1]).sum()))
                done[i] = row[-1] == end_id or len(row) >= max_tokens
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def test_stored_keys_give_the_texts_of_whole_passes(model):
    fast = sample(model, PROMPTS, **SETTINGS, generator=generator(1))
    assert fast == sample_slowly(model, PROMPTS, **SETTINGS, generator=generator(1))
    assert len({len(text) for text in fast}) > 1, "no row ended before another: the test says nothing"


@pytest.mark.parametrize("name", ["Qwen2, windows", "Gemma 3", "GPT-2", "Falcon, ALiBi"])
def test_caches_of_transformers_give_the_texts_of_whole_passes_under_an_edit(name):
    _, ours = adapted(name)
    edit = Inject(torch.randn(32, generator=generator(2)), 3.0)
    prompts = [*PROMPTS, [5, 6, 7], [1] * 18]
    settings = {**SETTINGS, "max_tokens": 18}
    with edited(ours, "blocks.1.hook_resid_post", edit, after=(3, 9, 30, 31)):
        fast = sample(ours, prompts, **settings, generator=generator(1))
        slow = sample_slowly(ours, prompts, **settings, generator=generator(1))
    assert fast == slow
    assert len({len(text) for text in fast}) > 1


def test_stored_keys_give_the_texts_of_whole_passes_under_an_edit(model):
    edit = Inject(torch.randn(128, generator=generator(2)), 3.0)
    plain = sample(model, PROMPTS, **SETTINGS, generator=generator(1))
    with edited(model, "blocks.1.hook_resid_post", edit, after=(3, 9, 30, 31)):
        fast = sample(model, PROMPTS, **SETTINGS, generator=generator(1))
        slow = sample_slowly(model, PROMPTS, **SETTINGS, generator=generator(1))
    assert fast == slow
    assert fast != plain


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(model):
    one, same, other = (sample(model, PROMPTS, **SETTINGS, generator=generator(seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_rows_text_does_not_depend_on_the_other_rows(model):
    texts = sample(model, PROMPTS, **SETTINGS, generator=generator(1))
    others = [PROMPTS[0], [11] * 20, [END], PROMPTS[3]]
    beside = sample(model, others, **SETTINGS, generator=generator(1))
    assert (texts[0], texts[3]) == (beside[0], beside[3])
    assert texts[1] != beside[1]


def test_texts_end_at_the_end_token_or_at_the_limit(model):
    for prompt, text in zip(PROMPTS, sample(model, PROMPTS, **SETTINGS, generator=generator(1)), strict=True):
        assert END not in text[:-1]
        assert text[-1] == END or len(prompt) + len(text) == SETTINGS["max_tokens"]


def test_a_prompt_that_fills_the_limit_gets_nothing(model):
    full, short = sample(model, [[1] * 6, [2]], end_id=END, max_tokens=6, temperature=1.0, generator=generator(1))
    assert full == []
    assert 1 <= len(short) <= 5
    assert sample(model, [], **SETTINGS, generator=generator(1)) == []


def test_tokens_are_drawn_with_the_models_probabilities(model):
    prompt, draws = [1, 2, 3], 4_000
    texts = sample(model, [prompt] * draws, end_id=END, max_tokens=4, temperature=1.0, generator=generator(3))
    expected = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor([text[0] for text in texts]), minlength=64) / draws
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 5 * spread + 1 / draws).all()


@pytest.mark.parametrize("temperature", [0.05, 5.0])
def test_temperature_sharpens_and_flattens(model, temperature):
    texts = sample(model, [[1, 2, 3]] * 300, end_id=END, max_tokens=4, temperature=temperature, generator=generator(3))
    likeliest = int(model(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    share = sum(text[0] == likeliest for text in texts) / 300
    warm = float(model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)[likeliest])
    assert share > warm if temperature < 1 else share < warm + 0.05

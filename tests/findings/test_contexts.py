"""A feature's card says what the streams and the weights say, counted another way."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sae_steer.cli import main
from sae_steer.errors import InputError
from sae_steer.findings.contexts import read_contexts
from sae_steer.sae.saelens.files import save_sae
from sae_steer.settings import ContextSettings

SETTINGS = ContextSettings(top=5, random=4, width=6)


@pytest.fixture(scope="module")
def dense(cache, dictionary):
    """{model: [row, feature]} every activation of the scan split."""
    with torch.no_grad():
        return {
            name: torch.cat([dictionary.sae.encode(rows).dense() for rows in cache.rows(name, 2, "scan").in_order()])
            for name in ("adhd", "standard")
        }


@pytest.fixture(scope="module")
def feature(dense):
    """A feature that fires in some texts, not in all rows."""
    return int((dense["adhd"] > 0).float().mean(0).sub(0.03).abs().argmin())


@pytest.fixture(scope="module")
def card(pair, cache, dictionary, feature):
    return read_contexts(pair, cache, dictionary, [feature], settings=SETTINGS)[0]


def test_firings_are_counted_in_both_models(card, dense, feature):
    assert card.target_firings == int((dense["adhd"][:, feature] > 0).sum())
    assert card.other_firings == int((dense["standard"][:, feature] > 0).sum())
    assert sum(card.histogram) == card.target_firings
    assert card.largest == float(dense["adhd"][:, feature].max())


def test_the_top_contexts_are_the_strongest_firings_of_different_texts(card, cache, dense, feature):
    starts = np.flatnonzero(cache.labels("scan")["position"] == 0)
    by_text = np.maximum.reduceat(dense["adhd"][:, feature].numpy(), starts)
    assert [context.activation for context in card.top] == pytest.approx(np.sort(by_text)[::-1][: len(card.top)])
    assert len({context.text for context in card.top}) == len(card.top)


def test_a_context_shows_the_same_positions_in_both_models(card, cache, dense, feature, pair):
    labels = cache.labels("scan")
    starts = np.flatnonzero(labels["position"] == 0)
    for context in card.top + card.random:
        first = starts[context.text] + context.start
        here = slice(first, first + len(context.tokens))
        assert context.target == pytest.approx(dense["adhd"][here, feature].tolist())
        assert context.other == pytest.approx(dense["standard"][here, feature].tolist())
        assert "".join(context.tokens) == pair.tokenizer.decode(labels["token"][here].tolist())
        assert context.activation > 0


def test_random_contexts_are_firings_fixed_by_the_seed(card, pair, cache, dictionary, feature):
    again = read_contexts(pair, cache, dictionary, [feature], settings=SETTINGS)[0]
    assert again == card
    assert len(card.random) == SETTINGS.random


def test_promoted_tokens_are_those_whose_logits_the_direction_raises_most(card, pair, dictionary, feature):
    model = pair.target.model
    unit = dictionary.sae.W_dec[feature] / dictionary.sae.W_dec[feature].norm()
    logits = torch.einsum("vd,d,d->v", model.W_U, model.gain, unit).detach()
    order = (logits - logits.mean()).sort(descending=True)
    assert [token.name for token in card.promoted] == [pair.tokenizer.decode([i]) for i in order.indices[:8].tolist()]
    assert card.suppressed[0].weight == pytest.approx(float(order.values[-1]), rel=1e-5)


def test_neighbours_are_the_nearest_decoder_rows_and_not_the_feature_itself(card, dictionary, feature):
    W = torch.nn.functional.normalize(dictionary.sae.W_dec.detach(), dim=1)
    cosines = W @ W[feature]
    cosines[feature] = -2
    assert int(card.neighbours[0].name) == int(cosines.argmax())
    assert card.neighbours[0].weight == pytest.approx(float(cosines.max()), abs=1e-5)


def test_a_silent_feature_has_a_card_without_contexts(pair, cache, dictionary):
    muted = copy.deepcopy(dictionary.sae)
    muted.b_enc.data[3] = -1e9
    card = read_contexts(pair, cache, replace(dictionary, sae=muted), [3], settings=SETTINGS)[0]
    assert (card.target_firings, card.other_firings, card.largest) == (0, 0, 0.0)
    assert card.top == card.random == ()


def test_the_table_has_a_row_a_token(card):
    table = card.table()
    assert {len(column) for column in table.values()} == {sum(len(c.tokens) for c in card.top + card.random)}
    assert sum(table["is_firing"]) == len(card.top + card.random)


def test_a_feature_the_dictionary_lacks_is_refused(pair, cache, dictionary):
    with pytest.raises(InputError, match="feature 256 is not in adhd_L2_hook_resid_post; it has features 0 to 255"):
        read_contexts(pair, cache, dictionary, [256])


def test_the_command_prints_the_card_and_json(cache, dictionary, card, feature, tmp_path):
    save_sae(dictionary.sae, tmp_path / "sae", metadata=dictionary.record)
    sizes = ["--top", "5", "--random", "4", "--width", "6"]
    command = ["features", str(feature), "--cache", str(cache.folder), "--sae", str(tmp_path / "sae"), *sizes]
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 0, printed.output
    assert f"feature {feature}: fires at {card.target_firings} of" in printed.stdout
    as_json = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(as_json.stdout)[0] == json.loads(json.dumps(card.record))

"""Texts are padded, run, and their real rows kept, whatever the batches."""

import numpy as np
import torch

from sae_steer.model.rows import Padded, padded, real_rows, real_streams
from sae_steer.randomness import generator

TEXTS = [np.array([3, 1, 4]), np.array([1]), np.array([5, 9, 2, 6, 5]), np.array([3, 5])]


def test_every_text_is_in_one_batch_with_its_tokens_and_no_other():
    for together in (1, 6, 1_000):
        seen = []
        for batch in padded(TEXTS, together):
            for row, member in enumerate(batch.members):
                assert batch.tokens[row][batch.real[row]].tolist() == TEXTS[member].tolist()
            assert int(batch.real.sum()) == int(batch.lengths.sum())
            seen += batch.members
        assert sorted(seen) == [0, 1, 2, 3]


def test_flags_stand_where_their_tokens_do_and_never_in_padding():
    flags = [text > 3 for text in TEXTS]
    batch = Padded.of(TEXTS, [2, 0])
    placed = batch.placed(flags)
    assert placed[0].tolist() == flags[2].tolist()
    assert placed[1].tolist() == [*flags[0].tolist(), False, False]


def test_rows_come_back_in_the_order_of_the_texts():
    for together in (1, 6, 1_000):
        rows = real_rows(
            TEXTS, lambda tokens: {"id": tokens, "pair": torch.stack([tokens, -tokens], -1)}, tokens_per_batch=together
        )
        assert rows["id"].tolist() == np.concatenate(TEXTS).tolist()
        assert rows["pair"][:, 1].tolist() == (-np.concatenate(TEXTS)).tolist()


@torch.no_grad()
def test_streams_are_those_of_each_text_alone(model):
    texts = [torch.randint(0, 64, (length,), generator=generator(length)).numpy() for length in (7, 2, 12)]
    found = real_streams(model, texts, (0, 2))
    for layer in (0, 2):
        alone = [model.resid_posts(torch.from_numpy(text)[None], (layer,))[layer][0] for text in texts]
        np.testing.assert_allclose(found[layer], torch.cat(alone).numpy(), atol=1e-5)

"""Replay on any model of `transformers` is the full pass with a hook on its block."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hf_models import ARCHITECTURES, adapted
from torch import Tensor, nn

from sae_steer.errors import NotDeliveredError
from sae_steer.model.replay import CleanPass, edited, whole_pass

TOKENS = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(6))
LAYER = 0
IDS = [3, 4, 5]


@pytest.fixture(params=ARCHITECTURES, ids=list(ARCHITECTURES))
def both(request):
    return adapted(request.param)


def log_odds(logits: Tensor) -> Tensor:
    mass = logits.double().softmax(-1)[..., IDS].sum(-1)
    return mass.log() - (1 - mass).log()


@contextmanager
def hooked(theirs: nn.Module, ours, change) -> Iterator[None]:
    """The block itself, its output changed by a plain hook."""

    def replace(module, inputs, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    hook = ours.layers[LAYER].register_forward_hook(replace)
    yield
    hook.remove()


@torch.no_grad()
def by_hook(theirs, ours, row: int, position: int, resid: Tensor) -> Tensor:
    """The logits at one position of one text, the stream there replaced, by the model's own full pass."""

    def change(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[0, position] = resid
        return stream

    with hooked(theirs, ours, change):
        return theirs(TOKENS[row : row + 1], use_cache=False).logits[0, position]


def check_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(log_odds(ours), log_odds(theirs), atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_edit_at_one_position_is_one_token_through_the_blocks_above(both):
    theirs, ours = both
    clean = CleanPass.of(ours, TOKENS, LAYER)
    generator = torch.Generator().manual_seed(1)
    for row, position in ((0, 0), (1, 9), (1, 23)):
        rows = clean.resid[row, position] + torch.randn(3, 32, generator=generator)
        expected = torch.stack([by_hook(theirs, ours, row, position, resid) for resid in rows])
        check_close(clean.read_many(row, position, rows), expected)
        unchanged = ours(TOKENS[row : row + 1])[0, position]
        assert (log_odds(expected) - log_odds(unchanged)).abs().max() > 1e-3, "the edit must matter"


@torch.no_grad()
def test_edits_at_every_position_are_carried_alone(both):
    theirs, ours = both
    clean, positions = CleanPass.of(ours, TOKENS, LAYER), torch.tensor([[0, 4, 20], [2, 3, 23]])
    rows = clean.at(positions) + torch.randn(2, 2, 3, 32, generator=torch.Generator().manual_seed(2))
    read = clean.read_single(positions, rows)
    for copy, row, edit in ((0, 0, 0), (1, 0, 2), (0, 1, 1), (1, 1, 2)):
        expected = by_hook(theirs, ours, row, int(positions[row, edit]), rows[copy, row, edit])
        check_close(read[copy, row, edit], expected)


@torch.no_grad()
def test_edits_together_and_a_whole_pass_are_the_full_pass_with_a_hook(both):
    theirs, ours = both
    clean, at = CleanPass.of(ours, TOKENS, LAYER), torch.zeros(2, 24, dtype=torch.bool)
    at[:, [3, 8, 15]] = True
    shift = torch.randn(32, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[3, 15, 20], [8, 9, 23]])

    def change(stream: Tensor) -> Tensor:
        return torch.where(at[..., None], stream + shift, stream)

    with hooked(theirs, ours, change):
        expected = theirs(TOKENS, use_cache=False).logits
    read = clean.read_joint(at, (clean.resid[at] + shift)[None], positions)[0]
    check_close(read, expected.gather(1, positions[..., None].expand(-1, -1, expected.shape[-1])))
    received, logits = whole_pass(ours, TOKENS, LAYER, lambda rows: rows + shift, at)
    check_close(logits, expected)
    torch.testing.assert_close(received, change(clean.resid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 3", "GPT-2", "Falcon, ALiBi", "Mixtral"])
def test_the_gradient_is_what_replayed_edits_change(name):
    _, ours = adapted(name)
    clean, positions = CleanPass.of(ours, TOKENS, LAYER), torch.tensor([[5, 20], [0, 23]])
    slope = clean.gradient(positions, log_odds)
    step = torch.randn(32, generator=torch.Generator().manual_seed(4)) * 1e-4
    moved = clean.read_single(positions, torch.stack([clean.at(positions) - step, clean.at(positions) + step]))
    torch.testing.assert_close(
        log_odds(moved[1]) - log_odds(moved[0]), (2 * slope @ step).double(), atol=3e-5, rtol=0.05
    )


@torch.no_grad()
def test_after_the_last_block_only_the_readout_is_left():
    _, ours = adapted("Gemma 2")
    clean = CleanPass.of(ours, TOKENS, 2)
    rows = clean.resid[1, 7] + torch.randn(2, 32)
    check_close(clean.read_many(1, 7, rows), ours.unembed(rows))


def test_an_edit_that_meets_no_position_is_an_error():
    _, ours = adapted("Qwen2")
    with pytest.raises(NotDeliveredError), edited(ours, "blocks.1.hook_resid_post", lambda rows: rows, after=(60,)):
        ours(torch.zeros(1, 4, dtype=torch.long))


def test_threads_that_read_one_model_wait_for_one_another():
    _, ours = adapted("Gemma 2")
    alone = ours.resid_posts(TOKENS, (0, 2)), ours(TOKENS)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(ours.resid_posts, TOKENS, (0, 2)) for _ in range(12)]
        logits = [pool.submit(ours, TOKENS) for _ in range(12)]
        assert all(torch.equal(part.result()[layer], alone[0][layer]) for part in streams for layer in (0, 2))
        assert all(torch.equal(part.result(), alone[1]) for part in logits)

"""Random models in three shapes, and tokens for them."""

from collections.abc import Iterator

import pytest
import torch
from decoder_shapes import SHAPES
from tiny_pair import lively

from sae_steer.model.decoder import Decoder
from sae_steer.randomness import generator


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on tensors this small, and waits long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SHAPES, ids=list(SHAPES))
def model(request) -> Decoder:
    return lively(SHAPES[request.param], 1)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (3, 40), generator=generator(3))

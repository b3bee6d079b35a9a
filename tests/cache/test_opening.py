"""What is no folder is refused in a line, where a cache or a text file is opened."""

import numpy as np
import pytest

from sae_steer import ActivationCache, TextFile
from sae_steer.errors import InputError


@pytest.mark.parametrize("value", [None, 3, 2.5, b"bytes", [], {}, object(), np.zeros(3), lambda: 0])
@pytest.mark.parametrize("call", [ActivationCache.open, TextFile.read])
def test_what_is_no_path_is_refused_in_a_line(call, value):
    with pytest.raises(InputError) as told:
        call(value)
    assert "\n" not in str(told.value)

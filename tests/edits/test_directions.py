"""Where directions come from, and files that hold none."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_steer.edits.directions import mean_difference, of_vector, random_direction, read_vector
from sae_steer.errors import InputError, NotFiniteError

VECTOR = torch.arange(1.0, 9.0)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "v.npy", VECTOR.numpy())
    torch.save({"direction": VECTOR}, tmp_path / "v.pt")
    save_file({"direction": VECTOR}, tmp_path / "v.safetensors")
    (tmp_path / "v.json").write_text(json.dumps(VECTOR.tolist()))
    return tmp_path


@pytest.mark.parametrize("ending", ["npy", "pt", "safetensors", "json"])
def test_a_vector_is_read_from_every_kind_of_file(files, ending):
    assert torch.equal(read_vector(files / f"v.{ending}", 8), VECTOR.double())


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"direction": Evil()}, tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    for name in ("v.pt", "v.npy"):
        with pytest.raises(InputError, match="no vector of numbers that can be read safely") as caught:
            read_vector(tmp_path / name, 8)
        assert "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '["a"]', '{"a": [1], "b": [2]}', "null", "[[1, 2], [3]]"])
def test_a_file_without_one_vector_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_vector(tmp_path / "v.json", 8)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_neither_source_nor_file_and_a_wrong_width_are_refused(files):
    with pytest.raises(InputError, match="no direction 'up': give mean-difference, unembedding, random, or a"):
        read_vector("up", 8)
    with pytest.raises(InputError, match="give one vector of 16"):
        read_vector(files / "v.npy", 16)


def test_a_direction_has_length_one_and_its_own_size():
    found = of_vector("mine", VECTOR, None)
    assert found.unit.norm() == pytest.approx(1.0)
    assert found.s == pytest.approx(float(VECTOR.norm()))
    with pytest.raises(InputError, match="is zero"):
        of_vector("mine", torch.zeros(8), None)
    with pytest.raises(NotFiniteError):
        of_vector("mine", VECTOR / 0 - VECTOR / 0, None)
    assert torch.equal(random_direction(8, 1), random_direction(8, 1))
    assert not torch.equal(random_direction(8, 1), random_direction(8, 2))


def test_the_mean_difference_is_that_of_onsets_before_target_steps_and_the_others():
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    onset, target = np.arange(40) % 2 == 0, np.arange(40) % 4 == 0
    found = mean_difference(rows, onset, target & onset)
    expected = rows[::4].double().mean(0) - rows[2::4].double().mean(0)
    torch.testing.assert_close(found.s * found.unit.double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="20 onsets before a target step and 0 before others"):
        mean_difference(rows, onset, onset)

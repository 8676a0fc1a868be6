"""The bundled sets: known values."""

from pathlib import Path

import numpy as np
import pytest

from gpubackprop import datasets


def test_digits_are_the_uci_test_partition():
    x, y = datasets.digits()
    assert x.shape == (1797, 64) and x.dtype == np.float32 and y.shape == (1797,) and y.dtype == np.int64
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI prints them
    pixels = x * 16
    assert set(np.unique(pixels)) == set(range(17)) and pixels.sum(dtype=np.float64) == 561718
    assert pixels[0, :16].tolist() == [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]


def test_digits_equal_scikit_learns():
    peer = pytest.importorskip("sklearn.datasets")
    x, y = datasets.digits()
    theirs, labels = peer.load_digits(return_X_y=True)
    np.testing.assert_array_equal(x * 16, theirs)
    np.testing.assert_array_equal(y, labels)


def test_each_call_gives_arrays_of_its_own():
    for load in datasets.NAMES.values():
        load()[0][:] = -1
        assert load()[0].min() >= 0


def test_digits_carry_their_licence():
    text = Path(datasets._FOLDER, "DIGITS-LICENSE.txt").read_text()
    for words in (
        "E. Alpaydin",
        "C. Kaynak",
        "10.24432/C50P49",
        "creativecommons.org/licenses/by/4.0",
        "Changes",
    ):
        assert words in text


def test_seed_23_seven_points_ols():
    x, y = datasets.regression7()
    assert x.shape == (7, 1) and y.shape == (7,) and x.dtype == y.dtype == np.float64
    design = np.column_stack([x, np.ones(7)])
    (m, b), *_ = np.linalg.lstsq(design, y, rcond=None)
    assert m == pytest.approx(0.335593220339, abs=1e-12)
    assert b == pytest.approx(0.804721549637, abs=1e-12)
    assert np.mean((design @ [m, b] - y) ** 2) == pytest.approx(0.018051885161, abs=1e-12)


def test_load_by_name():
    assert list(datasets.NAMES) == ["digits", "regression7"]
    np.testing.assert_array_equal(datasets.load("regression7")[1], datasets.regression7()[1])
    with pytest.raises(ValueError, match=r"^unknown data set 'mnist'; choose from digits, regression7$"):
        datasets.load("mnist")


def test_the_module_wins_over_its_folder_of_files():
    import gpubackprop.data

    assert gpubackprop.data.__file__.endswith("data.py")

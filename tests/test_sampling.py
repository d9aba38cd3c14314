"""The sampling error of a share of images."""

import pytest
from scipy.stats import binomtest

from repan_cli.session.summary import _test_text
from repan_cli.system.sampling import interval, is_extreme, standard_error, with_error


@pytest.mark.parametrize(
    ("right", "images"), [(6, 6), (0, 6), (1, 1), (0, 1), (3, 7), (359, 359), (358, 359), (12, 10000), (9999, 10000)]
)
def test_the_interval_is_that_of_wilson(right, images):
    expected = binomtest(right, images).proportion_ci(method="wilson")
    found = interval(100 * right / images, images)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), rel=1e-9, abs=1e-9)
    assert found[1] - found[0] > 0
    assert 0 <= found[0] <= 100 * right / images <= found[1] + 1e-9


@pytest.mark.parametrize("images", [10, 11, 400, 359, 10000])
def test_five_right_and_five_wrong_are_enough_for_a_standard_error(images):
    for right in range(images + 1) if images < 1000 else (4, 5, images - 5, images - 4):
        assert is_extreme(100 * right / images, images) == (min(right, images - right) < 5), right


def test_few_images_are_always_extreme():
    assert all(is_extreme(100 * right / 9, 9) for right in range(10))


def test_a_share_is_shown_with_its_error():
    assert with_error(70.0, 400) == "70.00 ± 2.29"
    assert standard_error(50.0, 100) == 5.0
    assert with_error(100.0, 6) == "100.00 [60.97, 100.00]"
    assert with_error(0.0, 6) == "0.00 [0.00, 39.03]"
    assert with_error(99.99, 10000) == "99.99 [99.94, 100.00]"


def test_the_end_of_a_run_shows_it():
    assert _test_text({"top1": 100.0, "images": 6}) == "top-1 100.00 [60.97, 100.00] (95% interval, 6 images)"
    assert _test_text({"top1": 0.0, "images": 1}) == "top-1 0.00 [0.00, 79.35] (95% interval, 1 image)"
    assert _test_text({"top1": 70.0, "images": 1200, "top5": 91.0}) == "top-1 70.00 ± 1.32 (1,200 images), top-5 91.00"

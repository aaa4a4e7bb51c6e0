"""TF32 holds inside the context only, and is what it was before once it is closed."""

import pytest
import torch

from manyviews.system.precision import tf32

MATMUL = torch.backends.cuda.matmul


def test_it_is_allowed_inside_and_what_it_was_before_outside() -> None:
    before = MATMUL.fp32_precision
    with tf32():
        assert MATMUL.fp32_precision == "tf32"
        with tf32():
            assert MATMUL.fp32_precision == "tf32"
        assert MATMUL.fp32_precision == "tf32"
    assert MATMUL.fp32_precision == before
    # What was set by the older names can be read again.
    assert MATMUL.allow_tf32 is False
    assert torch.get_float32_matmul_precision() == "highest"


def test_where_it_is_not_wanted_nothing_changes() -> None:
    before = MATMUL.fp32_precision
    with tf32(False):
        assert MATMUL.fp32_precision == before


def test_an_error_puts_it_back() -> None:
    before = MATMUL.fp32_precision
    with pytest.raises(ValueError, match="a product failed"), tf32():
        raise ValueError("a product failed")
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_a_setting_of_the_user_stays(setting: str) -> None:
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = setting
    try:
        with tf32():
            assert MATMUL.fp32_precision == "tf32"
        assert MATMUL.fp32_precision == setting
    finally:
        MATMUL.fp32_precision = before


def test_products_on_a_cpu_do_not_change() -> None:
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected = rows @ rows.T
    with tf32():
        assert torch.equal(rows @ rows.T, expected)

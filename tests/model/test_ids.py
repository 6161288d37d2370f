"""Token ids that a model has no row for."""

from __future__ import annotations

import numpy as np

from qwen_mlx.backend import mx
from tests.helpers.cases import each
from tests.helpers.packed_models import model_of


@each("packing", ["dense", "q4_k", "affine"])
@each("wrong", [-1, 300, 10**6, 2**31 - 1, -(2**31)])
def test_nothing_is_read_beyond_the_matrix(packing: str, wrong: int):
    model = model_of(packing, tied=True)
    logits = np.array(model(mx.array([[5, 7, wrong, 9], [5, 7, 8, 9]])))
    assert np.isnan(logits[0, 2:]).all()
    assert np.isfinite(logits[1]).all()

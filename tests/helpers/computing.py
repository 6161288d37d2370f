"""The tokens that a model computes, counted by what goes through its fused form."""

from __future__ import annotations

import pytest

from qwen_mlx.model.fused import FusedModel


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all calls of the model from now on, by steps of one token too."""
    lengths: list[int] = []
    hidden, step = FusedModel.hidden, FusedModel._step

    def counting(self, input_ids, cache, keep=0):
        lengths.append(input_ids.shape[1])
        return hidden(self, input_ids, cache, keep)

    def counting_step(self, input_ids, cache):
        lengths.append(1)
        return step(self, input_ids, cache)

    monkeypatch.setattr(FusedModel, "hidden", counting)
    monkeypatch.setattr(FusedModel, "_step", counting_step)
    return lengths

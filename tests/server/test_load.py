"""A thousand requests of all kinds at once, with clients that hang up and bodies that are none: no wrong answer, no
leak, every bound kept."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.server_load import answers_alone, mixed_cases, send_mixed
from qwen_mlx import load
from tests.helpers.fim_model import save_fim_folder
from tests.helpers.running_server import serving, wait_for

COUNT, CACHE = 1000, 3_000_000


@pytest.mark.slow
def test_a_thousand_requests(tmp_path):
    import psutil

    small = load(save_fim_folder(tmp_path / "m", seed=3, max_position_embeddings=512))
    cases, memory = mixed_cases(), []

    def ended(number: int) -> None:
        if number in (100, COUNT):
            memory.append(psutil.Process().memory_info().rss)

    with serving(small, slots=6, queue_size=200, cache_bytes=CACHE) as service:
        expected = answers_alone(service.url, cases)
        assert asyncio.run(send_mixed(service.url, cases, expected, COUNT, ended)) == []
        wait_for(lambda: service.scheduler.load == (0, 0))
        assert service.scheduler.metrics.failed == 0
        assert service.scheduler.metrics.cancelled > 50
        assert 0 < service.scheduler.cache.nbytes <= CACHE
    assert memory[1] - memory[0] < 50e6

"""Shared set-up: one thread, no network, no progress bars, no hypothesis deadlines (the machine may be busy)."""

import logging
import os

import pytest


def pytest_configure():
    # Before the hub client is imported: it reads these once.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("tests", deadline=None, max_examples=150, derandomize=True, suppress_health_check=slow)
    settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded():
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _no_foreign_handlers():
    """lm-eval's command line gives its logger a handler that writes to the stream of the test that called it: it must
    not outlive that test."""
    logger = logging.getLogger("lm_eval")
    before, propagate = list(logger.handlers), logger.propagate
    yield
    logger.handlers[:], logger.propagate = before, propagate


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)

"""Fixtures of the GPU kernels' tests."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def own_triton_cache(tmp_path_factory):
    """What is compiled here is compiled here, and not found in a user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield

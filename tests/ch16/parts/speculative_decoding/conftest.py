import pytest

from tests.ch16.parts.speculative_decoding.tiny import one_thread_each

one_thread = pytest.fixture(autouse=True)(one_thread_each)

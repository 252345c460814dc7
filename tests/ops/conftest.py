"""Where the tests of CUDA kernels run them."""

import pytest

from tests.helpers.emulator import EmulatedGpu


@pytest.fixture
def gpu(request):
    """The device for a kernel's tensors; "cpu" where the emulator takes the place of a GPU.

    A test asks for it by `@on_gpus`.
    """
    if request.param == "cuda":
        yield "cuda"
    else:
        with EmulatedGpu():
            yield "cpu"

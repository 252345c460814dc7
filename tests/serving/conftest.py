import pytest

from tests.helpers.small_tokenizers import save_model_of_letters


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model_of_letters(tmp_path_factory.mktemp("model"))

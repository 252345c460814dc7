import pytest

from tests.helpers.reply_peers import both_models
from tests.helpers.small_tokenizers import save_model_of_letters


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model_of_letters(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(tokenizer, tmp_path_factory):
    return both_models("gpt2", tmp_path_factory.mktemp("model"), len(tokenizer)).ours

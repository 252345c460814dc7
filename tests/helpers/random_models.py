"""Models with random weights, to be asked as if they had been trained."""

from convai_fast.model import DoubleHeadsModel


def model_that_ranks(config):
    """A new model whose multiple-choice head counts as trained."""
    model = DoubleHeadsModel(config)
    model.head_is_new = False
    return model

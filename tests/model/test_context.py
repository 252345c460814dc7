"""What attention knows of the world, where a model's own tests do not see it."""

import torch

from convai_fast.model.context import without_plans


def test_attention_on_a_gpu_leaves_out_cudnn_and_its_plans():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with without_plans(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled

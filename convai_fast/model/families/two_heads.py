"""transformers' language models with the multiple-choice head that they lack.

What ours are compared with: `convert` checks what it writes, and `benchmark` measures, against it.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SEGMENTS = "speaker_segments"  # a setting that transformers does not know


def with_two_heads(model_class: type["PreTrainedModel"]) -> type["PreTrainedModel"]:
    """`model_class`, one for a causal language model, with arguments, outputs and tensors of ours.

    That head is a linear layer on the hidden state of a candidate's last token, as in transformers'
    double-heads classes of GPT and GPT-2.
    """
    from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput

    class TwoHeads(model_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.multiple_choice_head = nn.Linear(config.hidden_size, 1)
            self.post_init()

        def forward(
            self,
            input_ids: Tensor,
            token_type_ids: Tensor | None = None,
            mc_token_ids: Tensor | None = None,
            labels: Tensor | None = None,
            mc_labels: Tensor | None = None,
            position_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
        ) -> GPT2DoubleHeadsModelOutput:
            """As of `DoubleHeadsModel.forward`."""
            shape, embedding = input_ids.shape, self.get_input_embeddings()
            embedded = embedding(input_ids)
            if token_type_ids is not None and getattr(self.config, SEGMENTS, False):
                embedded = embedded + embedding(token_type_ids)
            hidden = self.model(
                inputs_embeds=embedded.flatten(0, -3),
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
            ).last_hidden_state.view(*shape, -1)
            if mc_token_ids is None:
                mc_token_ids = torch.full(shape[:-1], shape[-1] - 1, device=hidden.device)
            ends = mc_token_ids[..., None, None].expand(*shape[:-1], 1, hidden.shape[-1])
            mc_logits = self.multiple_choice_head(hidden.gather(-2, ends))[..., 0, 0]
            logits = self.lm_head(hidden)
            loss = mc_loss = None
            if labels is not None:
                loss = F.cross_entropy(
                    logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten()
                )
            if mc_labels is not None:
                mc_loss = F.cross_entropy(mc_logits.view(len(mc_labels), -1), mc_labels)
            return GPT2DoubleHeadsModelOutput(
                loss=loss, mc_loss=mc_loss, logits=logits, mc_logits=mc_logits
            )

    return TwoHeads

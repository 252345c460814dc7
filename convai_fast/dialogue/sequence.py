"""The sequence of one candidate, for those who want it as lists: the predecessor's function."""

from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerFast

from convai_fast.dialogue.format import IGNORED
from convai_fast.dialogue.layout import build_sequence, classic
from convai_fast.dialogue.tokenizer import special_ids


class CandidateInput(TypedDict):
    """What the model reads of one candidate; see `build_input_from_segments`."""

    input_ids: list[int]
    token_type_ids: list[int]
    mc_token_ids: int
    lm_labels: list[int]


def build_input_from_segments(
    persona: Sequence[Sequence[int]],
    history: Sequence[Sequence[int]],
    reply: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
    lm_labels: bool = False,
    with_eos: bool = True,
) -> CandidateInput:
    """Build the model's input from persona, history and reply, each a list of token ids.

        [bos] persona…  [speaker] history[0] …  [speaker] history[-1]  [speaker1] reply [eos]

    Speakers alternate backwards from the reply, which is `<speaker1>`; the segment id of a token is
    the speaker token of its part, the persona being `<speaker1>`'s.

    Returns `input_ids` and `token_type_ids` (lists of seq_len ids), `mc_token_ids` (the position of
    the last token) and `lm_labels` (seq_len ids: with `lm_labels=True` the reply's tokens and
    `<eos>`, -100 elsewhere; all -100 otherwise).

    Source: `build_input_from_segments` of huggingface/transfer-learning-conv-ai, whose segment ids
    count from the front and so contradict its speaker tokens when the history has an even number of
    turns; for odd numbers, as in PERSONA-CHAT, the two are identical.
    """
    layout = classic(special_ids(tokenizer))
    input_ids, token_type_ids, labels = build_sequence(persona, history, reply, layout, with_eos)
    return {
        "input_ids": input_ids,
        "token_type_ids": token_type_ids,
        "mc_token_ids": len(input_ids) - 1,
        "lm_labels": labels if lm_labels else [IGNORED] * len(input_ids),
    }

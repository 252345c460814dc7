"""transformers' models as peers of the engine: the same random weights, the plainest loop."""

from types import SimpleNamespace

import torch
import transformers

from convai_fast.dialogue.layout import classic
from convai_fast.dialogue.tokenizer import special_ids
from convai_fast.generation.request import build_prompt
from convai_fast.model import DoubleHeadsModel

SHAPE = dict(n_positions=96, n_embd=32, n_layer=2, n_head=4)


def transformers_model(architecture, vocab_size, seed=0, noise=0.2, **settings):
    """transformers' double-heads model, whose replies differ from prompt to prompt."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": vocab_size, **settings}
    if architecture == "gpt2":
        config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
        model = transformers.GPT2DoubleHeadsModel(config)
    else:
        model = transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**shape))
    # Fresh weights are so small that every reply is one token over and over, whatever the prompt.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "wpe" in name or "positions_embed" in name else noise
            parameter.add_(torch.randn_like(parameter), alpha=std)
    return model.eval()


def both_models(architecture, folder, vocab_size, **settings):
    """The same random weights as transformers' class and as ours, and the folder they are in."""
    theirs = transformers_model(architecture, vocab_size, **settings)
    theirs.save_pretrained(folder)
    return SimpleNamespace(
        architecture=architecture,
        theirs=theirs,
        ours=DoubleHeadsModel.from_pretrained(folder),
        folder=folder,
    )


def prompt_of(request, tokenizer, n_positions):
    room = n_positions - request.params.max_length
    return build_prompt(request, tokenizer, classic(special_ids(tokenizer)), len(tokenizer), room)


def recomputed_reply(theirs, tokenizer, request, processors=()):
    """The greedy reply, the whole sequence computed anew for every token, without any cache.

    Returns its token ids and, for each, its log-probability after bans and `processors`.
    """
    special, params = special_ids(tokenizer), request.params
    input_ids, token_type_ids = prompt_of(request, tokenizer, theirs.config.n_positions)
    reply, logprobs = [], []
    while len(reply) < params.max_length:
        ids = torch.tensor([input_ids + reply])
        with torch.no_grad():
            logits = theirs(
                input_ids=ids[:, None],
                token_type_ids=torch.tensor(
                    [[token_type_ids + [special.speaker1] * len(reply)]],
                ),
                mc_token_ids=torch.tensor([[ids.shape[1] - 1]]),
            ).logits[:, 0, -1]
        for processor in processors:
            logits = processor(ids, logits)
        if len(reply) < params.min_length:
            logits[:, list(special)] = -torch.inf
        token = int(logits.argmax())
        if token in special:
            break
        reply.append(token)
        logprobs.append(logits.log_softmax(-1)[0, token].item())
    return reply, logprobs

"""Small checkpoints as pytorch-pretrained-bert 0.6 and pytorch-transformers 1.x wrote them."""

import json
import string
import tarfile

import torch
import transformers
from tokenizers import pre_tokenizers

LAYOUTS = ("pytorch-pretrained-bert", "pytorch-transformers")
ARCHITECTURES = ("openai-gpt", "gpt2")
SPECIAL = {  # the order of ids in either layout
    "pytorch-pretrained-bert": ["<bos>", "<eos>", "<speaker1>", "<speaker2>", "<pad>"],
    "pytorch-transformers": ["<speaker2>", "<pad>", "<bos>", "<eos>", "<speaker1>"],
}
SIZES = dict(n_positions=32, n_embd=8, n_layer=2, n_head=2)


def write_old_checkpoint(folder, layout, architecture, plain=False):
    """Write a checkpoint of random weights; returns transformers' model with the same weights.

    With `plain`, a language model without special tokens and multiple-choice head.
    """
    folder.mkdir(parents=True)
    vocabulary, merges = _vocabulary(architecture)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    special = [] if plain else SPECIAL[layout]
    rows = len(vocabulary) + len(special)
    peer = _random_peer(architecture, rows)

    tensors = dict(peer.state_dict())
    for layer in range(SIZES["n_layer"]):
        mask = torch.ones(SIZES["n_positions"], SIZES["n_positions"]).tril()[None, None]
        tensors[f"transformer.h.{layer}.attn.bias"] = mask
    if plain:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("multiple_choice_head")}
    config = {"n_ctx": 32, "layer_norm_epsilon": 1e-5, "vocab_size": rows, **SIZES}
    config |= {"afn": "gelu"} if architecture == "openai-gpt" else {}
    if layout == "pytorch-pretrained-bert":
        config |= {"vocab_size": len(vocabulary), "n_special": len(special)}
        tensors = {_oldest_name(name): tensor for name, tensor in tensors.items()}
        if special:
            (folder / "special_tokens.txt").write_text("".join(f"{t}\n" for t in special))
    elif special:
        ids = {token: len(vocabulary) + i for i, token in enumerate(special)}
        (folder / "added_tokens.json").write_text(json.dumps(ids))
        (folder / "special_tokens_map.json").write_text('{"bos_token": "<bos>"}')
        (folder / "tokenizer_config.json").write_text('{"init_inputs": []}')
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return peer


def pack(folder, archive, prefix="run/"):
    """Write the folder's files into a .tar.gz, within a folder of it."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, prefix + file.name)


def _oldest_name(name):
    return name.replace("lm_head.", "lm_head.decoder.").replace("_head.summary.", "_head.linear.")


def _vocabulary(architecture):
    if architecture == "gpt2":
        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
        return {piece: i for i, piece in enumerate(pieces)}, [("t", "h"), ("th", "e")]
    letters = string.ascii_lowercase
    pieces = ["<unk>", *letters, *(letter + "</w>" for letter in letters), "th", "the</w>"]
    return {piece: i for i, piece in enumerate(pieces)}, [("t", "h"), ("th", "e</w>")]


def _random_peer(architecture, rows):
    config_class, model_class = {
        "openai-gpt": (transformers.OpenAIGPTConfig, transformers.OpenAIGPTDoubleHeadsModel),
        "gpt2": (transformers.GPT2Config, transformers.GPT2DoubleHeadsModel),
    }[architecture]
    torch.manual_seed(0)
    config = config_class(vocab_size=rows, bos_token_id=None, eos_token_id=None, **SIZES)
    peer = model_class(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return peer

"""Small tokenizers of chat models: real algorithms and formats, few merges.

The templates are written anew; they write what those of the models write.
"""

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

LINES = [
    "i like tea. do you?\n",
    "hello, how are you today? i'm fine!\n",
    "i have two cats (and a dog...).\n\n",
    "You are a helpful assistant, user.\n",
    "system user assistant INST SYS >>\n [ ] / < > |\n",
    "she said 'no' and 1234 things; \"yes\"?\n",
]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PIECES = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _BYTES]
    )


# How each family cuts a text into words.
_WORDS = {
    "qwen": _split(_PIECES % ""),
    "llama3": _split(_PIECES % "{1,3}"),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def byte_level(family):
    """Byte-level BPE, whose words are those of "qwen", "llama3" or "smollm"."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = _WORDS[family]
    tokenizer.decoder = decoders.ByteLevel()
    if family == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def sentencepiece(prefix):
    """BPE as converted from SentencePiece, with bytes for what has no piece.

    A space precedes each part of a text that special tokens divide ("every part"), as of Llama 2,
    or the first one only ("first part"), as of Mistral v0.3.
    """
    draft = Tokenizer(BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = BpeTrainer(vocab_size=200, show_progress=False, min_frequency=1)
    draft.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    pieces = sorted(draft.get_vocab(), key=draft.get_vocab().get)
    merges = [("▁", "▁")]
    merges += [tuple(pair) for pair in json.loads(draft.to_str())["model"]["merges"]]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁▁"]
    vocabulary += pieces
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if prefix == "every part":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


SMOLLM2 = """
{%- if not messages or messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM.<|im_end|>\\n' -}}
{%- endif -%}
{%- for each in messages -%}
  {{- '<|im_start|>' ~ each.role ~ '\\n' ~ each.content ~ '<|im_end|>' ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
QWEN2_5 = SMOLLM2.replace(
    "a helpful AI assistant named SmolLM", "Qwen, created by Alibaba Cloud. You are helpful"
)
QWEN3 = """
{%- set last = namespace(question=messages|length - 1) -%}
{%- for each in messages if each.role == 'user' -%}
  {%- set last.question = messages.index(each) -%}
{%- endfor -%}
{%- for each in messages -%}
  {%- set text = each.content -%}
  {%- if each.role == 'assistant' and '</think>' in text -%}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' ~ each.role ~ '\\n' -}}
  {%- if each.role == 'assistant' and loop.last and loop.index0 > last.question -%}
    {{- '<think>\\n\\n</think>\\n\\n' ~ text.lstrip('\\n') -}}
  {%- else -%}
    {{- text -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""
LLAMA3 = """
{{- bos_token -}}
{%- set today = date_string or (strftime_now('%d %b %Y') if strftime_now else '26 Jul 2024') -%}
{%- set persona = '' -%}
{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set persona = messages[0].content.strip() -%}
  {%- set rest = messages[1:] -%}
{%- endif -%}
{%- macro header(role) -%}
  {{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' -}}
{%- endmacro -%}
{{- header('system') ~ 'Cutting Knowledge Date: December 2023\\nToday Date: ' ~ today ~ '\\n\\n' -}}
{{- persona ~ '<|eot_id|>' -}}
{%- for each in rest -%}
  {{- header(each.role) ~ each.content.strip() ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
"""
_ALTERNATE = """
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for each in rest -%}
  {%- if each.role != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('roles must alternate, the user first') -}}
  {%- endif -%}
{%- endfor -%}
"""
LLAMA2 = (
    _ALTERNATE
    + """
{%- for each in rest -%}
  {%- set text = each.content -%}
  {%- if loop.first and messages[0].role == 'system' -%}
    {%- set text = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' ~ text -%}
  {%- endif -%}
  {%- if each.role == 'user' -%}
    {{- bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ text.strip() ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
)
ZEPHYR = """
{%- for each in messages -%}
  {{- '<|' ~ each.role ~ '|>\\n' ~ each.content ~ eos_token ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
MISTRAL1 = (
    _ALTERNATE
    + """
{{- bos_token -}}
{%- for each in rest -%}
  {%- if each.role == 'assistant' -%}
    {{- ' ' ~ each.content ~ eos_token -}}
  {%- else -%}
    {%- set persona = loop.first and messages[0].role == 'system' -%}
    {{- ' [INST] ' ~ (messages[0].content ~ '\\n\\n' if persona else '') ~ each.content -}}
    {{- ' [/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""
)
MISTRAL3 = (
    _ALTERNATE
    + """
{{- bos_token -}}
{%- for each in rest -%}
  {%- if each.role == 'assistant' -%}
    {{- ' ' ~ each.content.strip() ~ eos_token -}}
  {%- else -%}
    {%- set persona = loop.last and messages[0].role == 'system' -%}
    {{- '[INST] ' ~ (messages[0].content ~ '\\n\\n' if persona else '') ~ each.content -}}
    {{- '[/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""
)

# Nothing but special tokens stands between texts. A reply is to begin with a thought, which those
# of a conversation lack, as with DeepSeek-R1.
UNMARKED = """
{{- bos_token -}}
{%- for each in messages -%}
  {%- set role = {'user': '<|user|>', 'assistant': '<|assistant|>'}[each.role] or '' -%}
  {{- role ~ each.content ~ (eos_token if each.role == 'assistant' else '') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}
"""

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# Of each: the tokenizer's backend, its special tokens, the beginning and the end of a text.
_MODELS = {
    "smollm2": (lambda: byte_level("smollm"), SMOLLM2, _CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen2.5": (lambda: byte_level("qwen"), QWEN2_5, _CHATML, None, "<|im_end|>"),
    "qwen3": (lambda: byte_level("qwen"), QWEN3, _CHATML, None, "<|im_end|>"),
    "llama3": (lambda: byte_level("llama3"), LLAMA3, _HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "llama2": (lambda: sentencepiece("every part"), LLAMA2, (), "<s>", "</s>"),
    "tinyllama": (lambda: sentencepiece("every part"), ZEPHYR, (), "<s>", "</s>"),
    "mistral0.1": (lambda: sentencepiece("every part"), MISTRAL1, (), "<s>", "</s>"),
    "mistral0.2": (lambda: sentencepiece("first part"), MISTRAL1, (), "<s>", "</s>"),
    "mistral0.3": (
        lambda: sentencepiece("first part"),
        MISTRAL3,
        ("[INST]", "[/INST]"),
        "<s>",
        "</s>",
    ),
    "unmarked": (
        lambda: sentencepiece("first part"),
        UNMARKED,
        ("<|user|>", "<|assistant|>"),
        "<s>",
        "</s>",
    ),
}
CHAT_MODELS = tuple(_MODELS)


@cache
def chat_tokenizer(name):
    """The tokenizer of one of CHAT_MODELS; tests share it, so leave it as it is."""
    backend, template, special, bos, eos = _MODELS[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(),
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>" if bos == "<s>" else None,
        extra_special_tokens=list(special),
        chat_template=template,
    )
    if name == "qwen3":
        tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return tokenizer

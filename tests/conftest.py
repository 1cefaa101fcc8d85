"""Shared by all tests: the repository on the path, two threads, no network, and tiny models with known twins.

The reference for everything that transformers can do is transformers: `twins` builds its LLaMA with random weights and
our Transformer with the same ones. Weights have std 0.2: with the usual 0.02 a tiny model's logits are so small that a
wrong layer hides inside the tolerance.
"""
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # no test may use the network; set before transformers loads
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")             # kernels read it when imported: they run on a CPU then

from hypothesis import settings  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from model import ModelConfig, Transformer  # noqa: E402
from sampling import can_pack  # noqa: E402

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)                                   # tests are many small matrices: more threads only wait

# The same examples on every run, no folder of found examples in the repository, and no time limit on a busy machine.
settings.register_profile("chatpixiu", derandomize=True, database=None, deadline=None)
settings.load_profile("chatpixiu")

needs_packing = pytest.mark.skipif(not can_pack(), reason="this CPU's library packs no bf16 matrices: models sample "
                                                          "with plain ones here, which the other tests see")


def tiny_config(**changes) -> ModelConfig:
    """Every size is another number, so that a mixed-up axis is a shape error: 97 tokens, C 48, 4 heads of 12 over 2."""
    return ModelConfig(**{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 4,
                          "num_kv_heads": 2, "max_positions": 64, "norm_eps": 1e-5, **changes})


def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Every parameter random, biases too; the weights of norms are around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator) * std
            p.copy_(noise + 1 if "norm" in name else noise)
    return model


def tiny_model(seed: int = 0, **changes) -> Transformer:
    return randomize(Transformer(tiny_config(**changes)), seed).eval()


def hf_config(config: ModelConfig, **changes):
    """The same model as transformers describes it."""
    from transformers import LlamaConfig
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
    return LlamaConfig(**{
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "intermediate_size": config.intermediate_size, "hidden_act": names[config.activation],
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions, "rope_parameters": rope,
        "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias, "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **changes})


def hf_state(model: nn.Module) -> dict[str, Tensor]:
    """transformers' weights under our names."""
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def twins(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32):
    """(transformers' LLaMA, our Transformer) with the same random weights."""
    from transformers import LlamaForCausalLM
    # Their plain attention takes its softmax in fp32, whatever the dtype: right for bf16, too coarse for float64.
    theirs = LlamaForCausalLM(hf_config(config, attn_implementation="sdpa" if dtype == torch.float64 else "eager"))
    randomize(theirs, seed).eval()
    for p in theirs.parameters():          # .to(bfloat16) would round their table of RoPE frequencies as well
        p.data = p.data.to(dtype)
    ours = Transformer(config).to(dtype).eval()
    ours.load_state_dict(hf_state(theirs), strict=True)
    return theirs, ours


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value: one number for logits of any size."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max())


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-5, where: object = "") -> None:
    """Fails with the error itself instead of two printed tensors."""
    assert got.shape == expected.shape, (tuple(got.shape), tuple(expected.shape), where)
    found = error(got, expected)
    assert found < tolerance, f"{where} relative error {found:.2e}, allowed {tolerance:.0e}"


def random_ids(batch: int, length: int, seed: int = 0, low: int = 3, high: int = 97) -> Tensor:
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["plain", "library"])
def attention(request, monkeypatch):
    """Both ways to compute attention: plain products (a CPU, short rows) and the library's call (long rows, a GPU)."""
    import model
    if request.param == "library":
        monkeypatch.setattr(model, "SHORT", 0)
    return request.param


# ---------------------------------------------------------------- a tokenizer of bytes

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_tokenizer(folder: Path) -> None:
    """tokenizer.json of a byte-level BPE without merges: 256 bytes and three special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    from data.tokenizer import BYTE_TO_CHAR
    vocab = {char: i for i, char in enumerate(BYTE_TO_CHAR.values())}
    added = [{"id": 256 + i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True}
             for i, t in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "chat_template": CHATML}
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def edit_saved(folder: Path, tensors=None, drop: tuple = (), **config) -> None:
    """A saved model with other tensors (None: without them) and another config."""
    from safetensors.torch import load_file, save_file
    state = load_file(folder / "model.safetensors")
    for name, value in (tensors or {}).items():
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}), encoding="utf-8")

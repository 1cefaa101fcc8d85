"""The names of checkpoints/hub.py: sizes against the parameter counts that were published with the weights, and against
transformers' default configs, which for many families are a published model's.
"""
import dataclasses

import pytest
from test_families import theirs_of

import checkpoints
import lora
import memory
from checkpoints import families, hub

# As the model cards, papers and the hub's file headers count them. A head that is the embedding is counted once ...
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576, "openai-gpt": 116_534_784, "cerebras-gpt-111m": 111e6, "cerebras-gpt-256m": 256e6,
    "cerebras-gpt-590m": 590e6, "cerebras-gpt-2.7b": 2.65e9, "cerebras-gpt-6.7b": 6.66e9, "cerebras-gpt-13b": 12.85e9,
    "wenzhong-3.5b": 3.55e9, "cpm-generate": 2.6e9,
    "gpt-neo-125m": 125_198_592, "gpt-neo-1.3b": 1_315_575_808, "gpt-neo-2.7b": 2_651_307_520,
    "gpt-j-6b": 6_053_381_344, "codegen-350m": 356_712_448, "codegen-2b": 2.78e9, "codegen-6b": 7.07e9,
    "codegen-16b": 16.03e9, "moss-moon-003-base": 16.7e9,
    "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280, "opt-30b": 29_974_540_288, "opt-66b": 65.7e9, "galactica-125m": 125e6,
    "galactica-6.7b": 6.7e9, "galactica-30b": 30e9,
    "santacoder": 1_124_886_528, "starcoder": 15_517_456_384, "starcoderbase-1b": 1.14e9,
    "starcoderbase-3b": 3.04e9, "starcoderbase-7b": 7.3e9, "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840, "starcoder2-15b": 15_957_889_024,
    "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320, "gpt-neox-20b": 20_554_567_680, "dolly-v2-3b": 2_775_208_960,
    "dolly-v2-7b": 6_857_302_016, "dolly-v2-12b": 11_846_072_320, "stablelm-base-alpha-3b": 3_638_525_952,
    "stablelm-base-alpha-7b": 7_869_358_080, "stablelm-3b-4e1t": 2_795_443_200, "stablelm-2-1.6b": 1_644_417_024,
    "stablelm-2-12b": 12_143_605_760,
    "bloom-560m": 559_214_592, "bloom-1b1": 1_065_314_304, "bloom-1b7": 1_722_408_960, "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064, "bloom-176b": 176_247_271_424, "bloomz-7b1": 7_069_016_064,
    "mpt-7b": 6_649_286_656, "mpt-30b": 29.95e9, "falcon-rw-1b": 1_311_625_216, "falcon-40b": 41_303_293_952,
    "falcon-11b": 11_103_109_120,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "gemma-3-4b": 3.88e9,
    "gemma-3-12b": 11.77e9, "gemma-3-27b": 27.0e9, "phi-1.5": 1_418_270_720, "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552, "phi-3-medium": 13_960_238_080, "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760,
    "olmo-1b": 1_176_764_416, "olmo-7b": 6_888_095_744, "olmo-2-1b": 1_484_916_736, "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400, "olmo-2-32b": 32_234_279_936, "nanochat-d20": 560_988_160,
    "nanochat-d32": 1_879_048_192,
    "open-llama-3b": 3_426_473_600, "llama-65b": 65.2e9, "llama-3.3-70b-instruct": 70_553_706_496,
    "smollm3-3b": 3_075_098_624, "mistral-7b-v0.1": 7_241_732_096, "mistral-nemo": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200, "qwen-1_8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544, "qwen-14b": 14_167_290_880, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "yi-34b": 34_388_917_248, "baichuan-7b": 7_000_559_616, "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248, "baichuan2-13b": 13_896_668_160, "internlm-7b": 7.3e9,
    "internlm-20b": 20.1e9, "internlm2-1.8b": 1_889_110_016, "internlm2-7b": 7_737_708_544,
    "internlm2-20b": 19_861_149_696, "deepseek-llm-7b": 6_910_365_696,
    "chatglm-6b": 6_173_286_400, "chatglm2-6b": 6_243_584_000, "chatglm3-6b": 6_243_584_000, "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040, "glm-4-32b-0414": 32_566_081_536, "codegeex-13b": 12.9e9,
    "pangu-alpha-2.6b": 2.6e9,
    "rwkv-4-169m": 169_342_464, "rwkv-4-430m": 430_397_440, "rwkv-4-1b5": 1_515_106_304, "rwkv-4-3b": 2_984_627_200,
    "rwkv-4-7b": 7_393_009_664, "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344, "flan-t5-small": 76_961_152, "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080, "flan-t5-xl": 2_849_757_184, "flan-t5-xxl": 11_135_332_352,
    "mt5-small": 300_176_768, "mt5-base": 582_401_280, "mt5-large": 1_229_581_312, "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280, "chatyuan-large": 770e6}
# ... but some counted it twice.
TWICE = {"falcon-7b": 7_217_189_760, "qwen3-1.7b": 2_031_739_904, "bloom-1b4-zh": 1.4e9,
         "bloom-6b4-zh": 6.4e9}


@pytest.mark.parametrize("name", [*PUBLISHED, *TWICE])
def test_parameters_as_published(name):
    config, published = checkpoints.read_config(name), {**PUBLISHED, **TWICE}[name]
    n = memory.count(config)
    if name in TWICE:
        assert config.tie_embeddings
        n += config.vocab_size * config.hidden_size
    # One per cent: heads padded to another multiple, OPT's two unused positions. ChatYuan's card says "770M".
    assert n == pytest.approx(published, rel=0.02 if published < 1e9 and published % 1e6 == 0 else 0.01), f"{n:,}"


def test_every_group_has_published_counts():
    for title, group in hub.GROUPS.items():
        known = {*PUBLISHED, *TWICE} & set(group)
        assert known or title == "CPM-Ant", title                              # its defaults are tested below


# transformers' class of config -> the name whose config it has by default, but for these fields.
DEFAULTS = {"GPT2": ("gpt2", ()), "OpenAIGPT": ("openai-gpt", ()), "GPTJ": ("gpt-j-6b", ()), "OPT": ("opt-125m", ()),
            "GPTNeo": ("gpt-neo-1.3b", ()), "GPTNeoX": ("gpt-neox-20b", ("activation",)), "Falcon": ("falcon-7b", ()),
            "Gemma": ("gemma-7b", ()), "Gemma2": ("gemma-2-2b", ()), "Phi": ("phi-1.5", ()),
            "Phi3": ("phi-3-mini", ("window",)), "Olmo": ("olmo-7b", ()), "StableLm": ("stablelm-3b-4e1t", ()),
            "Olmo2": ("olmo-2-7b", ("vocab_size", "max_positions", "norm_eps", "rope_theta")),
            "Starcoder2": ("starcoder2-3b", ("max_positions", "rope_theta", "window")), "Llama": ("llama-7b", ()),
            "Mistral": ("mistral-7b-v0.1", ("max_positions", "norm_eps")), "Glm": ("glm-4-9b", ("max_positions",)),
            "Glm4": ("glm-4-9b-0414", ("max_positions", "norm_eps")), "T5": ("t5-small", ()),
            "SmolLM3": ("smollm3-3b", ("max_positions", "rope_theta")), "MT5": ("mt5-small", ("tie_embeddings",)),
            "CodeGen": ("codegen-6b", ("vocab_size", "num_layers")), "CpmAnt": ("cpm-ant-10b", ()),
            "Rwkv": ("rwkv-4-7b", ()), "Mpt": ("mpt-7b", (
                "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"))}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_of_transformers_are_the_same_models(kind):
    transformers = pytest.importorskip("transformers")
    raw, (name, others_differ) = getattr(transformers, kind + "Config")().to_dict(), DEFAULTS[kind]
    theirs = families.to_config(raw, kind)
    found, named = dataclasses.asdict(theirs), dataclasses.asdict(checkpoints.read_config(name))
    assert {k for k in found if found[k] != named[k]} == set(others_differ)


def test_names_are_said_once():
    assert sum(map(len, hub.GROUPS.values())) == len(hub.NAMES) == len({n.lower() for n in hub.NAMES})
    for name, (repo, fields) in hub.NAMES.items():
        known = {f.name for f in dataclasses.fields(hub.config(name))}
        assert set(fields) <= known and repo.count("/") == 1, name


def test_opt_350m_is_counted_as_it_is_loaded():
    """Published 331,196,416: 512 x 50272 in front, both projections, two positions. As loaded: 1024 x 50272, twice."""
    V, narrow, C = 50272, 512, 1024
    rest = 331_196_416 - V * narrow - 2 * narrow * C - 2 * C
    assert memory.count(checkpoints.read_config("opt-350m")) == rest + 2 * V * C


@pytest.mark.parametrize("kind", DEFAULTS)
def test_family_of_a_name_is_that_of_its_files(kind):
    transformers = pytest.importorskip("transformers")
    raw = getattr(transformers, kind + "Config")().to_dict()
    if kind != "Glm":                                      # glm-4-9b's own files have the first names
        assert hub.family(DEFAULTS[kind][0]) == families.find(raw)[0]


def test_every_name_has_a_family():
    assert set(hub.FILES) == set(hub.GROUPS)
    for name in hub.NAMES:
        assert hub.family(name) in families.FAMILIES
        assert checkpoints.our_linears(name, lora.ALL_LINEAR) == lora.ALL_LINEAR


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gptj", "phi3", "falcon 40b", "opt"])
def test_targets_of_a_dry_run_are_those_of_the_run(name, tmp_path):
    """Each linear's name in transformers' model: what a loaded file adapts, and what a bare config is told."""
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    kinds = ("Linear", "Conv1D", "FalconLinear")
    last = {path.rpartition(".")[2] for path, m in theirs.named_modules() if type(m).__name__ in kinds} - {"lm_head"}
    for target in last:
        model = checkpoints.load(tmp_path)[0]
        lora.apply(model, 2, 4.0, (target,), "a")
        adapted = {path.rpartition(".")[2] for path, _ in lora.layers(model, "a")}
        assert adapted == set(checkpoints.our_linears(tmp_path, (target,))), target

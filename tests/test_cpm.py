"""cpm.py against transformers' CpmAnt: prompts, segments, both directions, padding, text. transformers takes id 0 for
padding, so no real token here is 0; its pads stand on the left only, ours also on the right."""
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_close, error, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
import sft
from common import UserError

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "parity" / "cpmant" / "base"


def theirs(folder: Path, seed: int = 0, **changes):
    from transformers import CpmAntConfig, CpmAntForCausalLM
    config = CpmAntConfig(**{"vocab_size": 97, "hidden_size": 48, "num_attention_heads": 4, "dim_head": 10,
                             "dim_ff": 72, "num_hidden_layers": 3, "position_bias_num_buckets": 16,
                             "position_bias_max_distance": 20, "prompt_types": 4, "prompt_length": 6,
                             "segment_types": 5, **changes})
    model = CpmAntForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.2 * torch.randn(p.shape, generator=generator)
            p.copy_(noise + 1 if "layernorm" in name else 4 * noise if "bias" in name else noise)
    model.save_pretrained(folder)
    return model


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    T = max(lengths)
    ids, mask = random_ids(len(lengths), T), torch.zeros(len(lengths), T, dtype=torch.int64)
    for row, n in zip(mask, lengths):
        row[T - n if side == "left" else 0:T if side == "left" else n] = 1
    return ids * mask, mask


@pytest.mark.parametrize("changes", [{}, {"prompt_length": 1}, {"segment_types": 3, "prompt_types": 3}, {"eps": 1e-2}],
                         ids=str)
@pytest.mark.parametrize("T", [1, 2, 13, 40])
def test_logits_are_transformers(tmp_path, changes, T):
    reference, ids = theirs(tmp_path, **changes), random_ids(3, T)
    ours, _ = checkpoints.load(tmp_path)
    with torch.no_grad():
        assert_close(ours(ids), reference(ids).logits, 2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tmp_path, side):
    reference = theirs(tmp_path)
    ours, _ = checkpoints.load(tmp_path)
    ids, mask = padded([3, 25, 11], side)
    with torch.no_grad():
        got = ours(ids, mask)
        assert bool(torch.isfinite(got).all())
        for row, real, out in zip(ids, mask > 0, got):
            assert_close(out[real], reference(row[real][None]).logits[0], 2e-5)
        if side == "left":
            assert_close(got[mask > 0], reference(ids).logits[mask > 0], 2e-5)


def test_it_reads_in_both_directions(tmp_path):
    theirs(tmp_path)
    model, _ = checkpoints.load(tmp_path)
    ids = random_ids(1, 9)
    other = ids.clone()
    other[0, -1] = 5 if ids[0, -1] != 5 else 6
    with torch.no_grad():
        assert error(model(ids)[:, 0], model(other)[:, 0]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_is_transformers(tmp_path, side):
    """The prompt is read in both directions once; what is written afterwards looks back only."""
    reference = theirs(tmp_path, seed=1)
    ours, _ = checkpoints.load(tmp_path)
    ids, mask = padded([4, 17, 9], side)
    new = ours.generate(ids, 12, mask, 0.0)
    for row, real, text in zip(ids, mask > 0, new):
        prompt = row[real][None]
        expected = reference.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        if 0 in expected[0, prompt.shape[1]:-1]:
            continue                                       # from an id 0 on transformers sees padding where a word is
        assert text.tolist() == expected[0, prompt.shape[1]:].tolist()
    assert 0 not in new[:, :-1] and len(set(new.flatten().tolist())) > 4       # no row was left out
    end = int(new[0, 3])
    for text, whole in zip(ours.generate(ids, 12, mask, 0.0, eos_ids=[end], pad_id=96).tolist(), new.tolist()):
        n = whole.index(end) + 1 if end in whole else len(whole)
        assert text[:n] == whole[:n] and set(text[n:]) <= {96}


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"no sample in {SAMPLE}")
def test_sample():
    model, ref = checkpoints.load(SAMPLE / "ckpt")[0], torch.load(SAMPLE / "ref.pt", weights_only=True)
    mask = ref["padded_attention_mask"]
    with torch.no_grad():
        assert_close(model(ref["input_ids"]), ref["logits"], 1e-5)
        assert_close(model(ref["padded_input_ids"], mask)[mask > 0], ref["padded_logits"][mask > 0], 1e-5)
    assert torch.equal(model.generate(ref["prompt_ids"], 12, temperature=0.0), ref["generated"])


def test_bf16_stays_close(tmp_path):
    theirs(tmp_path)
    exact, half = (checkpoints.load(tmp_path, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    ids, mask = padded([6, 19], "left")
    with torch.no_grad():
        got = half(ids, mask)[mask > 0]
        assert got.dtype == torch.bfloat16 and error(got, exact(ids, mask)[mask > 0]) < 0.06
    assert half.generate(ids, 4, mask, 0.0).shape == (2, 4)


def test_checkpointing_gives_the_same_gradients(tmp_path):
    theirs(tmp_path)
    grads = []
    for on in (False, True):
        model = checkpoints.load(tmp_path, dtype=torch.float64)[0]
        model.checkpointing = on
        model(random_ids(2, 9)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert_close(a, b, 1e-9)


# ---------------------------------------------------------------- files

def rewrite(folder: Path, **tensors) -> None:
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_saved_directories_are_transformers_too(tmp_path):
    from transformers import CpmAntForCausalLM
    theirs(tmp_path / "a")
    model, ids = checkpoints.load(tmp_path / "a")[0], random_ids(2, 9)
    checkpoints.save(model, None, tmp_path / "b")
    reference, again = CpmAntForCausalLM.from_pretrained(tmp_path / "b").eval(), checkpoints.load(tmp_path / "b")[0]
    with torch.no_grad():
        assert_close(reference(ids).logits, model(ids), 2e-5)
        assert torch.equal(again(ids), model(ids)) and again.config == model.config


def test_a_head_that_is_the_embedding(tmp_path):
    """Old files have none of their own, or one with the rows of the prompts."""
    theirs(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["cpmant.input_embedding.weight"]
    for head in (None, embedding.clone()):
        rewrite(tmp_path, lm_head__weight=head)
        model, _ = checkpoints.load(tmp_path)
        assert torch.equal(model.lm_head.weight, embedding[:97]) and model.embed_tokens.weight.shape == (97 + 24, 48)


@pytest.mark.parametrize("name, value, says", [
    ("cpmant__segment_embedding__weight", None, "cpmant.segment_embedding.weight is missing"),
    ("cpmant__segment_embedding__weight", torch.zeros(4, 48), r"\(4, 48\), the config asks for \(5, 48\)"),
    ("cpmant__encoder__layers__2__self_att__layernorm_before_attention__weight", None, "layers.2.self_att"),
    ("cpmant__more__weight", torch.zeros(3), "cpmant.more.weight of model.safetensors has no place"),
    ("cpmant__position_bias__relative_attention_bias", torch.zeros(40, 4), r"\(40, 4\), the config asks for \(41, 4\)"),
    ("lm_head__weight", torch.zeros(98, 48), r"lm_head.weight is \(98, 48\)")])
def test_bad_files_are_named(tmp_path, name, value, says):
    theirs(tmp_path)
    rewrite(tmp_path, **{name: value})
    with pytest.raises(UserError, match=says) as caught:
        checkpoints.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_training_would_see_the_answers_and_is_refused(tmp_path):
    theirs(tmp_path / "base")
    raw = json.loads((tmp_path / "base/config.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == "cpmant"
    with pytest.raises(UserError, match="reads in both directions"):
        sft.main(sft.Config(init=str(tmp_path / "base"), out_dir=str(tmp_path / "out"), device="cpu", dtype="fp32"))

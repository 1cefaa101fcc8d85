"""Families that transformers lacks or writes in other names today (remote_cases.py): logits, padding on either side,
cached generation and the way back, each against a reference that has no line in common with the loader.
"""
import json

import pytest
import reference
import torch
from conftest import error, random_ids
from remote_cases import CASES, CHATGLM, COHERE, GLM2, GLM10, GMASK, MASK, SMASK, SOP, C, tensors, words, write
from safetensors.torch import load_file
from torch import Tensor

import checkpoints
from checkpoints import families
from common import UserError
from model import prefix_layout

TOLERANCE = 7e-6                          # relative to the largest logit; the largest error seen is 3.5e-6


@pytest.fixture(scope="module", params=CASES)
def loaded(request, tmp_path_factory):
    """(case, reference of the file's tensors, our model)"""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("model")
    state = tensors(case)
    state = {n: t.half().float() for n, t in state.items()} if "fp16" in case.form else state
    write(case, folder, state)
    with torch.no_grad():
        yield case, case.reference(state), checkpoints.load(folder)[0]


def padded(texts: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Texts of different lengths in one batch; the padding is a token that means something."""
    T = max(map(len, texts))
    rows = [[SOP] * (T - len(t)) + t if left else t + [SOP] * (T - len(t)) for t in texts]
    mask = [[0] * (T - len(t)) + [1] * len(t) if left else [1] * len(t) + [0] * (T - len(t)) for t in texts]
    return torch.tensor(rows), torch.tensor(mask)


def test_logits(loaded):
    case, reference, ours = loaded
    for text in case.texts:
        assert error(ours(torch.tensor([text]))[0], reference(text)) < TOLERANCE


def test_long_texts_take_the_library_path(loaded, monkeypatch):
    import model
    monkeypatch.setattr(model, "SHORT", 0)
    case, reference, ours = loaded
    assert error(ours(torch.tensor(case.texts[:1]))[0], reference(case.texts[0])) < TOLERANCE


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding(loaded, left):
    """Every row of a batch as if it were alone."""
    case, reference, ours = loaded
    ids, mask = padded([*case.prompts, case.texts[0]] if case.generate else case.prompts, left)
    logits = ours(ids, mask)
    for row, (text, real) in enumerate(zip([*case.prompts, case.texts[0]], mask)):
        assert error(logits[row][real > 0], reference(text)) < TOLERANCE, row


def test_greedy_text(loaded):
    """With a cache, prompts of three lengths in one batch; the reference reads the whole text again for every token."""
    case, reference, ours = loaded
    if not case.generate:
        pytest.skip("RoPE changes with the length: a cache keeps what was turned for the shorter text, as upstream")
    expected = []
    for prompt in case.prompts:
        text = list(prompt)
        for _ in range(8):
            text.append(int(reference(text)[-1].argmax()))
        expected.append(text[len(prompt):])
    ids, mask = padded(case.prompts, left=True)
    assert ours.generate(ids, 8, mask, temperature=0.0).tolist() == expected


def test_the_way_back(loaded, tmp_path):
    """save writes the family's own layout again: the reference reads it, and so do we."""
    case, _, ours = loaded
    generator = torch.Generator().manual_seed(1)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    for p in ours.parameters():                                                # as if trained: not what was read
        p.add_(0.01 * torch.randn(p.shape, generator=generator))
    try:
        ids = torch.tensor([case.texts[1]])
        checkpoints.save(ours, None, tmp_path)
        assert error(checkpoints.load(tmp_path)[0](ids), ours(ids)) < 1e-6
        kind = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"]
        assert kind == (case.raw["model_type"] if case.back == "own" else case.back)
        if case.back == "own":
            written = load_file(tmp_path / "model.safetensors")
            assert {n: tuple(t.shape) for n, t in written.items()} == case.shapes
            reference = case.reference(written)
            assert error(ours(ids)[0], reference(case.texts[1])) < TOLERANCE
    finally:
        for name, p in ours.named_parameters():
            p.copy_(before[name])


# ---------------------------------------------------------------- what the cases above cannot say

@pytest.mark.parametrize("vocabulary, sop, gmask, mask", [(130528, 130004, 130001, 130000),
                                                          (150528, 150004, 150001, 150000)])
def test_both_vocabularies_of_chatglm_6b(vocabulary, sop, gmask, mask, tmp_path):
    """A config that does not name the special tokens, as of the first release; the size says which they are."""
    raw = {k: v for k, v in CHATGLM.items() if not k.endswith("_token_id")} | {
        "vocab_size": vocabulary, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "inner_hidden_size": 64}
    case = CASES["chatglm-6b"]
    small = {n: tuple({C: 16, 3 * C: 48, 4 * C: 64}.get(size, vocabulary) for size in shape)
             for n, shape in case.shapes.items() if ".1." not in n and ".2." not in n}
    state = tensors(type(case)(raw, small, case.reference))
    write(type(case)(raw, small, case.reference), tmp_path, state)
    text = [*words(5, 1), mask, *words(4, 2), gmask, sop, *words(9, 3)]
    named = raw | {"bos_token_id": sop, "gmask_token_id": gmask, "mask_token_id": mask}
    with torch.no_grad():
        ours = checkpoints.load(tmp_path)[0]
        assert error(ours(torch.tensor([text]))[0], reference.chatglm_6b(state, named, text)) < TOLERANCE


@pytest.mark.parametrize("vocabulary, ids", [
    (50304, (50257, 50263, 50260, 50264)), (50048, (50006, 50009, 50003, 50008)), (97, (SOP, GMASK, MASK, SMASK))])
def test_special_tokens_of_glm_10b(vocabulary, ids):
    raw = GLM10 if vocabulary == 97 else {k: v for k, v in GLM10.items() if k != "smask_token_id"}
    assert families.to_config(raw | {"vocab_size": vocabulary}, "x").prefix_ids == ids


@pytest.mark.parametrize("ratio, length, name, theta, factor", [
    (4, 32768, None, 1e4, 4.0), (4, 32768, "THUDM/chatglm2-6b-32k", 1e4, 4.0),         # ChatGLM2-6B-32k
    (50, 32768, "THUDM/chatglm3-6b-32k", 5e5, None), (500, 131072, None, 5e6, None),   # ChatGLM3-6B-32k, GLM-4-9B
    (10000, 1048576, None, 1e8, None), (1, 8192, "THUDM/chatglm2-6b", 1e4, None)])     # GLM-4-9B-1M, ChatGLM2-6B
def test_what_rope_ratio_means(ratio, length, name, theta, factor):
    """Two meanings of one key: positions divided by it, or theta multiplied."""
    raw = GLM2 | {"rope_ratio": ratio, "seq_length": length, "_name_or_path": name}
    config = families.to_config(raw, "config.json")
    assert (config.rope_theta, (config.rope_scaling or {}).get("factor")) == (theta, factor)


def test_the_hole_of_a_text_with_several():
    """a [MASK] b [gMASK] <sop> x: ChatGLM-6B fills [gMASK] (position 3), GLM-10B the first hole (position 1)."""
    ids, ones = torch.tensor([[20, MASK, 21, GMASK, SOP, 22]]), torch.ones(1, 6, dtype=torch.int64)
    count = torch.arange(6)[None]
    for earliest, hole in ((False, 3), (True, 1)):
        positions, blocks, context = prefix_layout(ids, ones, count, (SOP, GMASK, MASK), earliest)
        assert positions.tolist() == [[0, 1, 2, 3, hole, hole]]
        assert blocks.tolist() == [[0, 0, 0, 0, 1, 2]] and context.tolist() == [[True] * 4 + [False] * 2]


def test_a_reward_model_from_pangu_keeps_its_order(tmp_path):
    """Whether the final norm comes before the last layer was told by `architectures`, which a reward model sets."""
    case, ids = CASES["pangu"], random_ids(2, 9)
    (tmp_path / "there").mkdir()
    write(case, tmp_path / "there", tensors(case))
    with torch.no_grad():
        ours = checkpoints.load(tmp_path / "there")[0]
        checkpoints.save(ours, None, tmp_path / "reward", head=torch.ones(1, C))
        again = checkpoints.load(tmp_path / "reward")[0]
        assert again.config.top_query == "before" and error(again.hidden(ids), ours.hidden(ids)) < 1e-6


@pytest.mark.parametrize("raw, found", [
    ({"model_type": "cohere", **COHERE, "use_qk_norm": True}, "use_qk_norm: Command R"),
    ({**CASES["olmo's first"].raw, "alibi": True}, r"an OLMo with \['alibi'\]"),
    ({**CASES["olmo's first"].raw, "activation_type": "gelu"}, "another activation or without RoPE"),
    ({**GLM2, "rmsnorm": False}, "rmsnorm or post_layer_norm is off"),
    ({**GLM2, "model_type": "chatglm4"}, "model_type 'chatglm4' is not a family that is known; known: .*qwen,")])
def test_what_is_not_supported_is_an_error(raw, found):
    with pytest.raises(UserError, match=found):
        families.to_config(raw, "config.json")


def test_tables_in_tables_of_something_else_are_refused(tmp_path):
    case = CASES["codegeex"]
    write(case, tmp_path, tensors(case))
    torch.save({"module": {"language_model": {"embedding": {"step": 3}}}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no table of tensors; it holds dict"):
        checkpoints.load(tmp_path)


"""reward.py: Bradley-Terry by hand, the one index at which the reward is read, and the head that must survive being
saved.

The ids in brackets (R1, R16, ...) number the details of reward modelling; each test is named after the mistake it
finds.
"""
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, random_ids, tiny_model
from torch import Tensor

import checkpoints
import common
import lora
import reward
from data import batch as data_batch
from reward import RewardModel

REPO = Path(__file__).resolve().parents[1]
WORLD = common.World(torch.device("cpu"), torch.float32)
END, PAD = 2, 0
TOKENIZER = SimpleNamespace(eos_ids=[END], pad_id=PAD, decode=lambda ids: " ".join(map(str, ids)))


def full_model(seed: int = 0, **changes) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(tiny_model(seed, **changes))


def adapter_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> RewardModel:
    """A reward adapter after some training (B is not zero), with a shift."""
    model = tiny_model(seed).to(dtype)
    torch.manual_seed(seed)
    lora.apply(model, 4, 8.0, name="reward")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora.parameters(model, "reward"):
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        judge = RewardModel(model, "reward")
        judge.head.bias.fill_(0.37)
    return judge


def answers(lengths=(4, 9, 6), seed: int = 0) -> list[list[int]]:
    return [[*random_ids(1, n - 1, seed + i)[0].tolist(), END] for i, n in enumerate(lengths)]


# ---------------------------------------------------------------- the loss

def test_r5_pair_loss_by_hand():
    """(R5) chosen 1, rejected 0: log(1 + e^-1) = log 1.36788 = 0.3133; a tie: log 2 = 0.6931; their mean 0.5032."""
    one, zero = torch.tensor([1.0]), torch.tensor([0.0])
    assert reward.pair_loss(one, zero).item() == pytest.approx(0.3133, abs=5e-5)
    assert reward.pair_loss(zero, zero).item() == pytest.approx(0.6931, abs=5e-5)
    both = reward.pair_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert both.item() == pytest.approx(0.5032, abs=5e-5)


@pytest.mark.parametrize("margin, loss, slope", [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_r5_pair_loss_is_finite_for_any_margin(margin, loss, slope):
    """(R5) log(sigmoid(-10000)) would be log 0; -logsigmoid is 10000 with slope -1, and 0 with slope 0 on the other
    side."""
    chosen = torch.tensor([margin], requires_grad=True)
    found = reward.pair_loss(chosen, torch.zeros(1))
    found.backward()
    assert found.item() == pytest.approx(loss) and chosen.grad.item() == pytest.approx(slope)


def test_r6_two_ranked_answers_are_a_pair():
    """(R6) K = 2: the ranking loss is the pair loss, value and gradient."""
    scores = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    listwise = torch.autograd.grad(reward.ranking_loss(scores), scores)[0]
    pairwise = torch.autograd.grad(reward.pair_loss(scores[:, 0], scores[:, 1]), scores)[0]
    assert_close(reward.ranking_loss(scores)[None], reward.pair_loss(scores[:, 0], scores[:, 1])[None], 1e-6)
    assert_close(listwise, pairwise, 1e-6)


def test_r6_four_ranked_answers_are_the_mean_of_six_pairs():
    """(R6) K = 4: the mean over the 6 pairs (i better than j), not their sum, value and gradient."""
    scores = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    explicit = sum(-F.logsigmoid(scores[i] - scores[j]) for i, j in combinations(range(4), 2)) / 6
    assert_close(reward.ranking_loss(scores)[None], explicit[None], 1e-6)
    expected = torch.autograd.grad(explicit, scores)[0]
    assert_close(torch.autograd.grad(reward.ranking_loss(scores), scores)[0], expected, 1e-6)


def test_r6_a_prompt_counts_once_however_many_answers_it_has():
    """(R6) group_loss over 2, 4 and 3 answers: the sum of three prompts' means, not the mean over 1 + 6 + 3 pairs."""
    scores = torch.randn(9, generator=torch.Generator().manual_seed(2))
    total, margins = reward.group_loss(scores, [2, 4, 3])
    groups = scores[:2], scores[2:6], scores[6:]
    assert_close(total[None], sum(reward.ranking_loss(g) for g in groups)[None], 1e-6)
    assert margins.tolist() == [float(g[0] - g[-1]) for g in groups] and not margins.requires_grad


def test_r11_the_centre_term():
    """(R11) chosen 2, rejected 1, weight 0.01: + 0.01 (2 + 1)^2 = 0.09, and 0.01 * 2 * 3 = 0.06 in both gradients."""
    scores = torch.tensor([2.0, 1.0], requires_grad=True)
    plain, centred = (reward.group_loss(scores, [2], c)[0] for c in (0.0, 0.01))
    assert (centred - plain).item() == pytest.approx(0.09, abs=1e-6)
    slope = torch.autograd.grad(centred - plain, scores)[0]
    assert slope.tolist() == pytest.approx([0.06, 0.06], abs=1e-6)


def test_micro_batches_add_up_to_the_step():
    """The step of main, by gradient descent at rate 1: micro-batches divided by the prompts of the step sum to the
    gradient of the big batch, with unequal group sizes; loss, margin and accuracy are those of the whole step."""
    groups = [{"sequences": answers((5, 8)[:2] if i % 2 else (4, 6, 9), seed=10 * i)} for i in range(4)]

    def moved(size: int, grad_clip: float = 0.0) -> tuple[Tensor, dict]:
        judge = full_model()
        judge.model.double().lm_head.requires_grad_(False)
        trained = [p for p in judge.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        cfg = reward.Config(micro_batch=size, lora_r=0, grad_clip=grad_clip)
        figures = reward.improve(judge, groups, torch.optim.SGD(trained, lr=1.0), TOKENIZER, cfg, WORLD, 0)
        return torch.cat([(p.detach() - b).flatten() for p, b in zip(trained, before)]), figures

    whole, figures = moved(4)
    judge = full_model()
    judge.model.double()
    loss, margins = reward.group_loss(judge(*reward.collate(groups, PAD, "cpu")[:2]), [3, 2, 3, 2])
    assert figures["loss"] == pytest.approx(loss.item() / 4, rel=1e-6) and figures["lr"] == 1.0
    assert figures["margin"] == pytest.approx(margins.mean().item(), rel=1e-5)
    assert figures["accuracy"] == (margins > 0).float().mean() and figures["grad_norm"] == pytest.approx(whole.norm())
    for size in (1, 3):
        parts, same = moved(size)
        assert_close(parts, whole, 1e-6)
        assert all(same[name] == pytest.approx(x, rel=1e-5) for name, x in figures.items() if name != "tokens_per_sec")
    assert moved(3, grad_clip=0.1)[0].norm() == pytest.approx(0.1, rel=1e-4)


# ---------------------------------------------------------------- the head

def test_r1_head_starts_with_std_one_over_root_d_plus_one():
    """(R1) d = 48: std 1/sqrt(49) = 0.143, not 1/49 = 0.020 and not nn.Linear's 1/sqrt(3 d) = 0.083; bias 0."""
    model = tiny_model()
    torch.manual_seed(0)
    heads = [RewardModel(model).head for _ in range(200)]
    weights = torch.cat([h.weight.flatten() for h in heads])
    assert weights.std().item() == pytest.approx(1 / 7, rel=0.03), weights.std()
    assert abs(weights.mean().item()) < 0.005
    assert all(not h.bias.any() and not h.bias.requires_grad for h in heads)


def test_r1_first_scores_are_of_order_one():
    """(R1) Hidden states behind an RMS norm have length sqrt(d), so the first scores have a std near 1."""
    scores = torch.stack([full_model(seed)(random_ids(8, 6, seed)) for seed in range(12)])
    assert 0.3 < scores.std().item() < 3, scores.std()


def test_r17_head_and_scores_are_fp32_on_a_bf16_base():
    """(R17) bf16 has three digits: different answers would tie. The head multiplies the hidden state in fp32."""
    judge = adapter_model(dtype=torch.bfloat16)
    assert judge.head.weight.dtype == torch.float32
    ids = random_ids(2, 7)
    scores = judge(ids)
    with lora.use(judge.model, "reward"):
        h = judge.model.hidden(ids)
    assert h.dtype == torch.bfloat16 and scores.dtype == torch.float32
    expected = (h[:, -1].double() * judge.head.weight.double()).sum(-1) + 0.37
    assert_close(scores, expected.float(), 1e-6)
    assert (scores.bfloat16().float() != scores).any(), "rounded to bf16 somewhere"


def test_the_reward_is_read_by_hand():
    """With a head that picks out one coordinate the score is that coordinate of the last hidden state, after the final
    norm once and not twice, plus the bias."""
    judge = full_model()
    with torch.no_grad():
        judge.head.weight.zero_()[0, 5] = 1.0
        judge.head.bias.fill_(0.25)
    ids = random_ids(3, 8)
    assert_close(judge(ids), judge.model.hidden(ids)[:, -1, 5] + 0.25, 1e-6)


# ---------------------------------------------------------------- where the reward is read

def test_last_real_from_masks():
    """[[0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]] -> [2, 1, 0, 2]"""
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    assert reward.last_real(mask).tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("make", [full_model, adapter_model])
@pytest.mark.parametrize("pad_id", [PAD, END, 50])
@torch.no_grad()
def test_r2_r3_r4_score_does_not_depend_on_padding_or_company(make, pad_id):
    """(R2, R3, R4) One answer alone; with 1 and 7 pads on its right; with 1 and 7 on its left, where positions must
    still count from its first token; in a batch with others on either side: the same score. Also with pad == eos."""
    judge = make()
    rows = answers()
    alone = torch.cat([judge(torch.tensor([row])) for row in rows])
    near = 1e-5 * float(alone.abs().max())                    # one of the scores is close to zero
    for side in ("right", "left"):
        for extra in (0, 1, 7):
            ids, mask = data_batch.pad(rows, pad_id, side=side)
            ids = F.pad(ids, (extra, 0) if side == "left" else (0, extra), value=pad_id)
            mask = F.pad(mask, (extra, 0) if side == "left" else (0, extra))
            assert_close(judge(ids, mask), alone, 1e-5, (side, extra, pad_id))
            for i in range(3):
                assert abs(float(judge(ids[i:i + 1], mask[i:i + 1]) - alone[i])) <= near, (side, extra, i)


@torch.no_grad()
def test_r2_an_end_token_inside_the_prompt_is_not_the_end():
    """(R2) A prompt of several turns holds end tokens of its own: the reward is read at the last one."""
    judge, row = full_model(), [5, END, 6, 7, END, 8, END]
    ids, mask = data_batch.pad([row, row[:3]], END)
    values = judge.values(torch.tensor([row]))
    assert_close(judge(ids, mask)[:1], values[:, -1], 1e-5)
    assert abs(float(values[0, -1] - values[0, 1])) > 1e-3


def test_values_are_one_number_after_every_token():
    """values (B, T): entry t knows tokens 0..t and nothing later; the last is the score."""
    judge, ids = full_model(), random_ids(2, 6)
    values = judge.values(ids)
    assert values.shape == (2, 6) and torch.equal(values[:, -1], judge(ids))
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 97
    moved = (judge.values(changed) - values).abs() > 1e-6
    assert moved.tolist() == [[False] * 3 + [True] * 3] * 2


@torch.no_grad()
def test_r9_swapping_chosen_and_rejected_negates_the_margin():
    """(R9) Both answers go through in one batch; neither the order nor the neighbour leaves a trace in the margin."""
    judge = full_model()
    good, bad = answers((9, 5))

    def margin(sequences: list[list[int]]) -> float:
        ids, mask, sizes = reward.collate([{"sequences": sequences}], PAD, "cpu")
        return float(reward.group_loss(judge(ids, mask), sizes)[1])

    assert margin([good, bad]) == pytest.approx(-margin([bad, good]), rel=1e-6) and margin([good, bad]) != 0


@torch.no_grad()
def test_r9_adapter_is_off_outside_the_reward_role():
    """The reward computes with its adapter, whatever is switched on around it, and leaves that as it was."""
    judge, ids = adapter_model(), random_ids(2, 6)
    bare, expected = judge.model(ids), judge(ids)
    with lora.use(judge.model, None):
        assert torch.equal(judge(ids), expected)
        assert torch.equal(judge.model(ids), bare)
    assert not torch.equal(judge.head(judge.model.hidden(ids)[:, -1].float()).squeeze(-1), expected)


# ---------------------------------------------------------------- the scale

@torch.no_grad()
@pytest.mark.parametrize("make", [full_model, adapter_model])
def test_r10_normalised_to_mean_zero_and_std_one(make):
    """(R10) After normalize the same answers have mean 0 and std 1, in the same order, also from a shift that is not
    zero; doing it again changes nothing."""
    judge, ids = make(), random_ids(40, 7)
    before = judge(ids)
    judge.normalize(before)
    after = judge(ids)
    assert abs(after.mean().item()) < 1e-5 and after.std().item() == pytest.approx(1, abs=1e-5)
    assert before.argsort().tolist() == after.argsort().tolist()
    assert_close(after, (before - before.mean()) / before.std(), 1e-5)
    judge.normalize(after)
    assert_close(judge(ids), after, 1e-5)


@torch.no_grad()
def test_r10_equal_scores_do_not_blow_up():
    judge = full_model()
    judge.normalize(torch.full((8,), 3.0))
    assert torch.isfinite(judge.head.weight).all() and torch.isfinite(judge.head.bias).all()


def test_r10_reference_scores_are_of_good_and_bad_answers():
    """Up to normalize_on answers over all groups, in order, in micro-batches: the scores of a plain call."""
    judge = full_model()
    groups = [{"sequences": answers((4, 7), seed=i)} for i in range(5)]
    rows = [row for group in groups for row in group["sequences"]][:7]
    cfg = reward.Config(micro_batch=2, normalize_on=7, lora_r=4)
    got = reward.reference_scores(judge, groups, TOKENIZER, cfg, WORLD)
    assert_close(got, torch.cat([judge(torch.tensor([row])) for row in rows]), 1e-5)


# ---------------------------------------------------------------- held-out accuracy

def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96, z^2 = 3.8416: centre (0.8 + 0.19208) / 1.38416 = 0.71674; half width
    1.96 / 1.38416 * sqrt(0.8 * 0.2 / 10 + 3.8416 / 400) = 1.41602 * 0.16001 = 0.22658  ->  0.4902 .. 0.9433"""
    assert reward.accuracy_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_wilson_interval_stays_inside_zero_and_one():
    """10 of 10: 0.7225 .. 1, where +-2 standard errors would say 1 .. 1."""
    low, high = reward.accuracy_interval(10, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1.0, abs=1e-9)
    assert reward.accuracy_interval(0, 10) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def first_token_judge(ids: Tensor, mask: Tensor) -> Tensor:
    """Scores an answer by its first id."""
    return ids[:, 0].float()


HELD = [{"sequences": [[9, 1, 1, END], [4, END]], "prompt_len": 1, "where": "a:1"},         # right; longer wins
        {"sequences": [[3, END], [8, 1, END]], "prompt_len": 1, "where": "a:2"},            # wrong; shorter wins
        {"sequences": [[9, 1, END], [6, 1, END], [7, 1, 1, END]], "prompt_len": 1, "where": "a:3"}]


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_r18_accuracy_margin_and_longer_wins_by_hand(micro_batch):
    """(R18) Five pairs: 9>4 yes, 3>8 no, 9>6 yes, 9>7 yes, 6>7 no: 3/5. Margins 5 - 5 + 3 + 2 - 1 = 4: 0.8. The longer
    answer is the better one in: 4 against 2 yes, 2 against 3 no, 3 against 3 half, 3 against 4 no, no: 1.5/5."""
    cfg = reward.Config(micro_batch=micro_batch, lora_r=4)
    measured = reward.evaluate(first_token_judge, HELD, TOKENIZER, cfg, WORLD)
    assert measured["eval/pairs"] == 5 and measured["eval/accuracy"] == pytest.approx(0.6)
    assert measured["eval/margin"] == pytest.approx(0.8) and measured["eval/longer_wins"] == pytest.approx(0.3)
    by_hand = [math.log1p(math.exp(-5)), math.log1p(math.exp(5)), sum(math.log1p(math.exp(-m)) for m in (3, 2, -1)) / 3]
    assert measured["eval/loss"] == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    interval = measured["eval/accuracy_low"], measured["eval/accuracy_high"]
    assert interval == pytest.approx(reward.accuracy_interval(3, 5))


def test_held_out_ties_are_not_counted_as_right():
    same = [{"sequences": [[5, END], [5, 1, END]], "prompt_len": 1, "where": "a:1"}]
    assert reward.evaluate(first_token_judge, same, TOKENIZER, reward.Config(lora_r=4), WORLD)["eval/accuracy"] == 0
    assert reward.evaluate(first_token_judge, [], TOKENIZER, reward.Config(lora_r=4), WORLD) == {}


@pytest.mark.parametrize("make", [adapter_model, full_model])
def test_check_saved_reads_the_file_and_moves_the_padding(tmp_path, make, monkeypatch):
    """Sound: both differences are 0. A head that comes back as another one, or a score that is read in the last
    column, is seen. A whole model is not read a second time."""
    what = tmp_path, HELD * 3, TOKENIZER, reward.Config(micro_batch=2, lora_r=4), WORLD
    reward.save(make(), None, tmp_path, base="base")
    found = reward.check_saved(make(), *what)
    assert found.pop("eval/padding_gap") < 1e-6
    assert found == ({"eval/saved_gap": 0.0} if make is adapter_model else {})
    judge = make()
    with torch.no_grad():
        judge.head.weight[0, 0] += 1e-3
    assert make is not adapter_model or reward.check_saved(judge, *what)["eval/saved_gap"] > 1e-6
    monkeypatch.setattr(reward, "last_real", lambda mask: torch.full((len(mask),), mask.shape[1] - 1))
    assert reward.check_saved(make(), *what)["eval/padding_gap"] > 1e-3


def test_extremes_are_the_surest_pairs_as_texts():
    """samples.jsonl gets the largest margins in both directions, with the prompt cut off the texts."""
    groups = [{"sequences": [[50 + d, 7, END], [50, 8, END]], "prompt_len": 1, "where": f"a:{d}"}
              for d in range(-10, 11)]
    kept: list[dict] = []
    run = SimpleNamespace(sample=lambda step, rows: kept.extend(rows))
    reward.extremes(first_token_judge, groups, TOKENIZER, reward.Config(micro_batch=4, lora_r=4), WORLD, run, 1)
    assert [row["margin"] for row in kept] == [-10, -9, -8, -7, -6, 6, 7, 8, 9, 10]
    assert kept[-1] == {"margin": 10.0, "where": "a:10", "scores": [60.0, 50.0], "chosen": "7 2", "rejected": "8 2"}


# ---------------------------------------------------------------- to disk and back

def in_a_new_process(directory: Path, ids: Tensor) -> Tensor:
    """Scores from a fresh interpreter that knows the directory and nothing else."""
    code = (f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
            "import json, torch, reward\n"
            f"judge = reward.load({str(directory)!r})\n"
            f"with torch.no_grad(): print(json.dumps([x.hex() for x in judge(torch.tensor({ids.tolist()})).tolist()]))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=directory,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    return torch.tensor([float.fromhex(x) for x in json.loads(done.stdout)])


@torch.no_grad()
@pytest.mark.parametrize("make", [full_model, adapter_model])
def test_r16_the_head_survives_saving(make, tmp_path):
    """(R16) save -> new process -> load -> the same scores to the last bit, with its head and its shift."""
    base, out, ids = tmp_path / "base", tmp_path / "reward", random_ids(3, 7)
    checkpoints.save(tiny_model(), None, base)
    judge = make()
    judge.normalize(judge(random_ids(20, 7, 5)))
    expected = judge(ids)
    reward.save(judge, None, out, base=str(base))
    assert torch.equal(in_a_new_process(out, ids), expected)


@torch.no_grad()
def test_r16_an_adapter_goes_onto_a_model_in_memory(tmp_path):
    """(R16) load(base=...) puts the adapter and the head onto the model that PPO has already: nothing is loaded
    twice."""
    judge, ids = adapter_model(), random_ids(3, 7)
    reward.save(judge, None, tmp_path / "reward", base="somewhere else")
    base = tiny_model()
    again = reward.load(tmp_path / "reward", base=base, name="judge")
    assert again.model is base and again.adapter == "judge"
    assert torch.equal(again(ids), judge(ids)) and again.head.bias.item() == pytest.approx(0.37)


def test_a_language_model_is_no_reward_model(tmp_path):
    """A directory without a head is an error that says so, not a head drawn at random."""
    checkpoints.save(tiny_model(), None, tmp_path / "model")
    with pytest.raises(common.UserError, match=r"score\.weight.*language model"):
        reward.load(tmp_path / "model")


def test_an_sft_adapter_is_no_reward_model(tmp_path):
    """The same for a LoRA adapter without a head: this is how a head is lost unseen elsewhere."""
    judge = adapter_model()
    lora.save(judge.model, "reward", tmp_path, base="base")
    with pytest.raises(common.UserError, match=r"score\.weight"):
        reward.load(tmp_path, base=tiny_model())


# ---------------------------------------------------------------- it learns

@pytest.mark.parametrize("full", [True, False])
def test_it_learns_a_rule(full):
    """Of two answers the one with more 7s is better: 40 steps of the pair loss, then over 90 % on pairs never seen."""
    def pair(generator: torch.Generator) -> dict:
        rows = [torch.randint(3, 12, (8,), generator=generator) for _ in range(2)]
        rows[0][torch.randperm(8, generator=generator)[:4]] = 7
        rows[1][rows[1] == 7] = 8
        return {"sequences": [[*row.tolist(), END] for row in rows], "prompt_len": 1, "where": "?"}

    generator = torch.Generator().manual_seed(0)
    judge = full_model() if full else adapter_model()
    held = [pair(generator) for _ in range(100)]
    cfg = reward.Config(micro_batch=50, lora_r=0 if full else 4)
    optimizer = torch.optim.AdamW([p for p in judge.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        ids, mask, sizes = reward.collate([pair(generator) for _ in range(16)], PAD, "cpu")
        (reward.group_loss(judge(ids, mask), sizes)[0] / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = reward.evaluate(judge, held, TOKENIZER, cfg, WORLD)
    assert measured["eval/accuracy"] > 0.9, measured
    assert math.isclose(measured["eval/longer_wins"], 0.5)

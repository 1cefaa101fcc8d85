"""Stage 2, the reward model: learn from comparisons which of two answers people prefer.

    P(answer a is preferred to b) = sigmoid(r(a) - r(b))                            Bradley & Terry 1952
    loss = - mean over pairs of log sigmoid(r(chosen) - r(rejected))                Ouyang et al. 2022, eq. 1

K ranked answers of one prompt give K (K-1) / 2 pairs, which go through the model together. The reward is one number per
answer: the last hidden state of its end token times a vector. Only differences are trained, so the zero is arbitrary;
afterwards scores are shifted and scaled to mean 0 and std 1 on reference answers, which is what gives PPO's KL
coefficient a meaning.

    python reward.py                                                    # the embedded default, a laptop
    python reward.py --init out/sft/model --data hh_rlhf.jsonl --out_dir out/reward
    torchrun --nproc_per_node 8 reward.py --init DIR --data FILE

Out comes model/: with LoRA an adapter in PEFT's format with its head (`score.weight`), in full training a
...ForSequenceClassification directory; reward.json holds the shift, which those formats have no place for.
"""
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoints
import common
import lora
import memory
from data import batch as data_batch
from data import chat, formats
from model import Transformer
from sft import autocast, check_quant


@dataclass
class Config:
    # --- model and data ---
    init: str = "smollm2-135m"         # start from the SFT model: --init out/sft/model
    data: str = "data/demo/preferences.jsonl"   # chosen / rejected, HH-RLHF, or ranked answers: the format is sniffed
    valid: str = ""                    # held-out file; empty: the last valid_share of data is held out
    valid_share: float = 0.1           # ignored when valid is given
    format: str = "auto"               # name the format of data when sniffing guesses wrong
    template: str = ""                 # a chat format, say chatml (help: a list); empty: the model's own
    skip_bad: bool = False             # go on past rows that cannot be read (they are counted) instead of stopping
    max_len: int = 512                 # tokens per answer with its prompt; prompts are cut from the left, answers never
    out_dir: str = "out/reward"
    overwrite: bool = False            # replace a finished run in out_dir
    # --- training ---
    steps: int = 0                     # optimiser steps; 0: as many as `epochs` needs
    epochs: float = 1.0                # more than one overfits: comparisons are few and noisy
    batch_size: int = 16               # prompts (pairs or ranked lists) per optimiser step, over all ranks
    micro_batch: int = 4               # prompts per forward; all answers of a prompt go through together
    lr: float = 2e-4                   # LoRA; full fine-tuning 9e-6
    schedule: str = "cosine"           # cosine | linear | constant; decays to zero
    warmup: int = 5                    # steps of linear warm-up
    weight_decay: float = 0.0
    grad_clip: float = 1.0             # norm of the gradient at most; 0: off
    center: float = 0.0                # weight of (r_chosen + r_rejected)^2, which keeps scores near 0; 0: off
    checkpointing: bool = False        # recompute activations in backward
    # --- LoRA ---
    lora_r: int = 16                   # rank; 0: train every weight
    lora_alpha: float = 32.0           # the correction is scaled by alpha / r
    lora_targets: tuple[str, ...] = lora.ALL_LINEAR
    quant: str = ""                    # nf4: the frozen linears in four bits (QLoRA), a quarter of the memory of bf16
    # --- run ---
    normalize_on: int = 256            # reference answers for mean 0 and std 1 (training answers, good and bad); 0: off
    seed: int = 0
    device: str = "auto"               # auto | cpu | cuda | mps
    dtype: str = "auto"                # of the frozen weights: auto | bf16 | fp32; head and loss are always fp32
    eval_every: int = 50               # steps between measurements on held-out pairs
    save_every: int = 50               # steps between states that --resume can continue from
    resume: bool = False               # go on from the newest state in out_dir
    dry_run: bool = False              # print parameters and memory, allocate nothing


# ---------------------------------------------------------------- the maths

class RewardModel(nn.Module):
    """One number per sequence, read at its last real token; with `adapter` it is a role on a shared, frozen base."""
    def __init__(self, model: Transformer, adapter: str | None = None):
        super().__init__()
        self.model, self.adapter = model, adapter
        C = model.config.hidden_size
        device = model.embed_tokens.weight.device
        self.head = nn.Linear(C, 1, device=device, dtype=torch.float32)        # in bf16 there would be ties
        # First scores of order 1 (Stiennon et al. 2020; the 1/(d+1) in their text is a misprint of the code's root).
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(C + 1))
        nn.init.zeros_(self.head.bias)
        self.head.bias.requires_grad_(False)                   # differences do not see it: it is set by normalize

    def values(self, ids: Tensor, mask: Tensor | None = None, h: Tensor | None = None) -> Tensor:
        """A number after every token: (B, T) ids -> (B, T) fp32. PPO's value function is this, trained. h (B, T, C):
        this role's hidden states, where another forward pass has made them already."""
        if h is None:
            with lora.use(self.model, self.adapter):
                h = self.model.hidden(ids, mask)
        return self.head(h.to(self.head.weight.dtype)).squeeze(-1)

    def forward(self, ids: Tensor, mask: Tensor | None = None, h: Tensor | None = None) -> Tensor:
        """(B, T) ids, mask 1 = real -> (B,) the value at the last real token, wherever the padding is."""
        mask = torch.ones_like(ids) if mask is None else mask
        right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())       # then no token can see a pad, no mask is needed
        values = self.values(ids, None if right_padded else mask, h)
        return values.gather(1, last_real(mask)[:, None]).squeeze(1)

    @torch.no_grad()
    def normalize(self, scores: Tensor) -> None:
        """Shifts and scales the head so that these scores get mean 0 and std 1; the ranking stays."""
        mean, std = scores.mean(), scores.std().clamp(min=1e-6)
        self.head.weight /= std
        self.head.bias.copy_((self.head.bias - mean) / std)


def last_real(mask: Tensor) -> Tensor:
    """(B, T) -> (B,) index of the last 1:   [[0, 1, 1], [1, 1, 0]] -> [2, 1]. From the mask, never from ids == pad:
    the pad may be the end token."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def pair_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_c - r_r), mean over pairs. Chosen 1, rejected 0: log(1 + e^-1) = 0.3133; equal scores: log 2 =
    0.6931."""
    return -F.logsigmoid(chosen - rejected).mean()                        # logsigmoid: finite for any margin


def ranking_loss(scores: Tensor) -> Tensor:
    """(B, K) scores, best answer first -> mean over prompts of the mean over their K (K-1) / 2 pairs."""
    K = scores.shape[-1]
    better, worse = torch.triu_indices(K, K, offset=1, device=scores.device)
    return pair_loss(scores[..., better], scores[..., worse])


def accuracy_interval(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share, after Wilson 1927: honest at small n, where +-2 standard errors is not."""
    p, center = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half, center + half


# ---------------------------------------------------------------- batches and measurements

def collate(groups: list[dict], pad_id: int, device) -> tuple[Tensor, Tensor, list[int]]:
    """All answers of all prompts in one right-padded batch (sum of K, T), their mask, and how many belong to each
    prompt."""
    sequences = [ids for group in groups for ids in group["sequences"]]
    ids, mask = data_batch.pad(sequences, pad_id)
    return ids.to(device), mask.to(device), [len(group["sequences"]) for group in groups]


def group_loss(scores: Tensor, sizes: list[int], center: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum over prompts of the ranking loss (divide by the prompts of the step), and the margins best - worst."""
    groups = scores.split(sizes)
    total = sum(ranking_loss(group) for group in groups)
    if center:
        total = total + center * sum((group[0] + group[-1]) ** 2 for group in groups)
    return total, torch.stack([group[0] - group[-1] for group in groups]).detach()


@torch.no_grad()
def evaluate(reward: RewardModel, groups: list[dict], tokenizer, cfg: Config, world: common.World) -> dict:
    """Held-out accuracy over all pairs with its interval, beside the accuracy of "the longer answer wins"."""
    right = longer = pairs = margin = loss = 0.0
    for start in range(0, len(groups), cfg.micro_batch * world.size):
        part = groups[start:start + cfg.micro_batch * world.size][world.rank::world.size]
        if not part:
            continue
        ids, mask, sizes = collate(part, tokenizer.pad_id, world.device)
        with autocast(world, cfg.lora_r == 0):
            scores = reward(ids, mask)
        for s, n in zip(scores.split(sizes), mask.sum(1).split(sizes)):
            better, worse = torch.triu_indices(len(s), len(s), offset=1)
            right += float((s[better] > s[worse]).sum())
            # a tie is a coin
            longer += float((n[better] > n[worse]).sum()) + 0.5 * float((n[better] == n[worse]).sum())
            margin += float((s[better] - s[worse]).sum())
            loss += float(pair_loss(s[better], s[worse]))
            pairs += len(better)
    right, longer, pairs, margin, loss = (common.all_sum(x) for x in (right, longer, pairs, margin, loss))
    if not pairs:
        return {}
    low, high = accuracy_interval(right, pairs)
    return {"eval/loss": loss / len(groups), "eval/accuracy": right / pairs, "eval/accuracy_low": low,
            "eval/accuracy_high": high,
            "eval/longer_wins": longer / pairs, "eval/margin": margin / pairs, "eval/pairs": pairs}


@torch.no_grad()
def reference_scores(reward: RewardModel, groups: list[dict], tokenizer, cfg: Config, world: common.World,
                     padding: int = 0) -> Tensor:
    """Scores of up to normalize_on answers, good and bad alike, the same on every rank; padding: columns more."""
    answers = [ids for group in groups for ids in group["sequences"]][:cfg.normalize_on]
    scores = []
    for i in range(0, len(answers), 2 * cfg.micro_batch):
        ids, mask = data_batch.pad(answers[i:i + 2 * cfg.micro_batch], tokenizer.pad_id)
        ids, mask = F.pad(ids, (0, padding), value=tokenizer.pad_id), F.pad(mask, (0, padding))
        with autocast(world, cfg.lora_r == 0):
            scores.append(reward(ids.to(world.device), mask.to(world.device)))
    return torch.cat(scores)


def extremes(reward: RewardModel, groups: list[dict], tokenizer, cfg: Config, world: common.World, run: common.Run,
             step: int) -> None:
    """The held-out pairs that the model judges most surely, right and wrong, as texts: read them."""
    with torch.no_grad():
        judged = []
        for i in range(0, len(groups), cfg.micro_batch):
            part = groups[i:i + cfg.micro_batch]
            ids, mask, sizes = collate(part, tokenizer.pad_id, world.device)
            judged += [(float(s[0] - s[-1]), group, s) for group, s in zip(part, reward(ids, mask).split(sizes))]
    judged.sort(key=lambda item: item[0])
    run.sample(step, [{"margin": margin, "where": group["where"], "scores": [float(s[0]), float(s[-1])],
                       "chosen": tokenizer.decode(group["sequences"][0][group["prompt_len"]:]),
                       "rejected": tokenizer.decode(group["sequences"][-1][group["prompt_len"]:])} for margin, group,
                       s in judged[:5] + judged[-5:]])


# ---------------------------------------------------------------- to disk and back

def save(reward: RewardModel, tokenizer, out_dir: Path, base: str) -> None:
    """An adapter with its head, or a whole ...ForSequenceClassification model, and the shift in reward.json."""
    if reward.adapter:
        lora.save(reward.model, reward.adapter, out_dir, base=base, head=reward.head.weight)
    else:
        checkpoints.save(reward.model, tokenizer, out_dir, head=reward.head.weight)
    common.atomic_write(out_dir / "reward.json",
                        json.dumps({"bias": reward.head.bias.item(), "base": base, "adapter": bool(reward.adapter)},
                                   indent=2))


def same_base(directory: Path, init: str) -> bool:
    """Whether the reward model is an adapter on the very model that `init` names: then both can share it."""
    if not (directory / "adapter_config.json").exists():
        return False
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on = config["base_model_name_or_path"]
    try:
        theirs = checkpoints.resolve(trained_on).resolve()
    except common.UserError:                                  # moved or not named: the policy's base is the only one
        return True
    if theirs == checkpoints.resolve(init).resolve():
        return True
    print(f"{directory} is an adapter on {trained_on}, the policy starts at {init}: the reward model keeps a base of "
          "its own (more memory), and the value starts from nothing")
    return False


def load(directory: str | Path, base: Transformer | None = None, name: str = "reward", device="cpu",
         dtype=torch.float32, quant: str = "") -> RewardModel:
    """Reads what `save` wrote (or any classifier with one label). With `base` an adapter goes onto that model."""
    directory = Path(directory)
    if not directory.exists():
        raise common.UserError(f"no reward model in {directory}: train one with python reward.py, then pass its model "
                               "folder with --reward")
    is_adapter = (directory / "adapter_config.json").exists()
    if is_adapter:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        own = config["base_model_name_or_path"]
        model = base if base is not None else checkpoints.load(own, device, dtype, quant=quant)[0]
        weight = lora.load(model, directory, name)
    else:
        model, _ = checkpoints.load(directory, device, dtype, quant=quant)
        weight = checkpoints.load_head(directory)
    if weight is None:
        raise common.UserError(f"{directory} holds no reward head (score.weight): it is a language model, train it "
                               "with reward.py first")
    reward = RewardModel(model, name if is_adapter else None)
    with torch.no_grad():
        reward.head.weight.copy_(weight)
        note = directory / "reward.json"
        if note.exists():
            reward.head.bias.fill_(json.loads(note.read_text(encoding="utf-8"))["bias"])
    return reward


@torch.no_grad()
def check_saved(reward: RewardModel, folder: Path, groups: list[dict], tokenizer, cfg: Config,
                world: common.World) -> dict[str, float]:
    """What PPO will read: how far scores are from the live ones when the adapter comes back from its file (a whole
    model is not read a second time), and how far three columns of padding move them. 0 and rounding."""
    live = reference_scores(reward, groups, tokenizer, cfg, world)
    padded = reference_scores(reward, groups, tokenizer, cfg, world, padding=3)
    found = {"eval/padding_gap": float((padded - live).abs().max())}
    if reward.adapter:
        again = reference_scores(load(folder, base=reward.model, name="saved"), groups, tokenizer, cfg, world)
        found["eval/saved_gap"] = float((again - live).abs().max())
    return found


# ---------------------------------------------------------------- training

def prepare(cfg: Config, tokenizer) -> tuple[list[dict], list[dict]]:
    rows = formats.read_preferences(cfg.data, cfg.format, cfg.skip_bad)
    rows.print_report()
    if cfg.valid:
        train, held = rows, formats.read_preferences(cfg.valid, cfg.format, cfg.skip_bad)
    else:
        cut = max(1, round(len(rows) * (1 - cfg.valid_share)))
        train, held = rows[:cut], rows[cut:]
    train = data_batch.encode_preferences(train, tokenizer, cfg.max_len)
    train.print_report()
    held = data_batch.encode_preferences(held, tokenizer, cfg.max_len)
    ends = [ids[-1] in tokenizer.eos_ids for group in train for ids in group["sequences"]]
    assert all(ends), f"{ends.count(False)} of {len(ends)} answers lack the end token where the reward is read"
    return train, held


def improve(reward: RewardModel, groups: list[dict], optimizer: torch.optim.Optimizer, tokenizer, cfg: Config,
            world: common.World, step: int, run=None, state=None) -> dict[str, float]:
    """One step, at the rate that the optimiser holds -> the figures of the log. Whoever trains a reward model calls
    this: main, and every experiment of the course."""
    # ---- the mean over all prompts of the step, whatever the micro-batches and ranks
    started, trainable = time.perf_counter(), [p for p in reward.parameters() if p.requires_grad]
    n_prompts = common.all_sum(len(groups))
    total, margins, tokens = 0.0, [], 0
    for i in range(0, len(groups), cfg.micro_batch):
        ids, mask, sizes = collate(groups[i:i + cfg.micro_batch], tokenizer.pad_id, world.device)
        with autocast(world, cfg.lora_r == 0):
            scores = reward(ids, mask)
        part, margin = group_loss(scores, sizes, cfg.center)
        with lora.use(reward.model, reward.adapter):                          # checkpointing recomputes in here
            (part / n_prompts).backward()
        total += float(part.detach()) / n_prompts
        margins.append(margin)
        tokens += int(mask.sum())
    if step == 0:
        common.check_gradients(reward.named_parameters())
    common.sync_gradients(trainable)

    # ---- check, clip, move
    norm, total, margin = common.clip(trainable, cfg.grad_clip), common.all_sum(total), torch.cat(margins)
    common.check_finite({"loss": total, "gradient norm": norm}, step, [str(g.get("where", "?")) for g in groups], run,
                        state)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "accuracy": common.all_sum(float((margin > 0).sum())) / n_prompts,
            "margin": common.all_sum(float(margin.sum())) / n_prompts, "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
            "tokens_per_sec": common.all_sum(tokens) / (time.perf_counter() - started)}


def main(cfg: Config) -> bool:
    # ---- setup: device, model, adapter, head
    chat.check_format(cfg.template)
    world = common.setup(cfg.device, cfg.dtype, cfg.seed)
    full = cfg.lora_r == 0
    check_quant(cfg)
    if cfg.dry_run:
        memory.print_table(memory.estimate(checkpoints.read_config(cfg.init), "reward", batch=2 * cfg.micro_batch,
                                           length=cfg.max_len, lora_r=cfg.lora_r,
                                           targets=checkpoints.our_linears(cfg.init, cfg.lora_targets),
                                           dtype=world.dtype, checkpointing=cfg.checkpointing, quant=cfg.quant,
                                           device=world.device.type))
        return True
    model, tokenizer = checkpoints.load(cfg.init, world.device, torch.float32 if full else world.dtype, quant=cfg.quant)
    chat.use_format(tokenizer, cfg.template)
    common.seed_all(cfg.seed)                       # before the head is drawn: two runs with one seed are one run
    if not full:
        lora.apply(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_targets, "reward")
    if not model.config.tie_embeddings:
        model.lm_head.requires_grad_(False)         # a reward model writes no words; a tied head is its embedding
    reward = RewardModel(model, None if full else "reward")
    model.checkpointing = cfg.checkpointing
    trainable = [(name, p) for name, p in reward.named_parameters() if p.requires_grad]

    # ---- data, optimiser, run folder
    train, held = prepare(cfg, tokenizer)
    batches = data_batch.Batches(train, cfg.batch_size, cfg.seed, rank=world.rank, world=world.size)
    steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch_size))
    optimizer = common.optimizer(reward, [{"name": "reward", "params": trainable, "lr": 1.0}],
                                 weight_decay=cfg.weight_decay)
    run = common.Run(cfg.out_dir, "reward", cfg, world, resume=cfg.resume)
    run.total = steps
    step = 0

    def state() -> dict:
        return {"step": step, "batches": batches.state(), "optimizer": optimizer.state_dict(),
                "weights": {name: p.detach() for name, p in trainable}}

    if cfg.resume and (saved := run.load_state()):
        step = saved["step"]
        batches.load_state(saved["batches"])
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, p in trainable:
                p.copy_(saved["weights"][name])

    while True:
        # ---- measure on held-out pairs
        if step % cfg.eval_every == 0 or step == steps:
            measured = evaluate(reward, held, tokenizer, cfg, world)
            run.log(step, measured, show=("eval/accuracy", "eval/longer_wins"))
        if step == steps:
            break

        # ---- one step
        groups = sorted(batches.next(), key=lambda g: max(map(len, g["sequences"])))    # similar lengths: less padding
        lr = common.lr_at(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        figures = improve(reward, groups, optimizer, tokenizer, cfg, world, step, run, state())
        step += 1
        run.log(step, figures, show=("loss", "accuracy", "lr", "tokens_per_sec"))
        if step % cfg.save_every == 0 or step == steps:
            run.save_state(step, state())

    # ---- mean 0 and std 1 on reference answers, then keep it
    out = Path(run.dir)
    if cfg.normalize_on:
        before = reference_scores(reward, train, tokenizer, cfg, world)
        reward.normalize(before)
        print(f"normalised on {len(before)} answers: mean {float(before.mean()):.3f} -> 0, std "
              f"{float(before.std()):.3f} -> 1")
    if world.main:
        extremes(reward, held, tokenizer, cfg, world, run, step)
        save(reward, tokenizer, out / "model", base=str(checkpoints.resolve(cfg.init)))
        if cfg.normalize_on:
            run.log(step, check_saved(reward, out / "model", train, tokenizer, cfg, world))
    common.barrier()
    accuracy, low, high = (measured.get(f"eval/accuracy{x}", float("nan")) for x in ("", "_low", "_high"))
    return common.gate("reward", [
        ("held-out accuracy above chance", low > 0.5,
         f"{accuracy:.1%} (95 % interval {low:.1%} .. {high:.1%}, {measured.get('eval/pairs', 0):.0f} pairs)"),
        ("above longer-wins", accuracy > measured.get("eval/longer_wins", 1.0),
         f"{measured.get('eval/longer_wins', float('nan')):.1%}"),
    ], advice="near 50 %: more pairs, or labels that follow no rule; just above longer-wins: it learned length. Read "
              "samples.jsonl.", run=run)


if __name__ == "__main__":
    common.main(lambda: main(common.parse(Config)))

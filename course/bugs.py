"""The bug zoo: mistakes that published RLHF code has made, as patches over our functions, never as an `if` inside them.

    with bugs.inject("kl_sign"):
        ...                            # ppo.kl is the wrong one in here

Each has a diagnosis, what is seen and where to look, in English and Chinese. What is seen is not written by hand: it
names figures of the log, and a test holds it against the recorded runs. course/zoo.py runs every certificate against
every bug and draws the curve that training makes with it: many curves look healthy.

    python course/bugs.py              # the list
"""
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import lora  # noqa: E402
import model as transformer  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
from course import tree  # noqa: E402
from data import batch as data_batch  # noqa: E402
from model import Transformer  # noqa: E402

Patches = dict[tuple[object, str], object]             # (module or class, name): what stands there instead


@dataclass(frozen=True)
class Sign:
    """A figure of the log that is, in every run with the bug, beyond all sound runs of the same settings."""
    metric: str                        # or "crash"
    way: str                           # higher | lower
    when: str = "mean"                 # in the first or last line that has it, or the mean over the run

    @property
    def en(self) -> str:
        when = {"first": "at first", "last": "at the end", "mean": "over the whole run"}[self.when]
        return "the run crashes" if self.metric == "crash" else f"{self.metric} is {self.way} than sound {when}"

    @property
    def zh(self) -> str:
        when = {"first": "起初", "last": "结束时", "mean": "整个训练中"}[self.when]
        way = {"higher": "高", "lower": "低"}[self.way]
        return "运行崩溃" if self.metric == "crash" else f"{when} {self.metric} 比正常{way}"


@dataclass(frozen=True)
class Bug:
    name: str
    stage: str                         # the stage whose curve shows it: sft | reward | ppo
    patches: Callable[[], Patches]
    signs: tuple[Sign, ...]
    why_en: str                        # what goes wrong and where to look; what is seen are the signs
    why_zh: str

    @property
    def en(self) -> str:
        said = "; ".join(sign.en for sign in self.signs) or "no figure of the log tells it from a sound run"
        return f"{said[0].upper() if said[:3] in ('the', 'no ') else said[0]}{said[1:]}. {self.why_en}"

    @property
    def zh(self) -> str:
        return f"{'；'.join(sign.zh for sign in self.signs) or '日志中没有数字能把它与正常运行区分开'}。{self.why_zh}"


BUGS: dict[str, Bug] = {}


def bug(stage: str, en: str, zh: str, *signs: Sign):
    def register(patches: Callable[[], Patches]) -> Callable[[], Patches]:
        name = patches.__name__
        BUGS[name] = Bug(name, stage, patches, signs, en, zh)
        return patches
    return register


@contextlib.contextmanager
def inject(name: str) -> Iterator[None]:
    """Within the block the bug is in; afterwards every function is the one it was."""
    patches = BUGS[name].patches()
    saved = {(where, attribute): vars(where)[attribute] for where, attribute in patches}
    try:
        for (where, attribute), value in patches.items():
            setattr(where, attribute, value)
        yield
    finally:
        for (where, attribute), value in saved.items():
            setattr(where, attribute, value)


# ---------------------------------------------------------------- KL

@bug("ppo",
     "Leaving the reference is paid for instead of charged. Look at the order of the two log-probabilities in kl, and "
     "at the sign of beta.",
     "偏离参考模型不但不付代价，反而得到奖励。检查 kl 中两个对数概率的先后和 beta 的符号。",
     Sign("objective/non_score_reward", "higher"), Sign("objective/kl_k3", "lower"))
def kl_sign() -> Patches:
    real = ppo.kl
    return {(ppo, "kl"): lambda logp, ref, kind="k1": -real(logp, ref, kind)}


@bug("ppo",
     "Nothing holds the policy near the reference. Look whether beta reaches token_rewards.",
     "没有任何东西把策略留在参考模型附近。检查 beta 是否真正传入 token_rewards。",
     Sign("objective/kl", "higher"), Sign("objective/entropy", "lower", "last"))
def kl_missing() -> Patches:
    real = ppo.token_rewards
    return {(ppo, "token_rewards"): lambda scores, kls, mask, coef: real(scores, kls, mask, 0.0)}


@bug("ppo",
     "k3 looks like a better k1, but as a number in the reward its gradient is wrong, and a token that the reference "
     "finds x nats likelier costs e^x instead of gaining x. Use k1 there and k3 only in the log.",
     "k3 看上去像更好的 k1，但作为奖励中的数值，它的梯度是错的，参考模型认为更可能（多 x nat）的词元代价是 e^x，而不是"
     "收益 x。奖励里用 k1，k3 只用于日志。",
     Sign("val/largest_kl", "higher"), Sign("val/error_avg", "higher"))
def k3_in_reward() -> Patches:
    real = ppo.kl
    return {(ppo, "kl"): lambda logp, ref, kind="k3": real(logp, ref, kind)}


@bug("ppo",
     "Only the log is wrong: with policy p and reference q it is q/p - 1 - log(q/p) for tokens drawn from p, and with "
     "the two exchanged it estimates no KL. Check the means of all estimators over all outcomes.",
     "只有日志是错的：策略 p、参考 q，词元采自 p 时应为 q/p - 1 - log(q/p)；两者对调后估计的不是 KL。在全部结果上核对"
     "各估计量的均值。",
     Sign("objective/kl_k3", "higher"))
def k3_backwards() -> Patches:
    real = ppo.kl
    return {(ppo, "kl"): lambda logp, ref, kind="k1": real(logp, ref) if kind == "k1" else real(ref, logp, kind)}


@bug("ppo",
     "The controller of --kl_target moves beta away from what would bring KL back. Look at the sign of the error in "
     "AdaptiveKL.update.",
     "--kl_target 的控制器把 beta 朝相反方向调，KL 无法回到目标。检查 AdaptiveKL.update 中误差的符号。",
     Sign("kl_coef", "lower", "last"), Sign("objective/entropy", "lower", "last"))
def adaptive_kl_inverted() -> Patches:
    def update(self, measured: float, n: int) -> None:
        if self.target:
            self.coef *= 1 - min(max(measured / self.target - 1, -0.2), 0.2) * n / self.horizon
    return {(ppo.AdaptiveKL, "update"): update}


# ---------------------------------------------------------------- rewards and credit

@bug("ppo",
     "Every token earns the whole score, so what is paid grows with length. Look at token_rewards: per answer the "
     "rewards plus beta KL must sum to the score, once.",
     "每个词元都得到整个得分，回答越长得到的越多。检查 token_rewards：每个回答的奖励加 beta KL 之和应恰好等于一次得分"
     "。",
     Sign("objective/rlhf_reward", "higher"), Sign("val/error_avg", "higher"))
def score_on_every_token() -> Patches:
    return {(ppo, "token_rewards"): lambda scores, kls, mask, coef: (scores[:, None] - coef * kls) * mask}


@bug("ppo",
     "The score lands on padding and is lost, except in answers that fill all the room. Look at the index in "
     "token_rewards: it is that of the last token, not one behind.",
     "得分落在填充上而丢失，只有占满长度的回答才得到它。检查 token_rewards 的下标：应是最后一个词元，而不是它后面一个"
     "。",
     Sign("objective/rlhf_reward", "lower"), Sign("val/response_length", "higher", "last"))
def score_behind_the_end() -> Patches:
    return {(ppo, "token_rewards"): rewards_one_late}


def rewards_one_late(scores, kls, mask, coef):
    behind = mask.sum(1).clamp(max=mask.shape[1] - 1)[:, None]
    return (-coef * kls * mask).scatter_add(1, behind, scores[:, None].to(kls.dtype))


@bug("ppo",
     "The score lands one token behind the end and comes back through GAE, with V = 0 there: at lambda 1 nothing is "
     "lost, below it a part of what the end token earns. Look at the index in token_rewards.",
     "得分落在结束词元之后一格，再经 GAE 传回，那里 V = 0：lambda 为 1 时没有损失，小于 1 时结束词元少得一部分。检查"
     " token_rewards 的下标。",
     Sign("val/last_return_gap", "higher", "first"), Sign("objective/rlhf_reward", "lower"))
def score_one_late() -> Patches:
    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        longer = torch.cat((torch.ones_like(mask[:, :1]), mask[:, :-1]), 1)    # and the token behind the end
        advantages, returns = real(rewards, values, longer, gamma, lam)
        return advantages * mask, returns * mask
    real = ppo.gae
    return {(ppo, "token_rewards"): rewards_one_late, (ppo, "gae"): gae}


@bug("ppo",
     "As before, and V of the padding token, which nobody trains, is read as well. Look at the index in token_rewards "
     "and at the mask of the values.",
     "同上，而且还读取了填充词元上无人训练的 V。检查 token_rewards 的下标和价值的掩码。",
     Sign("val/last_return_gap", "higher", "first"), Sign("objective/rlhf_reward", "lower"))
def score_on_padding() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        longer = torch.cat((torch.ones_like(response[:, :1]), response[:, :-1]), 1)
        return real(roles, ids, mask, longer, h)
    real = ppo.response_values
    return {**score_one_late(), (ppo, "response_values"): response_values}


@bug("ppo",
     "An answer without an end is judged like any other: stopping is never worth it. Look whether final_scores gets "
     "`ended`, and whether it tests the token that really stops.",
     "没有结束的回答与其他回答同样评分：没有理由停下来。检查 final_scores 是否收到 ended，以及判断的是否真是停止词元。",
     Sign("val/eos_rate", "lower"))
def missing_end_ignored() -> Patches:
    return {(ppo, "final_scores"): lambda scores, ended, missing_eos, clip=0.0: scores}


@bug("ppo",
     "The critic bootstraps from padding. V is 0 behind the end, in gae and in what gae is given.",
     "价值从填充处自举。结束之后 V 必须为 0，无论在 gae 里还是在它的输入里。",
     Sign("val/last_return_gap", "higher"))
def value_through_padding() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        return roles.value.values(ids, mask)[:, -response.shape[1] - 1:-1]

    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        ones = torch.ones_like(mask)
        return real(rewards, values, ones, gamma, lam)

    real = ppo.gae
    return {(ppo, "response_values"): response_values, (ppo, "gae"): gae}


@bug("ppo",
     "V has seen the token that it judges, so the advantage no longer knows whether that was good, and little is "
     "learned. Look at the slice in response_values: V is read one to the left of the token.",
     "V 已经看到它要评价的词元，优势无法判断其好坏，几乎学不到东西。检查 response_values 的切片：V 要在词元左边一格读"
     "取。",
     Sign("objective/scores", "lower", "last"), Sign("val/explained_variance", "lower", "last"))
def value_sees_the_action() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        return roles.value.values(ids, mask)[:, -response.shape[1]:] * response
    return {(ppo, "response_values"): response_values}


@bug("ppo",
     "A second RMSNorm changes nothing while its weights are 1, as they are on the tree; with the weights of a real "
     "model the critic reads other states than it was made for. Compare V with the head applied by hand to the hidden "
     "states.",
     "权重为 1 时（如在树上）第二次 RMSNorm 什么都不改变；用真实模型的权重时，价值头读到的就不是它该读的状态。把 V 与"
     "手工在隐藏状态上算出的头输出相比。")
def norm_twice() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        if h is None:
            with lora.use(roles.value.model, roles.value.adapter):
                h = roles.value.model.hidden(ids, mask)
        return real(roles, ids, mask, response, roles.value.model.norm(h))
    real = ppo.response_values
    return {(ppo, "response_values"): response_values}


@bug("ppo",
     "Mean and variance were taken over padding too, and depend on how ragged a batch is. Look at whiten: both are "
     "over real tokens only.",
     "均值和方差把填充也算了进去，随批内长度差异而变。检查 whiten：两者只能对真实词元计算。",
     Sign("val/advantage_rms", "higher"))
def whiten_over_padding() -> Patches:
    def whiten(x, mask, shift_mean=True):
        white = (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)
        return (white if shift_mean else white + x.mean()) * mask
    return {(ppo, "whiten"): whiten}


@bug("ppo",
     "V learns the scale of advantages, R = V + A with A of variance 1, and can never come nearer than 1. Look at the "
     "order: returns are made before the advantages are whitened.",
     "V 学到的是优势的尺度：R = V + A 而 A 的方差为 1，误差永远降不到 1 以下。检查顺序：先算回报，再对优势做白化。",
     Sign("val/error_avg", "higher", "last"), Sign("val/last_return_gap", "higher"))
def returns_whitened() -> Patches:
    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        advantages, _ = real(rewards, values, mask, gamma, lam)
        return advantages, (ppo.whiten(advantages, mask) + values) * mask
    real = ppo.gae
    return {(ppo, "gae"): gae}


# ---------------------------------------------------------------- log-probabilities and rollouts

@bug("ppo",
     "Old and new log-probability of every end token are 0: a mask made with ids == pad took it along, and stopping "
     "is never trained. Look for pad == eos in the configuration and mask by position.",
     "所有结束词元的新旧对数概率都是 0：按 ids == pad 做的掩码把它也去掉了，停止从未得到训练。检查 pad 是否等于 eos，"
     "掩码应按位置制作。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/kl", "lower"))
def end_token_ignored() -> Patches:
    def token_logprobs(logits, targets, temperature=1.0):
        return real(logits, targets, temperature) * (targets != tree.END)
    real = ppo.token_logprobs
    return {(ppo, "token_logprobs"): token_logprobs}


@bug("ppo",
     "The mask stops before the end token, and an answer that ends at once has no token at all: no last one to pay, "
     "nothing to divide by. Look at response_mask: ending is an action, so every answer has at least one.",
     "掩码在结束词元之前就停了，立刻结束的回答一个词元也没有：没有可付奖励的最后一个，除数为零。检查 response_mask：结"
     "束也是动作，每个回答至少有一个词元。",
     Sign("crash", "higher"))
def empty_answers() -> Patches:
    def response_mask(new, eos_ids):
        return (torch.isin(new, torch.tensor(sorted(eos_ids))).cumsum(1) == 0).long()
    return {(ppo, "response_mask"): response_mask}


@bug("ppo",
     "What is trained is not the distribution that was sampled from, the more so the further the temperature is from "
     "1. Divide the logits of old, new and reference by it.",
     "训练的分布不是采样的分布，温度离 1 越远差得越多。旧、新、参考三者的 logits 都要除以采样温度。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/entropy", "lower", "last"))
def temperature_forgotten() -> Patches:
    real = ppo.token_logprobs
    return {(ppo, "token_logprobs"): lambda logits, targets, temperature=1.0: real(logits, targets)}


@bug("ppo",
     "Padding is read as text wherever prompts have unequal lengths. Pass the mask in every forward pass.",
     "提示长度不一时，填充被当作文本读入。每次前向都要传入掩码。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/kl_k3", "higher"))
def mask_forgotten() -> Patches:
    real = ppo.Roles.hidden
    return {(ppo.Roles, "hidden"): lambda self, role, ids, mask: real(self, role, ids, torch.ones_like(mask))}


@bug("ppo",
     "Positions of padded prompts are shifted, which RoPE forgives and learned positions (GPT-2, OPT) do not. Count "
     "them from the mask, in training as in sampling: the first real token is 0.",
     "有填充的提示位置发生平移，RoPE 不受影响，而学习到的位置（GPT-2、OPT）会出错。训练与采样都要由掩码数位置：第一个"
     "真实词元是 0。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/kl_k3", "higher"))
def positions_count_padding() -> Patches:
    def hidden(self, role, ids, mask):
        count = transformer.count_positions
        transformer.count_positions = lambda docs: torch.arange(docs.shape[1]).expand(docs.shape)
        try:
            return real(self, role, ids, mask)
        finally:
            transformer.count_positions = count
    real = ppo.Roles.hidden
    return {(ppo.Roles, "hidden"): hidden}


@bug("ppo",
     "All answers to a prompt are the same text: there is nothing to compare. Look at the sampler's options: "
     "temperature 0, or a library whose default is greedy.",
     "同一提示的回答全是同一段文字：没有可比较的东西。检查采样选项：温度为 0，或所用库默认贪心解码。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/scores_std", "lower"))
def greedy_rollouts() -> Patches:
    real = Transformer.generate
    return {(Transformer, "generate"): lambda self, ids, n, mask=None, temperature=1.0, *a, **k:
            real(self, ids, n, mask, 0.0, *a, **k)}


@bug("ppo",
     "Sampled is a distribution cut to its best tokens, scored the whole one: their KL may be negative, and tokens "
     "that were cut off cannot be learned. No top-k, top-p or penalties in a rollout.",
     "采样用的是只留下最优词元的分布，打分用的是完整分布：KL 可能为负，被截掉的词元永远学不到。采样时不要用 top-k、"
     "top-p 或惩罚项。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/scores", "lower", "last"))
def top_k_rollouts() -> Patches:
    real = Transformer.generate
    return {(Transformer, "generate"): lambda self, ids, n, mask=None, temperature=1.0, **k:
            real(self, ids, n, mask, temperature, top_k=2, **k)}


@bug("ppo",
     "Every rollout draws with the same noise, so the same few answers are seen again and again. Seed once, at the "
     "start of the run, and keep the generator.",
     "每次采样用的是同一串噪声，反复看到的总是那几个回答。只在运行开始时设一次种子，之后保留生成器。",
     Sign("objective/rlhf_reward", "lower", "last"))
def reseeded_rollouts() -> Patches:
    real = ppo.rollout
    return {(ppo, "rollout"): lambda roles, prompts, tokenizer, cfg, generator:
            real(roles, prompts, tokenizer, cfg, torch.Generator().manual_seed(0))}


@bug("ppo",
     "The sampler still has the weights of the start, and the first ratio is 1 all the same. Refresh them before "
     "every rollout.",
     "采样器还在用最初的权重，而首个比率照样是 1。每次采样前都要更新它的权重。",
     Sign("val/sampler_gap", "higher", "last"), Sign("objective/kl", "lower"))
def stale_sampler() -> Patches:
    def rollout(roles, *args):
        return real(dataclasses.replace(roles, policy=roles.reference, adapter=None), *args)
    real = ppo.rollout
    return {(ppo, "rollout"): rollout}


@bug("ppo",
     "What is trained on are the tokens of the decoded text, which were not sampled: some pairs never appear. Train "
     "on the sampled ids; text is for people.",
     "训练用的是解码文本重新分词的结果，并非采样所得：某些词元组合从不出现。直接用采样得到的 ids 训练；文本只给人看。",
     Sign("val/sampler_gap", "higher", "first"), Sign("objective/scores", "lower", "last"))
def retokenised() -> Patches:
    """A BPE in which "ab" is the token c: a b, sampled as two tokens, comes back as one."""
    def rollout(roles, prompts, tokenizer, cfg, generator):
        r = real(roles, prompts, tokenizer, cfg, generator)
        P, rows = r.ids.shape[1] - r.R, []
        for ids, keep in zip(r.ids[:, P:].tolist(), r.response.tolist()):
            text = "".join("|abc"[i] for i, k in zip(ids, keep) if k).replace("ab", "c")
            rows.append(["|abc".index(letter) for letter in text])
        new, response = data_batch.pad(rows, tree.END)
        ids, mask = torch.cat((r.ids[:, :P], new), 1), torch.cat((r.mask[:, :P], response), 1)
        return ppo.Rollout(ids, mask, response, r.ended, r.sampler_logp[:, :new.shape[1]])
    real = ppo.rollout
    return {(ppo, "rollout"): rollout}


@bug("ppo",
     "Old and new log-probabilities see other masks of dropout before anything was learned. Put all roles into eval "
     "mode, or better, have no dropout at all.",
     "什么都没学时，新旧对数概率就因 dropout 掩码不同而不同。所有角色都切到 eval 模式，最好根本不用 dropout。",
     Sign("val/first_ratio_gap", "higher", "first"))
def dropout_in_scoring() -> Patches:
    real = ppo.Roles.hidden
    return {(ppo.Roles, "hidden"): lambda self, *a: F.dropout(real(self, *a), 0.1, training=True)}


# ---------------------------------------------------------------- losses

@bug("ppo",
     "What was judged well becomes less likely. The ratio is new over old.",
     "得到好评的反而变得更不可能。比率是新概率除以旧概率。",
     Sign("objective/scores", "lower", "last"), Sign("val/eos_rate", "lower", "last"))
def ratio_inverted() -> Patches:
    def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
        return real(2 * old_logp.detach() - logp, old_logp, advantages, mask, clip, n_tokens)
    real = ppo.policy_loss
    return {(ppo, "policy_loss"): policy_loss}


@bug("ppo",
     "Nothing stops an update that has gone far enough. Check all eight cases of sign and ratio: the loss takes the "
     "larger of the two, not the smaller.",
     "更新走得过远也没有东西拦住。检查符号与比率的八种情形：损失取两者中较大的，不是较小的。",
     Sign("policy/approxkl_avg", "higher"), Sign("loss/policy_avg", "lower", "first"))
def clip_min_max() -> Patches:
    def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
        n = mask.sum() if n_tokens is None else n_tokens
        ratio = torch.exp((logp - old_logp) * mask)
        loss = torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        return (loss * mask).sum() / n, real(logp, old_logp, advantages, mask, clip, n_tokens)[1]
    real = ppo.policy_loss
    return {(ppo, "policy_loss"): policy_loss}


@bug("ppo",
     "The critic stops learning as soon as it has moved by the clip. The value loss takes the larger of the two "
     "squares.",
     "价值一旦移动超过裁剪范围就停止学习。价值损失取两个平方中较大的一个。",
     Sign("value/grad_norm", "higher"), Sign("val/error_avg", "higher"))
def value_clip_min_max() -> Patches:
    def value_loss(values, old_values, returns, mask, clip=0.2, n_tokens=None):
        n = mask.sum() if n_tokens is None else n_tokens
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = 0.5 * torch.minimum((values - returns) ** 2, (near - returns) ** 2)
        return (loss * mask).sum() / n, real(values, old_values, returns, mask, clip, n_tokens)[1]
    real = ppo.value_loss
    return {(ppo, "value_loss"): value_loss}


@bug("ppo",
     "The mean of each micro-batch counts the same, so tokens of short answers weigh more and results change with "
     "--micro_batch, which should only change memory. Count the tokens of the whole minibatch first and divide every "
     "part by that.",
     "每个微批的均值同等计数，短回答的词元权重更大，结果随 --micro_batch 改变，而它本应只影响内存。先数出整个小批的词"
     "元数，各部分都除以它。",
     Sign("policy/surrogate_avg", "lower"))
def mean_of_means() -> Patches:
    parts, real = [1], ppo.plan

    def plan(*args):
        for minibatch in real(*args):
            parts[0] = len(minibatch)
            yield minibatch

    def averaged(fn):
        def loss(*args):
            x, stats = fn(*args[:5])                           # without the count: the mean of this micro-batch
            return x / parts[0], {name: y / parts[0] for name, y in stats.items()}
        return loss
    return {(ppo, "plan"): plan, (ppo, "policy_loss"): averaged(ppo.policy_loss),
            (ppo, "value_loss"): averaged(ppo.value_loss)}


@bug("ppo",
     "Training is untouched, but every logged mean is diluted by padding, where the ratio is 1 and the error 0: "
     "updates look smaller than they are. Divide what is logged by the tokens that the loss is divided by.",
     "训练不受影响，但日志中的均值都被填充稀释（那里比率是 1、误差是 0）：更新看上去比实际小。日志的除数应与损失的词元"
     "数相同。",
     Sign("policy/clipfrac_avg", "lower"), Sign("val/ratio_var", "lower"))
def padding_in_the_log() -> Patches:
    def over_all(fn):
        def loss(x, old, target, mask, clip=0.2, n_tokens=None):
            _, stats = fn(x.detach(), old, target, torch.ones_like(mask), clip)
            share = mask.sum() / (mask.sum() if n_tokens is None else n_tokens)
            return fn(x, old, target, mask, clip, n_tokens)[0], {name: y * share for name, y in stats.items()}
        return loss
    return {(ppo, "policy_loss"): over_all(ppo.policy_loss), (ppo, "value_loss"): over_all(ppo.value_loss)}


# ---------------------------------------------------------------- roles

@bug("ppo",
     "PPO pulls the model back towards the base. The reference is the SFT model: merge its adapter into the base, or "
     "keep it on in every role.",
     "PPO 把模型拉回基座。参考模型应是 SFT 模型：把它的适配器合并进基座，或在每个角色中都开启。",
     Sign("val/largest_kl", "higher", "first"), Sign("objective/kl", "higher", "first"))
def reference_is_the_base() -> Patches:
    def spoil(build):
        def wrong(*args):
            roles, generator = build(*args), torch.Generator().manual_seed(9)
            named = roles.trainable("policy") if roles.adapter else roles.reference.named_parameters()
            with torch.no_grad():
                for _, p in named:
                    p.add_(torch.randn(p.shape, generator=generator) * (0.5 * p.std() + 0.05))
            return roles
        return wrong
    return {(ppo, "one_base"): spoil(ppo.one_base), (ppo, "separate"): spoil(ppo.separate)}


@bug("ppo",
     "The reference moves along, and KL is measured from where it went; its own curve does not tell. Compare the hash "
     "of the frozen weights before and after; train adapters and heads only.",
     "参考模型也在跟着动，KL 是相对移动后的位置计算的，而 KL 曲线看不出来。比较训练前后冻结权重的哈希；只训练适配器和"
     "头。",
     Sign("eval/reference_moved", "higher", "last"))
def norms_left_trainable() -> Patches:
    def trainable(self, role):
        named = real(self, role)
        if role == "policy" and self.adapter:
            norms = [(n, p.requires_grad_()) for n, p in self.policy.named_parameters() if "norm" in n]
            return named + norms
        return named
    real = ppo.Roles.trainable
    return {(ppo.Roles, "trainable"): trainable}


@bug("ppo",
     "Each rollout leaves a rounding error in the base, in bf16 a large one. Keep the weights as they were before "
     "merging; do not subtract what was added.",
     "每次采样在基座里留下舍入误差，bf16 下误差更大。保留合并前的权重；不要把加上的再减回来。",
     Sign("eval/reference_moved", "higher", "last"))
def merge_by_subtraction() -> Patches:
    def unmerge(model):
        with torch.no_grad():
            for _, m in lora.layers(model):
                if m.merged is not None:
                    m.original[0].copy_((m.weight.float() - m.delta(m.merged)).to(m.weight.dtype))
        real(model)
    real = lora.unmerge
    return {(lora, "unmerge"): unmerge}


# ---------------------------------------------------------------- the reward model

@bug("reward",
     "Held-out accuracy in training is as it should be, but what was written has another head, drawn anew. Save the "
     "head with the adapter and make a missing one an error.",
     "训练时的留出准确率正常，但写下的模型换了一个重新随机的头。头要与适配器一起保存，缺少时必须报错。",
     Sign("eval/saved_gap", "higher", "last"))
def head_lost_on_save() -> Patches:
    def load(*args, **options):
        judge = real(*args, **options)
        torch.nn.init.normal_(judge.head.weight, std=0.1)
        return judge
    real = reward.load
    return {(reward, "load"): load}


@bug("reward",
     "Scores depend on who else is in the batch, and accuracy on the batch size. Read the score at the last real "
     "token, found from the mask.",
     "得分取决于同批的其他样本，准确率随批大小变化。得分要在最后一个真实词元处读取，位置由掩码得出。",
     Sign("eval/padding_gap", "higher", "last"))
def score_at_last_column() -> Patches:
    return {(reward, "last_real"): lambda mask: torch.full((len(mask),), mask.shape[1] - 1)}


@bug("reward",
     "The first clear pair with a margin beyond 100 on the wrong side makes the loss inf and every weight nan; here "
     "no margin comes near it. Use logsigmoid, which is finite for any margin.",
     "第一对反向间隔超过 100 的样本会使损失变成 inf、全部权重变成 nan；这里的间隔远达不到。使用 logsigmoid，它对任何间"
     "隔都有限。")
def log_of_sigmoid() -> Patches:
    return {(reward, "pair_loss"): lambda chosen, rejected: -torch.sigmoid(chosen - rejected).log().mean()}


@bug("reward",
     "Only the best answer is compared with the others, which is the easier part; the order of the others is thrown "
     "away. K ranked answers give K (K - 1) / 2 pairs.",
     "只拿最好的回答与其余的比较，这是较容易的部分；其余的次序被丢掉。K 个排好序的回答给出 K (K - 1) / 2 对。",
     Sign("loss", "lower"))
def only_the_best() -> Patches:
    return {(reward, "ranking_loss"): lambda scores: reward.pair_loss(scores[..., :1], scores[..., 1:])}


@bug("reward",
     "Values are compared column by column, those of prompts and padding too, so that most of the loss is about "
     "tokens at which no score is read. Look at what group_loss is given: one number a sequence.",
     "逐列比较价值，连提示和填充也算在内，大部分损失都花在不读取得分的词元上。检查 group_loss 的输入：每个序列一个数。",
     Sign("loss", "higher"))
def loss_on_every_token() -> Patches:
    def forward(self, ids, mask=None, h=None):
        return self.values(ids, None, h) if torch.is_grad_enabled() else real_forward(self, ids, mask, h)

    def group_loss(scores, sizes, center=0.0):
        columns = [real_loss(x, sizes, center) for x in (scores.unbind(1) if scores.dim() > 1 else [scores])]
        return sum(total for total, _ in columns) / len(columns), columns[-1][1]
    real_forward, real_loss = reward.RewardModel.forward, reward.group_loss
    return {(reward.RewardModel, "forward"): forward, (reward, "group_loss"): group_loss}


# ---------------------------------------------------------------- fine-tuning

@bug("sft",
     "More is in the loss than was counted: the model learns to write the user's questions too. Supervise the "
     "assistant's words only.",
     "进入损失的词元比数出来的多：模型也在学写用户的提问。只监督助手说的话。",
     Sign("loss_weight", "higher"), Sign("loss", "higher"))
def prompt_supervised() -> Patches:
    def collate(rows, pad_id, device):
        return real([{**row, "mask": [1] * len(row["ids"])} for row in rows], pad_id, device)
    real = sft.collate
    return {(sft, "collate"): collate}


@bug("sft",
     "The model is asked for the token it has just read, and learns to copy. Logits at t are for token t + 1.",
     "模型被要求预测刚刚读到的词元，学会的只是复制。t 处的 logits 对应第 t + 1 个词元。",
     Sign("eval/loss", "lower", "last"))
def no_shift() -> Patches:
    def batch_loss(model, ids, docs, mask, n_tokens=None):
        keep = mask == 1
        return sft.nll(model.lm_head(model.hidden(ids, docs)[keep]), ids[keep], n_tokens)

    def loss(logits, ids, mask, n_tokens=None):
        return sft.nll(logits[mask == 1], ids[mask == 1], n_tokens)
    return {(sft, "batch_loss"): batch_loss, (sft, "loss"): loss}


@bug("sft",
     "The end token is in no loss, so the model is never asked to stop. A mask from ids == pad removes it where pad "
     "is the end token; mask by position.",
     "结束词元不在损失里，从未要求模型停下来。pad 就是结束词元时，按 ids == pad 做的掩码会把它去掉；掩码应按位置制作。",
     Sign("num_end_tokens", "lower"), Sign("eval/eos_rate", "lower", "last"))
def end_not_supervised() -> Patches:
    def collate(rows, pad_id, device):
        rows = [{**row, "mask": [m if i != pad_id else 0 for i, m in zip(row["ids"], row["mask"])]} for row in rows]
        return real(rows, pad_id, device)
    real = sft.collate
    return {(sft, "collate"): collate}


@bug("sft",
     "The mean of each micro-batch counts the same: short answers weigh more, and results change with --micro_batch. "
     "Divide every part by the supervised tokens of the whole step.",
     "每个微批的均值同等计数：短回答权重更大，结果随 --micro_batch 改变。各部分都除以整步的监督词元数。")
def sft_mean_of_means() -> Patches:
    def improve(model, rows, optimizer, tokenizer, cfg, *rest):
        loss, parts = sft.batch_loss, math.ceil(len(rows) / cfg.micro_batch)
        sft.batch_loss = lambda model, ids, docs, mask, n_tokens: loss(model, ids, docs, mask) / parts
        try:
            return real(model, rows, optimizer, tokenizer, cfg, *rest)
        finally:
            sft.batch_loss = loss
    real = sft.improve
    return {(sft, "improve"): improve}


@bug("sft",
     "A document may copy from its neighbours in the row, so training looks better and held-out rows, which stand "
     "alone, come out worse. Each document of a packed row sees only itself and counts its own positions.",
     "文档可以照抄同一行的邻居，训练看上去更好，而单独成行的留出数据更差。打包行中的每个文档只能看到自己，并各自计数位"
     "置。",
     Sign("eval/packing_gap", "higher", "first"), Sign("loss", "lower"), Sign("eval/loss", "higher", "last"))
def packing_leaks() -> Patches:
    def collate(rows, pad_id, device):
        ids, _, mask = real(rows, pad_id, device)
        return ids, None, mask
    real = sft.collate
    return {(sft, "collate"): collate}


# Mistakes that no patch over our functions would show on the tree: what, why not, and the test that guards it.
ABSENT = [
    ("two begin tokens", "the tree's prompts are ids and are never rendered",
     "tests/test_chat.py::test_prompt_ids_are_a_prefix_and_there_is_one_bos"),
    ("an option that nothing reads any more", "options are fields of a dataclass, an unknown one stops the run",
     "tests/test_scripts.py::test_an_unknown_flag_names_the_nearest"),
    ("GAE across tokens that a tool wrote", "an answer is what the policy chose, its mask has no gaps",
     "tests/test_ppo.py::test_p5_response_mask_is_the_loop")]


if __name__ == "__main__":
    for item in BUGS.values():
        print(f"{item.name} ({item.stage})\n  {item.en}\n  {item.zh}")

"""The bug zoo: mistakes that published RLHF code has made, as patches over our functions, never as an `if` inside them.

    with bugs.inject("kl_sign"):
        ...                            # ppo.kl is the wrong one in here

Each has a diagnosis of two sentences, what is seen and where to look, in English and Chinese. course/zoo.py runs every
certificate against every bug and draws the curve that training makes with it: many curves look healthy.

    python course/bugs.py              # the list
"""
import contextlib
import dataclasses
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
class Bug:
    name: str
    stage: str                         # the stage whose curve shows it: sft | reward | ppo
    patches: Callable[[], Patches]
    en: str
    zh: str


BUGS: dict[str, Bug] = {}


def bug(stage: str, en: str, zh: str):
    def register(patches: Callable[[], Patches]) -> Callable[[], Patches]:
        name = patches.__name__
        BUGS[name] = Bug(name, stage, patches, en, zh)
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
     "KL grows without bound while the logged KL reward is positive: the policy is paid for leaving. Look at the "
     "order of the two log-probabilities in kl, and at the sign of beta.",
     "KL 不断增大，而日志中的 KL 奖励是正的：策略因偏离而得到奖励。检查 kl 中两个对数概率的先后和 beta 的符号。")
def kl_sign() -> Patches:
    real = ppo.kl
    return {(ppo, "kl"): lambda logp, ref, kind="k1": -real(logp, ref, kind)}


@bug("ppo",
     "The score rises higher than in a sound run and KL never comes back: nothing holds the policy. Look whether "
     "beta reaches token_rewards.",
     "得分比正常时更高，KL 一去不回：没有任何东西约束策略。检查 beta 是否真正传入 token_rewards。")
def kl_missing() -> Patches:
    real = ppo.token_rewards
    return {(ppo, "token_rewards"): lambda scores, kls, mask, coef: real(scores, kls, mask, 0.0)}


@bug("ppo",
     "KL settles at another value than beta asks for, and the curve is smooth: k3 is never negative and looks like "
     "a better k1. As a number in the reward its gradient is wrong; use k1 there and k3 only in the log.",
     "KL 稳定在与 beta 不符的值，曲线却很平滑：k3 不为负，看上去像更好的 k1。作为奖励中的数值，它的梯度是错的；奖"
     "励里用 k1，k3 只用于日志。")
def k3_in_reward() -> Patches:
    real = ppo.kl
    return {(ppo, "kl"): lambda logp, ref, kind="k3": real(logp, ref, kind)}


@bug("ppo",
     "With kl_target the coefficient moves away from its target and ends near 0 or explodes. Look at the sign of "
     "the error in AdaptiveKL.update.",
     "设置 kl_target 后，系数朝相反方向走，最后趋于 0 或爆炸。检查 AdaptiveKL.update 中误差的符号。")
def adaptive_kl_inverted() -> Patches:
    def update(self, measured: float, n: int) -> None:
        if self.target:
            self.coef *= 1 - min(max(measured / self.target - 1, -0.2), 0.2) * n / self.horizon
    return {(ppo.AdaptiveKL, "update"): update}


# ---------------------------------------------------------------- rewards and credit

@bug("ppo",
     "Answers drift to the greatest length: every token earns the whole score, so a longer answer earns more. Look "
     "at token_rewards: per answer the rewards plus beta KL must sum to the score, once.",
     "回答越来越长直到上限：每个词元都得到整个得分，越长越多。检查 token_rewards：每个回答的奖励加 beta KL 之和应"
     "恰好等于一次得分。")
def score_on_every_token() -> Patches:
    return {(ppo, "token_rewards"): lambda scores, kls, mask, coef: (scores[:, None] - coef * kls) * mask}


@bug("ppo",
     "The score moves little, and answers that fill all the room are favoured: only there the reward lands on a "
     "real token. Look at the index in token_rewards: it is that of the last token, not one behind.",
     "得分几乎不动，占满长度的回答反而得利：只有那里奖励才落在真实词元上。检查 token_rewards 的下标：应是最后一个"
     "词元，而不是它后面一个。")
def score_behind_the_end() -> Patches:
    def token_rewards(scores, kls, mask, coef):
        rewards = -coef * kls * mask
        behind = mask.sum(1).clamp(max=mask.shape[1] - 1)[:, None]
        return rewards.scatter_add(1, behind, scores[:, None].to(rewards.dtype))
    return {(ppo, "token_rewards"): token_rewards}


@bug("ppo",
     "The share of answers that end falls, and the score of endless ones is as good as any: stopping is never worth "
     "it. Look whether final_scores gets `ended`, and whether it tests the token that really stops.",
     "能自行结束的回答越来越少，而不结束的回答得分并不低：没有理由停下来。检查 final_scores 是否收到 ended，以及判"
     "断的是否真是停止词元。")
def missing_end_ignored() -> Patches:
    return {(ppo, "final_scores"): lambda scores, ended, missing_eos, clip=0.0: scores}


@bug("ppo",
     "The curve is nearly that of a sound run, only the variance is odd: the critic bootstraps from padding. Only a "
     "test sees it: V is 0 behind the end, in gae and in what gae is given.",
     "曲线与正常几乎一样，只是方差异常：价值从填充处自举。只有测试能发现：结束之后 V 必须为 0，无论在 gae 里还是在"
     "它的输入里。")
def value_through_padding() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        return roles.value.values(ids, mask)[:, -response.shape[1] - 1:-1]

    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        ones = torch.ones_like(mask)
        return real(rewards, values, ones, gamma, lam)

    real = ppo.gae
    return {(ppo, "response_values"): response_values, (ppo, "gae"): gae}


@bug("ppo",
     "Explained variance looks splendid and the policy learns too little: V has seen the action, so the advantage "
     "no longer knows whether it was good. Look at the slice in response_values: V is read one to the left of the "
     "token.",
     "解释方差好得出奇，策略却学得太少：V 已经看到动作，优势无法判断动作好坏。检查 response_values 的切片：V 要在"
     "词元左边一格读取。")
def value_sees_the_action() -> Patches:
    def response_values(roles, ids, mask, response, h=None):
        return roles.value.values(ids, mask)[:, -response.shape[1]:] * response
    return {(ppo, "response_values"): response_values}


@bug("ppo",
     "Training is a little noisier and otherwise as it should be, worse the more lengths differ. Look at whiten: "
     "mean and variance are over real tokens only.",
     "训练只是噪声略大，长度差异越大越明显。检查 whiten：均值和方差只能对真实词元计算。")
def whiten_over_padding() -> Patches:
    def whiten(x, mask, shift_mean=True):
        white = (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)
        return (white if shift_mean else white + x.mean()) * mask
    return {(ppo, "whiten"): whiten}


@bug("ppo",
     "Value loss stays high and V has the scale of advantages instead of rewards. Look at the order: returns are "
     "made before the advantages are whitened.",
     "价值损失居高不下，V 的尺度是优势的而不是奖励的。检查顺序：先算回报，再对优势做白化。")
def returns_whitened() -> Patches:
    def gae(rewards, values, mask, gamma=1.0, lam=0.95):
        advantages, _ = real(rewards, values, mask, gamma, lam)
        return advantages, (ppo.whiten(advantages, mask) + values) * mask
    real = ppo.gae
    return {(ppo, "gae"): gae}


# ---------------------------------------------------------------- log-probabilities and rollouts

@bug("ppo",
     "The model never learns when to stop, in PPO as in SFT, and the ratio of end tokens is exactly 1: a mask made "
     "with ids == pad took the end token along. Look for pad == eos in the configuration and mask by position.",
     "模型学不会何时停止，结束词元的比率恒为 1：按 ids == pad 做的掩码把结束词元也去掉了。检查 pad 是否等于 eos，"
     "掩码应按位置制作。")
def end_token_ignored() -> Patches:
    def token_logprobs(logits, targets, temperature=1.0):
        return real(logits, targets, temperature) * (targets != tree.END)
    real = ppo.token_logprobs
    return {(ppo, "token_logprobs"): token_logprobs}


@bug("ppo",
     "val/sampler_gap is not 0 and grows with the distance of the temperature from 1. Divide the logits of old, new "
     "and reference by the sampler's temperature.",
     "val/sampler_gap 不为 0，温度离 1 越远越大。旧、新、参考三者的 logits 都要除以采样温度。")
def temperature_forgotten() -> Patches:
    real = ppo.token_logprobs
    return {(ppo, "token_logprobs"): lambda logits, targets, temperature=1.0: real(logits, targets)}


@bug("ppo",
     "val/sampler_gap is large in batches of unequal prompts and 0 with prompts of one length: padding is read as "
     "text. Pass the mask in every forward pass.",
     "提示长度不一时 val/sampler_gap 很大，长度相同时为 0：填充被当作文本读入。每次前向都要传入掩码。")
def mask_forgotten() -> Patches:
    real = ppo.Roles.hidden
    return {(ppo.Roles, "hidden"): lambda self, role, ids, mask: real(self, role, ids, torch.ones_like(mask))}


@bug("ppo",
     "val/sampler_gap is large in batches of unequal prompts, with GPT-2 and OPT; LLaMA looks healthy, as RoPE "
     "forgives a shift. Count positions from the mask, in training as in sampling: the first real token is 0.",
     "提示长度不一时，GPT-2、OPT 的 val/sampler_gap 很大；LLaMA 看似正常，因为 RoPE 不受整体平移影响。训练与采样都要"
     "由掩码数位置：第一个真实词元是 0。")
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
     "Entropy collapses in a few updates and all answers to a prompt are equal: there is nothing to compare. Look "
     "at the sampler's options: temperature 0, or a library whose default is greedy.",
     "几次更新内熵就塌缩，同一提示的回答完全相同：没有可比较的东西。检查采样选项：温度为 0，或所用库默认贪心解码。")
def greedy_rollouts() -> Patches:
    real = Transformer.generate
    return {(Transformer, "generate"): lambda self, ids, n, mask=None, temperature=1.0, *a, **k:
            real(self, ids, n, mask, 0.0, *a, **k)}


@bug("ppo",
     "The score creeps or stands, because every rollout draws with the same noise. Seed once, at the start of the "
     "run, and keep the generator.",
     "得分缓慢爬行或停滞，因为每次采样用的是同一串噪声。只在运行开始时设一次种子，之后保留生成器。")
def reseeded_rollouts() -> Patches:
    real = ppo.rollout
    return {(ppo, "rollout"): lambda roles, prompts, tokenizer, cfg, generator:
            real(roles, prompts, tokenizer, cfg, torch.Generator().manual_seed(0))}


@bug("ppo",
     "val/sampler_gap grows from update to update while the first ratio stays 1: the sampler still has the old "
     "weights. Refresh them before every rollout.",
     "val/sampler_gap 逐次增大，而首个比率仍为 1：采样器还在用旧权重。每次采样前都要更新它的权重。")
def stale_sampler() -> Patches:
    def rollout(roles, *args):
        return real(dataclasses.replace(roles, policy=roles.reference, adapter=None), *args)
    real = ppo.rollout
    return {(ppo, "rollout"): rollout}


@bug("ppo",
     "Some token pairs never appear in what is trained on, and log-probabilities are those of texts that were not "
     "sampled. Train on the sampled ids; text is for people.",
     "某些词元组合从不出现在训练数据中，对数概率属于并未采样的文本。直接用采样得到的 ids 训练；文本只给人看。")
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
     "The first ratio is not 1 and approxkl is large before anything was learned. Put all roles into eval mode, or "
     "better, have no dropout at all.",
     "什么都没学时首个比率就不为 1，approxkl 很大。所有角色都切到 eval 模式，最好根本不用 dropout。")
def dropout_in_scoring() -> Patches:
    real = ppo.Roles.hidden
    return {(ppo.Roles, "hidden"): lambda self, *a: F.dropout(real(self, *a), 0.1, training=True)}


# ---------------------------------------------------------------- losses

@bug("ppo",
     "The score falls from the first update on: what was judged well becomes less likely. The ratio is new over old.",
     "从第一次更新起得分就下降：得到好评的反而变得更不可能。比率是新概率除以旧概率。")
def ratio_inverted() -> Patches:
    def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
        return real(2 * old_logp.detach() - logp, old_logp, advantages, mask, clip, n_tokens)
    real = ppo.policy_loss
    return {(ppo, "policy_loss"): policy_loss}


@bug("ppo",
     "Some seeds are fine, in others KL jumps: nothing stops an update that has gone far enough. Check all eight "
     "cases of sign and ratio: the loss takes the larger of the two, not the smaller.",
     "有的种子正常，有的 KL 突跳：更新走得过远也没有东西拦住。检查符号与比率的八种情形：损失取两者中较大的，不是较"
     "小的。")
def clip_min_max() -> Patches:
    def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
        n = mask.sum() if n_tokens is None else n_tokens
        ratio = torch.exp((logp - old_logp) * mask)
        loss = torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        return (loss * mask).sum() / n, real(logp, old_logp, advantages, mask, clip, n_tokens)[1]
    real = ppo.policy_loss
    return {(ppo, "policy_loss"): policy_loss}


@bug("ppo",
     "Explained variance climbs slowly, as the critic stops learning as soon as it has moved by the clip. The value "
     "loss takes the larger of the two squares.",
     "解释方差上升缓慢，因为价值一旦移动超过裁剪范围就停止学习。价值损失取两个平方中较大的一个。")
def value_clip_min_max() -> Patches:
    def value_loss(values, old_values, returns, mask, clip=0.2, n_tokens=None):
        n = mask.sum() if n_tokens is None else n_tokens
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = 0.5 * torch.minimum((values - returns) ** 2, (near - returns) ** 2)
        return (loss * mask).sum() / n, real(values, old_values, returns, mask, clip, n_tokens)[1]
    real = ppo.value_loss
    return {(ppo, "value_loss"): value_loss}


@bug("ppo",
     "Results change with --micro_batch, which should only change memory: short answers weigh more than long ones. "
     "Count the tokens of the whole minibatch first and divide every part by that.",
     "结果随 --micro_batch 改变，而它本应只影响内存：短回答的权重变大。先数出整个小批的词元数，各部分都除以它。")
def mean_of_means() -> Patches:
    policy, value = ppo.policy_loss, ppo.value_loss
    return {(ppo, "policy_loss"): lambda *args: policy(*args[:5]), (ppo, "value_loss"): lambda *args: value(*args[:5])}


# ---------------------------------------------------------------- roles

@bug("ppo",
     "KL is not 0 before the first update, and PPO pulls the model back towards the base. The reference is the SFT "
     "model: merge its adapter into the base, or keep it on in every role.",
     "第一次更新前 KL 就不为 0，PPO 把模型拉回基座。参考模型应是 SFT 模型：把它的适配器合并进基座，或在每个角色中"
     "都开启。")
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
     "KL stays lower than the answers' change suggests, because the reference moves along. Its hash before and "
     "after training must be equal; train adapters and heads only.",
     "KL 比回答的变化所暗示的要小，因为参考模型也在跟着动。训练前后它的哈希必须相等；只训练适配器和头。")
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
     "KL to the reference is not 0 with the adapter off and grows by a rounding error every rollout. Keep the "
     "weights as they were before merging; do not subtract what was added.",
     "关闭适配器后与参考的 KL 也不为 0，每次采样增加一点舍入误差。保留合并前的权重；不要把加上的再减回来。")
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
     "Held-out accuracy was fine in training and is a coin after loading: the head was drawn anew. Save the head "
     "with the adapter and make a missing one an error.",
     "训练时留出准确率正常，加载后却像抛硬币：头被重新随机初始化。头要与适配器一起保存，缺少时必须报错。")
def head_lost_on_save() -> Patches:
    def load(*args, **options):
        judge = real(*args, **options)
        torch.nn.init.normal_(judge.head.weight, std=0.1)
        return judge
    real = reward.load
    return {(reward, "load"): load}


@bug("reward",
     "Scores depend on who else is in the batch, and accuracy changes with the batch size. Read the score at the "
     "last real token, found from the mask.",
     "得分取决于同批的其他样本，准确率随批大小变化。得分要在最后一个真实词元处读取，位置由掩码得出。")
def score_at_last_column() -> Patches:
    return {(reward, "last_real"): lambda mask: torch.full((len(mask),), mask.shape[1] - 1)}


@bug("reward",
     "All is well until the first clear pair with a large margin on the wrong side: loss inf, gradient nan. Use "
     "logsigmoid, which is finite for any margin.",
     "一直正常，直到第一对间隔很大而方向相反的样本：损失变成 inf，梯度变成 nan。使用 logsigmoid，它对任何间隔都有"
     "限。")
def log_of_sigmoid() -> Patches:
    return {(reward, "pair_loss"): lambda chosen, rejected: -torch.sigmoid(chosen - rejected).log().mean()}


@bug("reward",
     "Loss falls, but accuracy stays below that of a sound run: only the best answer is compared, the order of the "
     "others is thrown away. K ranked answers give K (K - 1) / 2 pairs.",
     "损失下降，但准确率低于正常：只比较了最好的回答，其余的次序被丢掉。K 个排好序的回答给出 K (K - 1) / 2 对。")
def only_the_best() -> Patches:
    return {(reward, "ranking_loss"): lambda scores: reward.pair_loss(scores[..., :1], scores[..., 1:])}


# ---------------------------------------------------------------- fine-tuning

@bug("sft",
     "The model asks itself questions after its answer, and the loss is lower than the answers deserve. Supervise "
     "the assistant's words only.",
     "模型答完之后自问自答，损失也比回答应有的更低。只监督助手说的话。")
def prompt_supervised() -> Patches:
    def collate(rows, pad_id, device):
        return real([{**row, "mask": [1] * len(row["ids"])} for row in rows], pad_id, device)
    real = sft.collate
    return {(sft, "collate"): collate}


@bug("sft",
     "The loss falls to nearly 0 at once, and the model writes nonsense: it was asked for the token it had just "
     "read. Logits at t are for token t + 1.",
     "损失立刻降到接近 0，模型却胡言乱语：它被要求预测刚刚读到的词元。t 处的 logits 对应第 t + 1 个词元。")
def no_shift() -> Patches:
    def batch_loss(model, ids, docs, mask, n_tokens=None):
        keep = mask == 1
        return sft.nll(model.lm_head(model.hidden(ids, docs)[keep]), ids[keep], n_tokens)

    def loss(logits, ids, mask, n_tokens=None):
        return sft.nll(logits[mask == 1], ids[mask == 1], n_tokens)
    return {(sft, "batch_loss"): batch_loss, (sft, "loss"): loss}


@bug("sft",
     "The loss looks right and answers never end. The end token must be supervised: a mask from ids == pad removes "
     "it where pad is the end token.",
     "损失看着正常，回答却从不结束。结束词元必须被监督：pad 就是结束词元时，按 ids == pad 做的掩码会把它去掉。")
def end_not_supervised() -> Patches:
    def collate(rows, pad_id, device):
        rows = [{**row, "mask": [m if i != pad_id else 0 for i, m in zip(row["ids"], row["mask"])]} for row in rows]
        return real(rows, pad_id, device)
    real = sft.collate
    return {(sft, "collate"): collate}


@bug("sft",
     "Results change with --micro_batch, and short answers weigh more. Divide every part by the supervised tokens "
     "of the whole step.",
     "结果随 --micro_batch 改变，短回答权重更大。各部分都除以整步的监督词元数。")
def sft_mean_of_means() -> Patches:
    real = sft.batch_loss
    return {(sft, "batch_loss"): lambda model, ids, docs, mask, n_tokens=None: real(model, ids, docs, mask)}


@bug("sft",
     "The loss is worse with packing than without, on the same data. Each document of a packed row sees only itself "
     "and counts its own positions.",
     "同样的数据，打包后的损失比不打包更差。打包行中的每个文档只能看到自己，并各自计数位置。")
def packing_leaks() -> Patches:
    def collate(rows, pad_id, device):
        ids, _, mask = real(rows, pad_id, device)
        return ids, None, mask
    real = sft.collate
    return {(sft, "collate"): collate}


if __name__ == "__main__":
    for item in BUGS.values():
        print(f"{item.name} ({item.stage})\n  {item.en}\n  {item.zh}")

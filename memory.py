"""How much memory will it take, and why? Answered without weights: the model is built on torch's meta device, which
knows every shape and stores nothing.

    weights       4 bytes per number in fp32, 2 in bf16
    training      16 bytes per trained number: weight 4, gradient 4, Adam's two moments 4 + 4 (all fp32)
    activations   what backward will need again, for every token of a micro-batch; `layer_bytes` has it term by term
    KV cache      2 * layers * K heads * head dim numbers per token, while sampling

Sampling and training take turns, so the peak is what always stays plus the larger of the two.

    python ppo.py --init llama-7b --dry_run
"""
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

import checkpoints
import lora
import rwkv
from common import UserError, human
from kernels import blocks, nf4
from model import SHORT, ModelConfig
from sampling import LARGEST, can_pack

CARDS = (8, 16, 24, 40, 80)            # GiB, though everyone calls them GB
RESERVE = 1.5e9                        # what a CUDA context and a fragmented allocator keep for themselves


@dataclass(frozen=True)
class Plan:
    """A stage and its settings, named as the flags of the scripts where they have one."""
    config: ModelConfig
    stage: str                         # sft | reward | ppo
    batch: int = 1                     # rows per forward
    length: int = 512                  # tokens per row; in PPO prompt + response
    prompt: int = 0
    response: int = 0
    rollout: int = 0                   # answers sampled at once
    lora_r: int = 16                   # 0: every weight is trained
    targets: tuple[str, ...] = lora.ALL_LINEAR
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    separate_models: bool = False      # PPO: a whole model for each role
    merge: bool = True                 # PPO: the adapter is merged into the weights for sampling
    quant: str = ""                    # nf4: the frozen linears in four bits
    device: str = "cpu"                # cpu | cuda | mps: attention is computed in other ways there

    @property
    def r(self) -> int:
        return 0 if self.separate_models else self.lora_r

    @property
    def T(self) -> int:
        return self.prompt + self.response if self.stage == "ppo" else self.length

    @property
    def s(self) -> int:                # bytes of a number in the matrix products
        return 2 if self.dtype == torch.bfloat16 else 4

    @property
    def mixed(self) -> bool:           # full training in bf16: fp32 weights under autocast
        return self.r == 0 and self.s == 2


@dataclass
class Role:
    """A model, or an adapter with its head, that stays in memory from the first step to the last."""
    name: str
    weights: int                       # bytes
    trained: int = 0                   # numbers
    gradients: int = 0                 # bytes
    optimizer: int = 0                 # bytes

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


Rows = list[tuple[str, int, str]]      # (what, bytes, why)


@dataclass
class Table:
    title: str
    parameters: int
    roles: list[Role]                  # always there
    training: Rows                     # only while training
    sampling: Rows                     # only while sampling
    compare: list[tuple[str, int]] = field(default_factory=list)         # (another way to do the same, its bytes)
    fixes: list[tuple[str, int, int]] = field(default_factory=list)      # (flag, peak with it, and with those before)
    on_a_card: int = 0                                                   # the peak there
    free: tuple[str, int] | None = None                                  # (device, bytes)

    @property
    def trainable(self) -> int:
        return sum(role.trained for role in self.roles)

    @property
    def static(self) -> int:
        return sum(role.total for role in self.roles)

    @property
    def total(self) -> int:
        return self.static + max(sum(n for _, n, _ in phase) for phase in (self.training, self.sampling))


# ---------------------------------------------------------------- what always stays

def remember(fn: Callable) -> Callable:
    """Keeps what fn returned, by its arguments as text: even without weights a 7B model takes a tenth of a second."""
    known = {}

    def call(*args):
        key = repr(args)
        if key not in known:
            known[key] = fn(*args)
        return known[key]
    return call


def build(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    with checkpoints.hollow():
        return checkpoints.build(config, dtype)


@remember
def count(config: ModelConfig, linears: tuple[str, ...] = ()) -> int:
    """Parameters of the model, or only the weights of its linears with these names."""
    if not linears:
        return sum(p.numel() for p in build(config).parameters())
    model = build(config)
    linears = lora.all_linear(model) + linears if linears[:len(lora.ALL_LINEAR)] == lora.ALL_LINEAR else linears
    return sum(m.weight.numel() for path, m in model.named_modules() if path.split(".")[-1] in linears)


def role(name: str, parameters) -> Role:
    """Weights; for what is trained a gradient of the same size, Adam's two moments and step count (4 B a tensor)."""
    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    parameters = list(parameters)
    on = [p for p in parameters if p.requires_grad]
    return Role(name, size(parameters), sum(p.numel() for p in on), size(on), 2 * size(on) + 4 * len(on))


def head(config: ModelConfig, weight: bool, bias: bool) -> list[nn.Parameter]:
    """The fp32 vector of a reward or value model, and which of its weight and bias are trained."""
    sizes = ((config.hidden_size, weight), (1, bias))
    return [nn.Parameter(torch.empty(n, device="meta"), requires_grad=trained) for n, trained in sizes]


@remember
def one_base(config: ModelConfig, stage: str, r: int, targets: tuple[str, ...], dtype: torch.dtype,
             quant: str = "") -> list[Role]:
    """LoRA: the frozen base once, in `dtype` or four bits, and an fp32 adapter for each role."""
    model = build(config, dtype)
    small = checkpoints.four_bits(model, quant, "the model")
    base = role("base, frozen", [p for name, p in model.requires_grad_(False).named_parameters() if name not in small])
    base.weights += sum(nf4.nbytes(model.get_parameter(name).numel()) for name in small)
    roles = [base]
    for name in {"sft": ["sft"], "reward": ["reward"], "ppo": ["policy", "value", "reward"]}[stage]:
        lora.apply(model, r, 2.0 * r, targets, name)
        adapter = [p for _, p in lora.parameters(model, name)]
        if stage == "ppo" and name == "reward":                    # it judges and does not learn any more
            adapter = [p.requires_grad_(False) for p in adapter] + head(config, False, False)
        elif name in ("reward", "value"):
            adapter += head(config, True, name == "value")
        roles.append(role(name + " adapter", adapter))
    return roles + ([Role("reference = the base itself", 0)] if stage == "ppo" else [])


@remember
def whole(config: ModelConfig, stage: str) -> list[Role]:
    """Full training: every role a model of its own, in fp32."""
    roles = []
    for name in {"sft": ["model"], "reward": ["reward"], "ppo": ["policy", "reference", "value", "reward"]}[stage]:
        model = build(config)
        frozen = stage == "ppo" and name in ("reference", "reward")
        if name in ("reward", "value") and (stage == "reward" or not config.tie_embeddings):
            model.lm_head.requires_grad_(False)                    # it writes no words
        if frozen:
            model.requires_grad_(False)
        extra = head(config, not frozen, name == "value") if name in ("reward", "value") else []
        roles.append(role(name + (", frozen" if frozen else ""), [*model.parameters(), *extra]))
    return roles


# ---------------------------------------------------------------- what training and sampling add

def norm_bytes(p: Plan, size: int) -> int:
    """One norm, per token of `size` numbers. An RMSNorm keeps its input in fp32, for the square, and 1 / rms; where its
    weight is trained the normalised input too. A LayerNorm keeps its input as it is, the mean and 1 / deviation."""
    if p.config.norm == "layer":
        return (4 if p.mixed else p.s) * size + 8
    return 4 * size + 4 + (4 * size if p.r == 0 and p.config.norm_weight else 0)


def layer_bytes(p: Plan) -> int:
    """What one layer keeps for backward, per token. A linear keeps its input only where its own weight is trained (the
    gradient through a frozen matrix needs the matrix alone), and linears with the same input share it."""
    c, C, s = p.config, p.config.hidden_size, p.s
    on = [n for n in lora.ALL_LINEAR if (p.r == 0 or n in p.targets) and (c.glu or n != "gate_proj")]
    qkv, gate_up = sum(name[0] in "qkv" for name in on), sum(name in ("gate_proj", "up_proj") for name in on)
    if not p.mixed:                                      # only under autocast every linear makes its own bf16 input
        qkv, gate_up = min(qkv, 1), min(gate_up, 1)
        gate_up -= qkv * gate_up if c.parallel == 1 else 0                   # side by side: one input for all of them
    norms = 4 if c.block == "sandwich" else 1 if c.parallel else 2           # NeoX's two norms read the same stream
    total = norms * norm_bytes(p, C) + (8 if c.parallel == 2 else 0)
    total += s * C * (qkv + gate_up)                     # input of q, k, v; of gate and up
    return total + attention_bytes(p) + mlp_bytes(p, "down_proj" in on) + s * p.r * len(on)    # x A^T of every adapter


def heads_of_mask(config: ModelConfig) -> int:
    """ALiBi's penalties differ from head to head, other masks do not."""
    return config.num_heads if config.positions == "alibi" else 1


def attention_bytes(p: Plan) -> int:
    """Attention as on paper (model.attend) keeps H x T probabilities per token; flash attention and
    kernels/blocks.py compute them again."""
    c, s, H, K, D = p.config, p.s, p.config.num_heads, p.config.num_kv_heads, p.config.head_dim
    total = s * D * H                                    # its output = input of o
    if c.attention_softcap or (p.device == "cpu" and p.T <= SHORT):
        copies = (4 if s == 4 else 6) + (s if c.attention_softcap else 0)    # in fp32 and in bf16; tanh of the scores
        total += s * D * (H + 2 * K) + copies * H * p.T                      # q, k, v
    elif p.device == "cpu":                              # kernels/blocks.py: q, k, v
        total += s * D * (H + 2 * K)
    else:                                                # K repeated to H heads; log-sum-exp
        total += s * D * 3 * H + 4 * H + (2 * heads_of_mask(c) * p.T if p.mixed else 0)      # autocast: a bf16 mask
    if c.qk_norm:                                        # "full": one norm over all heads, else one for each
        total += norm_bytes(p, D * H) + norm_bytes(p, D * K) if c.qk_norm == "full" else (H + K) * norm_bytes(p, D)
    return total + (s * D * 3 * H if c.clip_qkv else 0)  # what was inside the bounds


def mlp_bytes(p: Plan, down: bool) -> int:
    """With a gate: gate, act(gate), up, and their product = input of down. Without: up and act(up), where relu needs
    its output only and x sigmoid(x) both of its factors."""
    kept = 3 if p.config.glu else {"relu": 0, "relu_squared": 1, "quick_gelu": 2}.get(p.config.activation, 1)
    shared = not p.config.glu and p.config.activation == "relu"
    return p.s * p.config.intermediate_size * (kept + int(down or shared))


def activations(p: Plan) -> int:
    """Of the whole model, for one micro-batch (B, T). Checkpointing keeps the input of each layer and computes
    one layer at a time again."""
    c = p.config
    if not isinstance(c, ModelConfig):
        return watched(p)
    L, tokens, s = c.num_layers, p.batch * p.T, 4 if p.mixed else p.s
    turning = {"rope": c.rope_dim or c.head_dim, "rope_2d": c.head_dim}.get(c.positions, 0)
    shared = 2 * tokens * turning * s * (2 if c.rope_theta_local else 1)       # cos and sin
    # The mask of padded or packed rows, and one more for layers with a window.
    shared += heads_of_mask(c) * (2 if c.window and c.window < p.T else 1) * p.batch * p.T**2 * s
    shared += tokens * norm_bytes(p, c.hidden_size) * (int(c.final_norm) + int(c.embed_norm))
    layer = tokens * layer_bytes(p)
    return shared + (L * tokens * c.hidden_size * s + layer if p.checkpointing else L * layer)


def block_bytes(p: Plan) -> int:
    """What kernels/blocks.py has in hand in backward: of one block of queries p, do v^T and ds."""
    there = isinstance(p.config, ModelConfig) and p.device == "cpu" and p.T > SHORT and not p.config.attention_softcap
    return there and p.batch * p.config.num_heads * blocks.BLOCK * p.T * (12 if p.s == 4 else 10)


@remember
def watched(p: Plan) -> int:
    """For the families with another block: forward passes on the meta device, and what autograd keeps of them. An
    encoder-decoder is taken at its largest, prompt and answer both as long as a row; full training in bf16 as if it
    were fp32."""
    total = all_layers(p)
    if p.checkpointing:                                  # the inputs of all layers, and one layer computed again
        total = total // p.config.num_layers + all_layers(p, checkpointing=True)
    if isinstance(p.config, rwkv.RWKVConfig):            # the sums of one layer, computed again in backward
        k = torch.zeros(p.batch, p.T, p.config.attention_size, device="meta", requires_grad=True)
        past = rwkv.nothing((p.batch, k.shape[-1]), "meta", torch.float32)
        total += kept(lambda: rwkv.wkv(k, k * 1, k[0, 0], k[0, 0], past, None))
    return total


def all_layers(p: Plan, checkpointing: bool = False) -> int:
    """Every layer behind the first keeps the same, so models of one and of two layers tell what many keep. RWKV's
    tokens are alike too, and two short texts spare thousands of its small steps."""
    stacks = [name for name in ("num_layers", "num_decoder_layers") if hasattr(p.config, name)]

    def at(T: int) -> int:
        q = replace(p, length=T, checkpointing=checkpointing, dtype=p.dtype if p.r else torch.float32)
        one = kept_by(q, dict.fromkeys(stacks, 1))
        two = {name: kept_by(q, dict.fromkeys(stacks, 1) | {name: 2}) for name in stacks}
        return one + sum((getattr(p.config, name) - 1) * (two[name] - one) for name in stacks)

    if not isinstance(p.config, rwkv.RWKVConfig):
        return at(p.T)
    short = at(2)
    return short + (at(3) - short) * (p.T - 2)


@remember
def kept_by(p: Plan, layers: dict[str, int]) -> int:
    """Bytes that autograd keeps of one forward pass through so many layers."""
    model = build(replace(p.config, **layers), p.dtype)
    if p.r:
        lora.apply(model, p.r, 2.0 * p.r, p.targets, p.stage)
    model.checkpointing = p.checkpointing
    ids = torch.zeros(p.batch, p.T, dtype=torch.int64, device="meta")
    more = {"decoder_ids": ids} if getattr(model, "encoder_decoder", False) else {}

    def forward() -> None:
        with lora.use(model, p.stage if p.r else None):
            model.hidden(ids, **more)
    return kept(forward, *model.parameters())


def kept(work: Callable[[], None], *parameters: torch.Tensor) -> int:
    """Bytes that autograd keeps of work(), each storage counted once, parameters left out."""
    own, seen = {p.untyped_storage()._cdata for p in parameters}, {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage()._cdata not in own:
            seen[t.untyped_storage()._cdata] = t         # held, so that no address is used twice
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        work()
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def training(p: Plan) -> Rows:
    layers = "layer inputs, and one layer recomputed" if p.checkpointing else f"{p.config.num_layers} layers"
    rows = [("activations", activations(p), f"{p.batch} x {p.T} tokens, {layers}")]
    scored, V = p.batch * (p.response if p.stage == "ppo" else p.T), p.config.vocab_size
    if p.stage != "reward":
        # In fp32: logits, their log-softmax and its gradient. PPO's scoring has p and p log p as well, for the entropy.
        copies = (4 if p.stage == "ppo" else 3) + bool(getattr(p.config, "final_softcap", None))    # tanh keeps its own
        rows.append(("logits", copies * 4 * scored * V, f"{copies} fp32 copies of {scored} x {V}"))
    if block := block_bytes(p):
        rows.append(("attention", block, f"the scores of {blocks.BLOCK} queries at a time"))
    if p.mixed:
        linear = count(p.config, (*lora.ALL_LINEAR, "lm_head"))
        rows.append(("bf16 copies", 2 * linear, "autocast converts the fp32 weights once per micro-batch"))
    return rows + unpacked(p)


def unpacked(p: Plan) -> Rows:
    """Of a base in four bits one matrix at a time is there in full, for as long as its product lasts."""
    if not p.quant:
        return []
    model = build(p.config)
    largest = max(model.get_parameter(name).numel() for name in checkpoints.four_bits(model, p.quant, "the model"))
    return [("one unpacked matrix", largest * p.s, f"the largest of the layers, {human(largest)} numbers")]


def sampling(p: Plan) -> Rows:
    if p.stage != "ppo":
        return []
    s, answers, V = 4 if p.mixed else p.s, p.rollout or p.batch, p.config.vocab_size
    per_token = 2 * p.config.num_layers * p.config.num_kv_heads * p.config.head_dim * s
    rows = [("KV cache", answers * p.T * per_token, f"{answers} answers x {p.T} tokens x {per_token / 1024:.0f} KiB"),
            ("logits", 4 * 4 * answers * V, f"4 fp32 copies of {answers} x {V}")]
    if p.merge and p.r:
        originals = s * count(p.config, tuple(p.targets))
        rows.append(("unmerged originals", originals, "kept while the adapter is merged into the weights"))
    if copies := packed_bytes(p):
        rows.append(("packed matrices", copies, "a copy of the weights as a CPU's matrix units read them"))
    return rows + unpacked(p)


def packed_bytes(p: Plan) -> int:
    """What sampling.packed adds while it lasts."""
    numbers = count(p.config, (*lora.ALL_LINEAR, "lm_head"))
    bf16 = p.device == "cpu" and p.s == 2 and not p.mixed and not p.quant
    return 2 * numbers if bf16 and numbers <= LARGEST and can_pack() else 0


# ---------------------------------------------------------------- the estimate

def estimate(config: ModelConfig, stage: str, **settings) -> Table:
    """Memory of a stage ("sft", "reward", "ppo") on one device; the settings are the fields of Plan."""
    if stage != "sft" and not isinstance(config, ModelConfig):
        raise UserError(f"--dry_run of {stage} knows the decoders of model.py only, not "
                        f"{type(config).__name__}")
    plan = Plan(config, stage, **settings)
    table, n = tabulate(plan), count(config)
    if stage == "ppo":
        table.compare = [("four bf16 copies, without any training state", 4 * 2 * n),
                         ("policy and value trained whole, and two frozen bf16 models", (2 * 16 + 2 * 2) * n)]
    table.fixes, table.free = fixes(plan), free_memory(plan.device)
    table.on_a_card = tabulate(replace(plan, device="cuda")).total
    return table


def tabulate(p: Plan) -> Table:
    roles = one_base(p.config, p.stage, p.r, p.targets, p.dtype, p.quant) if p.r else whole(p.config, p.stage)
    how = f"LoRA r = {p.r}" if p.r else "every weight trained"
    title = f"{p.stage}, {how}, {'bf16' if p.s == 2 else 'fp32'}" + (f", base in {p.quant}" if p.quant else "")
    return Table(title, count(p.config), roles, training(p), sampling(p))


def fixes(plan: Plan) -> list[tuple[str, int, int]]:
    """The flags that help, the strongest first: (flag, peak with it alone, peak with it and those before)."""
    options = {"--dtype bf16": {"dtype": torch.bfloat16}, "--checkpointing": {"checkpointing": True},
               "--micro_batch 1": {"batch": 1}, "--no_merge": {"merge": False},
               f"--batch_size {plan.rollout // 2}": {"rollout": plan.rollout // 2}}
    if plan.r and not plan.quant and (plan.stage != "ppo" or not plan.merge):
        with contextlib.suppress(UserError):             # not every family and width goes into four bits
            checkpoints.four_bits(build(plan.config), "nf4", "the model")
            options["--quant nf4"] = {"quant": "nf4"}
    if plan.r == 0:
        options["--lora_r 16"] = {"lora_r": 16, "separate_models": False}
    if plan.stage == "ppo":
        options[f"--response_len {plan.response // 2}"] = {"response": plan.response // 2}
    else:
        options[f"--max_len {plan.length // 2}"] = {"length": plan.length // 2}

    def peak(changes: dict) -> int:
        return tabulate(replace(plan, **changes)).total

    found, chosen = [], {}
    while options:
        flag = min(options, key=lambda name: peak({**chosen, **options[name]}))
        change, before = options.pop(flag), peak(chosen)
        chosen |= change
        if peak(chosen) > 0.98 * before:                 # two per cent: not worth a flag, nor are the others
            break
        found.append((flag, peak(change), peak(chosen)))
    return found


def free_memory(device: str = "cpu") -> tuple[str, int] | None:
    """What this machine could give just now."""
    if device == "cuda":
        return (torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):                     # not Linux: no way to ask without another package
        return None
    return "this machine (CPU)", 1024 * int(line.split()[1])


# ---------------------------------------------------------------- print

def gb(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e7 or n == 0 else f"{n / 1e6:.2f} MB"


def print_table(t: Table) -> None:
    print(f"{t.title}: {human(t.parameters)} parameters ({t.parameters:,}), {human(t.trainable)} trained "
          f"({t.trainable:,})\n")
    print(f"  {'always':28}{'weights':>12}{'gradients':>12}{'Adam':>12}{'together':>12}")
    for x in t.roles:
        print(f"  {x.name:28}" + "".join(f"{gb(n):>12}" for n in (x.weights, x.gradients, x.optimizer, x.total)))
    for name, phase in (("while training", t.training), ("while sampling", t.sampling)):
        if phase:
            print(f"  {name}")
        for what, n, why in phase:
            print(f"    {what:26}{gb(n):>48}   {why}")
    print(f"  {'peak':28}{gb(t.total):>48}   what always stays + {'the larger of two' if t.sampling else 'training'}\n")
    for what, n in t.compare:
        print(f"  for comparison: {gb(n)} {what}")
    fits = ", ".join(f"{card} GB {'yes' if t.on_a_card + RESERVE <= card * 2**30 else 'no'}" for card in CARDS)
    print(f"  fits on a card of: {fits}   (its peak is {gb(t.on_a_card)}, and {gb(RESERVE)} for CUDA itself)")
    if t.free:
        print(f"  {t.free[0]} has {gb(t.free[1])} free: it {'fits' if t.total <= t.free[1] else 'does not fit'}")
    if t.fixes:
        print(f"\n  {'what would save memory':40}{'peak with it alone':>20}{'and those above':>20}")
    for flag, alone, together in t.fixes:
        print(f"  {flag:40}{gb(alone):>20}{gb(together):>20}")

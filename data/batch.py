"""Rows to samples, samples to batches. What is cut or left out is counted and printed; nothing disappears silently.

    encode_sft          {"ids", "mask"}                  mask 1 = supervised
    encode_preferences  {"sequences": [best .. worst], "prompt_len"}
    encode_prompts      {"ids", "prompt"}
    pack                several samples in one row, with `docs` 1, 1, 1, 2, 2, ...: none sees another
    pad                 lists of ids to a rectangle and its mask
    Batches             an endless shuffled stream whose place can be saved and restored
"""
import bisect

import numpy as np
import torch
from torch import Tensor

from common import UserError


class Samples(list):
    """A list that knows what happened on the way to it."""
    def __init__(self, rows=(), counts: dict[str, int] | None = None, title: str = ""):
        super().__init__(rows)
        self.counts, self.title = counts or {}, title

    def print_report(self) -> None:
        print(f"{self.title}: {len(self)} samples" + "".join(f", {n} {what}" for what, n in self.counts.items() if n))


def encode_sft(rows: list[dict], tokenizer, max_len: int) -> Samples:
    """Conversations to ids and masks. Too long: whole turns from the start that fit; if not even the first answer fits,
    it is cut, and then no end token is supervised: the model must not learn to stop in the middle of a sentence."""
    samples, counts = Samples(title="sft"), {"shortened to fewer turns": 0, "cut within the answer": 0,
                                             "dropped, prompt alone is too long": 0, "dropped, nothing supervised": 0}
    ends = 0
    for row in rows:
        if "text" in row:
            first = [tokenizer.bos_id] if tokenizer.add_bos else []
            ids = first + tokenizer.encode(row["text"]) + tokenizer.eos_ids[:1]
            mask = [1] * len(ids)
        else:
            messages = row["messages"]
            while messages and messages[-1]["role"] != "assistant":
                messages = messages[:-1]  # a question without answer teaches nothing
            ids, mask = tokenizer.render(messages) if messages else ([], [])
            kept = messages
            while len(ids) > max_len and sum(m["role"] == "assistant" for m in kept) > 1:
                last = max(i for i, m in enumerate(kept[:-1]) if m["role"] == "assistant")
                kept = kept[:last + 1]
                ids, mask = tokenizer.render(kept)
            counts["shortened to fewer turns"] += len(kept) < len(messages)
        if len(ids) > max_len:
            ids, mask = ids[:max_len], mask[:max_len]
            counts["cut within the answer" if any(mask) else "dropped, prompt alone is too long"] += 1
        if not any(mask[1:]):
            counts["dropped, nothing supervised"] += not any(mask) and len(ids) < max_len
            continue
        ends += any(m and i in tokenizer.eos_ids for i, m in zip(ids, mask))
        samples.append({"ids": ids, "mask": mask, "where": row.get("where", "?")})
    samples.counts = counts
    samples.title = f"sft (end tokens supervised in {ends} of {len(samples)})"
    if samples and not ends:
        raise UserError("no sample has a supervised end token: a model trained on them would never stop. Raise "
                        "--max_len or choose another --template")
    return samples


def last_answers(samples: Samples) -> Samples:
    """For an encoder-decoder: of each conversation the last answer is supervised, all before it is its prompt.
    mask 0 0 1 1 0 0 1 1 0 -> 0 0 0 0 0 0 1 1, and the ids end with it"""
    kept = Samples(counts={**samples.counts, "earlier answers read as prompt": 0}, title=samples.title)
    for s in samples:
        end = len(s["mask"]) - s["mask"][::-1].index(1)
        start = max((i + 1 for i in range(end) if not s["mask"][i]), default=0)
        if start == 0:
            raise UserError(f"{s.get('where')}: a text without a prompt; an encoder-decoder learns answers to prompts")
        kept.counts["earlier answers read as prompt"] += any(s["mask"][:start])
        kept.append({**s, "ids": s["ids"][:end], "mask": [0] * start + [1] * (end - start)})
    return kept


def encode_preferences(rows: list[dict], tokenizer, max_len: int) -> Samples:
    """Ranked answers to sequences prompt + answer + end. The prompt is cut from the left: the reward is read at the end
    token, which therefore is the last token of every sequence."""
    samples, counts = Samples(title="preferences"), {"prompts cut from the left": 0, "answers dropped, too long": 0,
                                                     "prompts dropped, answers equal after cutting": 0,
                                                     "prompts dropped, fewer than two answers": 0}
    for row in rows:
        prompt = tokenizer.render(row["prompt"], add_generation_prompt=True)[0]
        tails = []
        for answer in row["answers"]:
            ids, mask = tokenizer.render([*row["prompt"], {"role": "assistant", "content": answer}])
            assert ids[:len(prompt)] == prompt, f"{row.get('where')}: the prompt's ids are no prefix of prompt + answer"
            end = max(i for i, m in enumerate(mask) if m) + 1  # what a format prints behind the end is left out
            tails.append(ids[len(prompt):end])
        fitting = [t for t in tails if len(t) < max_len]
        counts["answers dropped, too long"] += len(tails) - len(fitting)
        room = max_len - max(map(len, fitting), default=0)
        if len(prompt) > room:
            counts["prompts cut from the left"] += 1
            prompt = prompt[len(prompt) - room:]
        distinct = list({tuple(t): t for t in fitting}.values())
        if len(distinct) < 2:
            equal = len(fitting) > 1
            counts["prompts dropped, answers equal after cutting" if equal
                   else "prompts dropped, fewer than two answers"] += 1
            continue
        samples.append({"sequences": [prompt + t for t in distinct], "prompt_len": len(prompt),
                        "where": row.get("where", "?")})
    samples.counts = counts
    if not samples:
        raise UserError(f"no usable comparison is left "
                        f"({', '.join(f'{n} {what}' for what, n in counts.items() if n) or 'the file is empty'}): "
                        "raise --max_len or look at the data")
    return samples


def encode_prompts(rows: list[dict], tokenizer, max_len: int) -> Samples:
    """Prompts to ids that end where the assistant's words begin; too long ones lose their beginning."""
    samples, counts = Samples(title="prompts"), {"cut from the left": 0}
    for row in rows:
        ids = tokenizer.render(row["prompt"], add_generation_prompt=True)[0]
        counts["cut from the left"] += len(ids) > max_len
        samples.append({"ids": ids[-max_len:], "prompt": row["prompt"], "where": row.get("where", "?")})
    samples.counts = counts
    return samples


def pad(sequences: list[list[int]], pad_id: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids, mask (B, T) int64, mask 1 = real.
    [[5, 6], [7, 8, 9]] -> [[5, 6, pad], [7, 8, 9]], [[1, 1, 0], [1, 1, 1]]
    side="left":           [[pad, 5, 6], [7, 8, 9]], [[0, 1, 1], [1, 1, 1]]"""
    assert sequences and side in ("left", "right"), f"{len(sequences)} sequences to pad on the {side}"
    T = max(map(len, sequences))
    ids = torch.full((len(sequences), T), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), T), dtype=torch.int64)
    for row, (sequence, n) in enumerate((s, len(s)) for s in sequences):
        where = slice(0, n) if side == "right" else slice(T - n, T)
        ids[row, where], mask[row, where] = torch.tensor(sequence, dtype=torch.int64), 1
    return ids, mask


def split(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of `last_answers`, padded on the right -> prompts and their mask, answers and their mask (bool).
    ids [[5, 6, 7, 8], [5, 8, 9, 0]], mask [[0, 0, 1, 1], [0, 1, 1, 0]]
    -> [[5, 6], [5, *]], [[1, 1], [1, 0]], [[7, 8], [8, 9]], [[1, 1], [1, 1]]      * a pad: any token, nobody looks"""
    first, n = mask.argmax(1), mask.sum(1)                                     # (B,), (B,)
    assert int(first.min()) > 0, "a row without a prompt: an encoder-decoder needs at least one token of it"
    index = torch.arange(ids.shape[1], device=ids.device)
    answer = (first[:, None] + index[:int(n.max())]).clamp(max=ids.shape[1] - 1)
    prompt = index[:int(first.max())]
    return ids[:, prompt], (prompt < first[:, None]).long(), ids.gather(1, answer), index[:int(n.max())] < n[:, None]


def pack(samples: list[dict], max_len: int) -> list[dict]:
    """Best-fit decreasing: the longest sample first, each into the fullest row that still has room for it. No sample is
    split. lengths 5, 4, 3, 2 with max_len 7 -> [5, 2], [4, 3]; row: ids joined, mask joined, docs 1 1 1 1 1 2 2"""
    rooms: list[tuple[int, int]] = []                                          # (free tokens, row), sorted
    rows: list[list[dict]] = []
    for sample in sorted(samples, key=lambda s: -len(s["ids"])):
        n = len(sample["ids"])
        assert n <= max_len, f"{sample.get('where')}: {n} tokens do not fit into rows of {max_len}"
        k = bisect.bisect_left(rooms, (n, -1))
        free, row = rooms.pop(k) if k < len(rooms) else (max_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        bisect.insort(rooms, (free - n, row))
    return [{"ids": [i for s in row for i in s["ids"]],
             # A document's first token is predicted by nothing: its neighbour must not be asked to guess it.
             "mask": [m if t else 0 for s in row for t, m in enumerate(s["mask"])],
             "docs": [k + 1 for k, s in enumerate(row) for _ in s["ids"]],
             "where": ", ".join(str(s.get("where", "?")) for s in row)} for row in rows]


class Batches:
    """An endless stream of batches. Epoch e is the permutation drawn from (seed, e); every rank takes each size-th item
    of the same one, so no two ranks ever see the same sample. The last batch of an epoch may be smaller: nothing is
    dropped."""
    def __init__(self, samples: list, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        if batch_size < world:
            raise UserError(f"--batch_size {batch_size} is over all ranks, and there are {world}: each needs at least "
                            "one")
        if len(samples) < world:
            raise UserError(f"{len(samples)} samples for {world} ranks: each needs at least one per batch")
        self.samples, self.batch_size, self.seed, self.rank, self.world = samples, batch_size, seed, rank, world
        self.epoch, self.at = 0, 0

    def order(self) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.seed, self.epoch])).permutation(len(self.samples))

    def next(self) -> list:
        """This rank's share of the next batch; never empty."""
        batch = self.order()[self.at:self.at + self.batch_size]
        self.at += len(batch)
        if len(self.samples) - self.at < self.world:                           # what is left could not feed every rank
            batch = np.concatenate((batch, self.order()[self.at:]))
            self.epoch, self.at = self.epoch + 1, 0
        return [self.samples[i] for i in batch[self.rank::self.world]]

    def state(self) -> dict:
        return {"epoch": self.epoch, "at": self.at}

    def load_state(self, state: dict) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


def show(tokenizer, ids: list[int], mask: list[int], colour: bool = True) -> str:
    """The sample as text: supervised green, the rest grey, end tokens by name; without colour in [[ ]]."""
    on, off, end = ("\033[32m", "\033[90m", "\033[0m") if colour else ("[[", "", "]]")
    out, i = [], 0
    while i < len(ids):
        j = i
        while j < len(ids) and bool(mask[j]) == bool(mask[i]):
            j += 1
        text = tokenizer.decode(ids[i:j])
        out.append(f"{on}{text}{end}" if mask[i] else f"{off}{text}{end if colour else ''}")
        i = j
    return "".join(out)

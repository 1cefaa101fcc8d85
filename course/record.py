"""What the recorded runs of this folder share: many small jobs on all cores, which code made their figures, and rows
that outlive an interruption. A record is one JSON file, {part: {torch, machine, date, code, rows}}."""
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

import common

ROOT = Path(__file__).resolve().parents[1]


def stamp(*more: Path) -> dict[str, str]:
    """Torch, machine, date, and a hash of every file of this repository that is imported here, and of `more`."""
    loaded = {str(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    ours = {Path(name) for name in loaded if ROOT in Path(name).parents and "site-packages" not in name}
    digest = hashlib.sha256()
    for file in sorted(ours | set(more)):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return {"torch": torch.__version__, "machine": f"{os.cpu_count()} cores of {platform.machine()}",
            "date": time.strftime("%Y-%m-%d"), "code": digest.hexdigest()[:12]}


class Unfinished:
    """Rows of a run that is under way, by key, beside the file that they will end in. A run that was interrupted goes
    on with them; one that has ended starts anew, and so does one of other code, torch or machine."""
    def __init__(self, file: Path, made_by: dict[str, str]):
        self.file = file.with_suffix(".part")
        self.made_by = {name: x for name, x in made_by.items() if name != "date"}
        saved = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.rows = saved["rows"] if saved.get("made_by") == self.made_by else {}

    def keep(self, key: str, row) -> None:
        self.rows[key] = row
        common.atomic_write(self.file, json.dumps({"made_by": self.made_by, "rows": self.rows}) + "\n")

    def done(self) -> None:
        self.file.unlink(missing_ok=True)


def timed(function, given: tuple) -> dict:
    """In a process of its own. CPU seconds of one thread: unlike those of the clock they do not count what else runs
    here."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    before = sum(os.times()[:4])
    return {**function(*given), "CPU seconds": round(sum(os.times()[:4]) - before, 1)}


def run(file: Path, parts: dict, only: tuple[str, ...], workers: int, made_by: dict[str, str]) -> tuple[dict, dict]:
    """{part: [(function, arguments)]}, each of which gives a row -> the parts that ran now, and the whole record: these
    and what the file has of the others, if they are parts still. A part without jobs is left out."""
    if strange := set(only) - set(parts):
        raise common.UserError(f"--only {', '.join(sorted(strange))}: the parts are {', '.join(parts)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    under_way, fresh = Unfinished(file, made_by), {}
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, get_context("spawn")) as pool:
        for name, jobs in parts.items():
            if jobs and (not only or name in only):
                keys = [f"{name} {json.dumps(given)}" for _, given in jobs]
                left = {key: job for key, job in zip(keys, jobs) if key not in under_way.rows}
                for future in as_completed(waiting := {pool.submit(timed, *job): key for key, job in left.items()}):
                    under_way.keep(waiting[future], future.result())
                fresh[name] = {**made_by, "rows": [under_way.rows[key] for key in keys]}
                print(f"{name}: {len(left)} runs" + (f", {len(jobs) - len(left)} more before an interruption" if
                                                     len(left) < len(jobs) else ""), flush=True)
            elif name in recorded:
                print(f"{name}: recorded {recorded[name]['date']}, not run", flush=True)
    recorded = {name: (recorded | fresh)[name] for name in parts if name in recorded | fresh}
    common.atomic_write(file, json.dumps(recorded, ensure_ascii=False) + "\n")
    under_way.done()
    return fresh, recorded

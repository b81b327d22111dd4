"""Shows that a training run survives anything: kills, stop signals, a full disk, a torn checkpoint, other processes.

It trains a tiny model on the CPU, once undisturbed, then again and again with harm done to it, and compares the bytes
of the final weights. It exits with 1 if anything differs, and writes what it did to OUT_DIR/report.json.

    python scripts/chaos_train.py --kills 30 --terms 5 --out_dir out/chaos
    python scripts/chaos_train.py --short
    python scripts/chaos_train.py --cases kills torn --stages pretrain

Windows: a kill is TerminateProcess there; SIGTERM and the full disk are left out, as it has nothing like them.
"""

import argparse
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from model.weights import atomic_write, read_sidecar, read_state_dict, versions, write_json
from trainer.arguments import ROOT, SAMPLE_DIR, friendly_errors, input_path, output_path, positive_int
from trainer.checkpoint import read_state

WINDOWS = os.name == "nt"
CASES = ("kills", "disk", "torn", "world")
SAVE_INTERVAL, EVAL_INTERVAL, BATCH_SIZE, HIDDEN = 2, 10, 8, 64
PER_ROUND = 5  # signals at most: a run that is nearly done would be stopped in its imports again and again
MARK = ".chaos"  # in a folder that this script may empty
PATIENCE = 300.0  # seconds until a process that says nothing is given up
STEP = re.compile(r"Epoch:\[(\d+)/\d+\]\((\d+)/(\d+)\)")
TOLERANCE = 1e-5  # between one process and two, which add in another order


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--kills", type=int, default=30, help="SIGKILLs that hit a living process, over all stages")
    add("--terms", type=int, default=5, help="SIGTERMs, likewise")
    add("--steps", type=positive_int, default=60, help="updates of a run")
    add("--out_dir", type=output_path, default=ROOT / "out" / "chaos", help="emptied at the start if it is its own")
    add("--data_path", type=input_path, help="texts; part of the sample data if not given")
    add("--sft_path", type=input_path, help="conversations; part of the sample data if not given")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--seed", type=int, default=0, help="of the times of the kills")
    add("--short", action="store_true", help="pretraining only: 3 kills, 1 SIGTERM, torn checkpoint, full disk if root")
    args = parser.parse_args(argv)
    if args.short:
        args.kills, args.terms, args.steps, args.stages = 3, 1, 20, ["pretrain"]
        args.cases = ["kills", "torn"] + ["disk"] * may_mount()
    return args


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    script: str
    sample: str  # of dataset/sample
    rows: int  # of it that are taken: a few epochs of a run
    flags: list[str] = field(default_factory=list)


STAGES = {
    "pretrain": Stage("trainer/train_pretrain.py", "pretrain", 300),
    "full_sft": Stage("trainer/train_full_sft.py", "sft", 160, ["--from_weight", "pretrain"]),
}


def prepare_data(args) -> dict[str, list[str]]:
    """For each stage the flags that name its data: the first rows of a sample file, or what the user gave."""
    given = {"pretrain": args.data_path, "full_sft": args.sft_path}
    flags = {}
    for name, stage in STAGES.items():
        folder = args.out_dir / "data"
        folder.mkdir(parents=True, exist_ok=True)
        train, held_back = folder / f"{stage.sample}.jsonl", folder / f"{stage.sample}_val.jsonl"
        for path, rows in ((train, stage.rows), (held_back, 24)):
            with open(SAMPLE_DIR / path.name, encoding="utf-8") as file:
                path.write_text("".join(islice(file, rows)), encoding="utf-8", newline="\n")
        flags[name] = ["--data_path", str(given[name] or train), "--val_path", str(held_back)]
    return flags


def command(name: str, folder: Path, data: list[str], steps: int, resume: bool, *more) -> list[str]:
    """What a user would type, for a tiny model with everything below `folder`; flags in `more` win."""
    stage = STAGES[name]
    sizes = "--hidden_size 64 --num_hidden_layers 2 --num_attention_heads 4 --max_seq_len 128 --epochs 1000".split()
    how = f"--device cpu --dtype float32 --use_compile 0 --num_workers 0 --log_interval 1 --max_steps {steps}".split()
    how += f"--save_interval {SAVE_INTERVAL} --eval_interval {EVAL_INTERVAL} --batch_size {BATCH_SIZE}".split()
    places = ["--save_dir", folder / "out", "--checkpoint_dir", folder / "checkpoints", "--cache_dir", folder / "cache"]
    flags = [*sizes, *how, *places, *data, *stage.flags, "--from_resume", int(resume), *more]
    return [sys.executable, str(ROOT / stage.script), *map(str, flags)]


def fresh_folder(args, name: str, case: str, start_weights: Path | None) -> Path:
    """A new folder for a run, with the weights that it starts from."""
    folder = args.out_dir / f"{name}-{case}"
    (folder / "out").mkdir(parents=True)
    put_start_weights(folder, start_weights)
    return folder


def put_start_weights(folder: Path, weights: Path | None) -> None:
    if weights is not None:
        for path in (weights, weights.with_suffix(".json")):
            shutil.copyfile(path, folder / "out" / path.name)


class Watched:
    """A process, and the lines that it has printed so far; ended for certain when the `with` block is left."""

    def __init__(self, command: list[str], **environment: str):
        plain = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
        # a session of its own: Ctrl-C is for this script, and whatever the process started ends with it
        self.process = subprocess.Popen(
            command, env=os.environ | plain | environment, start_new_session=not WINDOWS, **how
        )
        self.began = self.spoke_at = time.monotonic()
        self.first_step_at, self.lines = None, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.spoke_at = time.monotonic()
            if self.first_step_at is None and STEP.search(line):
                self.first_step_at = self.spoke_at
            self.lines.append(line.rstrip())

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if not WINDOWS:
            with suppress(ProcessLookupError):  # nobody is left of its session
                os.killpg(self.process.pid, signal.SIGKILL)
        elif self.process.poll() is None:
            self.process.kill()
        self.end()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_over(self) -> bool:
        """It has trained and said where its weights are: only Python's own end is left."""
        return bool(self.updates()) and self.lines[-1].startswith("weights: ")

    @property
    def was_too_late(self) -> bool:
        """A SIGTERM met it when it was over and had given the signal back."""
        return self.is_over and self.process.returncode == -signal.SIGTERM

    def updates(self) -> list[int]:
        return updates_of(self.lines)

    def wait_for(self, condition) -> bool:
        """Until condition() holds; whether it did before the process ended."""
        while not condition():
            if self.ends_within(0.01):
                self._reader.join()
                break
            self._check_life()
        return bool(condition())

    def _check_life(self) -> None:
        if time.monotonic() - self.spoke_at > PATIENCE:
            raise ValueError(f"nothing happened for {PATIENCE:.0f} s after: {self.lines[-3:]}")

    def ends_within(self, seconds: float) -> bool:
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> int:
        """Its exit status, once it has ended by itself; all its lines are there then."""
        while not self.ends_within(1.0):
            self._check_life()
        self._reader.join()
        return self.process.returncode


def updates_of(lines: list[str]) -> list[int]:
    """The numbers of the updates that the lines report, counted over all epochs."""
    found = [STEP.search(line) for line in lines]
    return [(int(m[1]) - 1) * int(m[3]) + int(m[2]) for m in found if m]


# --- what is checked --------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """sha256 over the names and bytes of the tensors of a weight file, sorted by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(read_state_dict(path).items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def final_digests(folder: Path, name: str) -> dict[str, str]:
    """Of the last weights, and of the best by validation."""
    paths = [folder / "out" / f"{name}{kind}_{HIDDEN}.pth" for kind in ("", "_best")]
    return {path.name: digest(path) for path in paths if path.exists()}


def damaged(folder: Path) -> list[str]:
    """What cannot be read of the files that a stopped run left: each must be whole, the old one or the new one."""
    problems = []
    for path in sorted((folder / "checkpoints").glob("*_resume*.pth")):
        with noted(problems):
            read_state(path)
    for path in sorted((folder / "out").glob("*.pth")):
        with noted(problems):
            read_state_dict(path)
            if read_sidecar(path) is None:
                raise ValueError(f"{path} has no sidecar")
    return problems


@contextmanager
def noted(problems: list[str]):
    """Add the message of a ValueError to the problems instead of ending here: the next file is looked at, too."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error))


def temporaries(folder: Path) -> set[Path]:
    return set(folder.rglob("*.tmp"))


def phase(lines: list[str], wrote: bool, steps: int) -> str:
    """What a process was doing when it was stopped, by the last line that it had printed.

    Args:
        wrote: it left a half-written file behind. steps: updates of the run.
    """
    if not lines:
        return "import"
    if wrote:
        return "saving"
    if not updates_of(lines):
        return "data"
    last = updates_of(lines[-1:])
    if not last:
        return "validation" if lines[-1].startswith(("validation", "sample")) else "end"
    return "validation" if last[0] % EVAL_INTERVAL == 0 or last[0] == steps else "step"


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """An undisturbed run: how long it took to its first update and from there on (seconds), what it left."""

    start: float
    rest: float
    digests: dict[str, str]
    weights: Path

    def remaining(self, done: int, steps: int) -> float:
        """Seconds that a process would take that goes on after `done` updates."""
        return self.start + self.rest * (1 - done / steps)


class Chaos:
    """The cases for one stage; each returns what goes into the report, "problems" being what should not have been."""

    def __init__(self, args, name: str, data: list[str], start_weights: Path | None, rng: random.Random):
        self.args, self.name, self.data, self.start_weights, self.rng = args, name, data, start_weights, rng
        self.reference = self._reference()

    def _start(self, folder: Path, resume: bool, *more, **environment: str) -> Watched:
        return Watched(command(self.name, folder, self.data, self.args.steps, resume, *more), **environment)

    def _fresh(self, case: str) -> Path:
        return fresh_folder(self.args, self.name, case, self.start_weights)

    def _reference(self) -> Reference:
        folder = self._fresh("undisturbed")
        with self._start(folder, False) as run:
            if run.end() != 0 or run.first_step_at is None:
                raise ValueError(f"the undisturbed run failed: {run.text[-2000:]}")
            start, rest = run.first_step_at - run.began, run.spoke_at - run.first_step_at
        weights = folder / "out" / f"{self.name}_{HIDDEN}.pth"
        return Reference(start, rest, final_digests(folder, self.name), weights)

    def _finished(self, folder: Path, run: Watched) -> list[str]:
        """What is wrong with a run that has ended by itself."""
        if run.end() != 0 and not run.was_too_late:
            return [f"{folder.name}: exit status {run.process.returncode} after {run.lines[-5:]}"]
        found = final_digests(folder, self.name)
        for name, digest in found.items():
            print(f"  {folder.name}: ended by itself, {name} {digest[:16]}", flush=True)
        return [
            f"{folder.name}: {name} is {found.get(name)}, undisturbed {expected}"
            for name, expected in self.reference.digests.items()
            if found.get(name) != expected
        ]

    # --- kills and stop signals

    def kills(self, kills: int, terms: int) -> dict:
        """Rounds of the same run, each stopped until it ends by itself, until so many signals have hit."""
        tally = {"kills": 0, "terms": 0, "rounds": 0, "resumes": 0, "where": Counter(), "lost": [], "problems": []}
        while tally["kills"] < kills or tally["terms"] < terms:
            tally["rounds"] += 1
            self._round(self._fresh(f"round{tally['rounds']}"), kills, terms, tally)
            if tally["problems"]:
                break
        return tally

    def _round(self, folder: Path, kills: int, terms: int, tally: dict) -> None:
        """One run to its end. Updates that were made and are made again after a resume are counted as lost."""
        made, may_lose, resumes = 0, 0, 0
        while True:
            left = [kills - tally["kills"], terms - tally["terms"]]
            enough = resumes == PER_ROUND or not any(left)
            kind = None if enough else self.rng.choices(["kill", "term"], left)[0]
            before = temporaries(folder)
            with self._start(folder, resumes > 0) as run:
                hit = self._interrupt(run, kind, made)
                status = run.end()
                updates = run.updates()
                if updates:
                    lost = made - updates[0] + 1
                    tally["lost"] += [lost] if resumes else []
                    if lost > may_lose:
                        tally["problems"].append(f"{folder.name}: {lost} updates lost, at most {may_lose} may be")
                    made, may_lose = updates[-1], SAVE_INTERVAL if kind == "kill" else 0
                if not hit:
                    tally["problems"] += self._finished(folder, run)
                    return
            if kind == "kill":
                tally["where"][phase(run.lines, bool(temporaries(folder) - before), self.args.steps)] += 1
            tally[f"{kind}s"] += 1
            tally["problems"] += damaged(folder)
            if kind == "term" and (status != 143 or "--from_resume 1" not in run.text):
                tally["problems"].append(f"{folder.name}: SIGTERM gave exit status {status}: {run.lines[-3:]}")
            tally["resumes"] += 1
            resumes += 1
            print(f"  {folder.name}: {kind} {tally[kind + 's']} after update {made}", flush=True)

    def _interrupt(self, run: Watched, kind: str | None, made: int) -> bool:
        """Send the signal at a random time; whether it met a living process.

        Half of the kills may fall at any time, imports and tokenising included; the others, and the stop signals, which
        a run heeds once it trains, fall after an update.
        """
        if kind is None:
            return False
        whole = self.reference.remaining(made, self.args.steps)
        if kind == "kill" and self.rng.random() < 0.5:
            delay = self.rng.uniform(0, 1.2 * whole)
        else:
            run.wait_for(run.updates)
            delay = self.rng.uniform(0, whole - self.reference.start)
        if run.ends_within(delay) or (kind == "term" and run.is_over):
            return False
        (run.process.kill if kind == "kill" else run.process.terminate)()
        return run.end() != 0 and not run.was_too_late

    # --- one mishap each

    def torn(self) -> dict:
        """A run is killed, its newest checkpoint cut at a random byte, and resumed."""
        folder, problems = self._fresh("torn"), []
        with self._start(folder, False) as run:
            if not run.wait_for(lambda: run.updates()[-1:] > [3 * SAVE_INTERVAL]):
                raise ValueError(f"{folder} ended before it could be killed: pass more --steps. {run.text[-500:]}")
            run.process.kill()
        newest = min((folder / "checkpoints").glob("*_resume.pth"))
        content = newest.read_bytes()
        cut = self.rng.randrange(len(content))
        atomic_write(newest, lambda temporary: Path(temporary).write_bytes(content[:cut]))
        with self._start(folder, True) as run:
            problems += self._finished(folder, run)
            first = (run.updates() or [1])[0]
            if newest.name not in run.text:
                problems.append(f"{folder.name}: the torn {newest.name} was not named")
            if first == 1:
                problems.append(f"{folder.name}: the checkpoint before the torn one was not used")
        return {"cut_at": cut, "of": len(content), "resumed_at": first, "problems": problems}

    def disk(self) -> dict:
        """The disk is full for a while: the run warns, goes on, and saves again when there is room."""
        folder, problems = self._fresh("disk"), []
        size = 2 * sum(path.stat().st_size for path in self.reference.weights.parents[1].rglob("*.pth")) + (8 << 20)
        with small_disk(folder, size) as how:
            if how is None:
                return {"left_out": "no root for a tmpfs, and no limit on the files of others here", "problems": []}
            (folder / "out").mkdir(exist_ok=True)
            put_start_weights(folder, self.start_weights)
            with self._start(folder, False) as run:
                run.wait_for(lambda: run.updates()[-1:] > [SAVE_INTERVAL])
                with full(how, folder, run.process.pid):
                    warned = run.wait_for(lambda: "could not be saved" in run.text)
                    at = (run.updates() or [0])[-1]
                    went_on = run.wait_for(lambda: run.updates()[-1:] >= [at + 3])
                relieved = time.time()
                problems += self._finished(folder, run)
            if not (warned and went_on):
                problems.append(f"{folder.name}: warned {warned}, went on {went_on}: {run.lines[-5:]}")
            saved = [path for path in (folder / "checkpoints").glob("*.pth") if path.stat().st_mtime > relieved]
            problems += damaged(folder) + (
                [] if saved else [f"{folder.name}: no checkpoint after there was room again"]
            )
        return {"how": how, "full_at_update": at, "problems": problems}

    # --- another number of processes

    def world(self) -> dict:
        """Killed with two processes and resumed with one, and the other way round."""
        found = {f"{a} to {b}": self._change(a, b) for a, b in ((2, 1), (1, 2))}
        far = [f"{self.name}, {how} processes: weights differ by {d}" for how, d in found.items() if d > TOLERANCE]
        return {"largest_difference": found, "problems": far}

    def _change(self, before: int, after: int) -> float:
        """The largest difference of a weight from the undisturbed run's."""
        folder = self._fresh(f"world{before}to{after}")
        flags = ["--batch_size", BATCH_SIZE // before]
        with self._group(folder, before, False, flags) as runs:
            if not runs[0].wait_for(lambda: runs[0].updates()[-1:] > [self.args.steps // 3]):
                raise ValueError(f"{folder} ended before it could be killed: {runs[0].text[-1000:]}")
        with self._group(folder, after, True, flags) as runs:
            if [run.end() for run in runs] != [0] * after:
                raise ValueError(f"{folder} could not be resumed with {after} processes: {runs[0].text[-1000:]}")
        weights = self.reference.weights
        ours, theirs = (read_state_dict(path) for path in (folder / "out" / weights.name, weights))
        return max((ours[key] - theirs[key]).abs().max().item() for key in theirs)

    @contextmanager
    def _group(self, folder: Path, count: int, resume: bool, flags: list):
        """So many processes with the variables that torchrun sets: its own workers could not be killed at once."""
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        groups = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {} for rank in range(count)]
        with ExitStack() as stack:
            runs = [stack.enter_context(self._start(folder, resume, *flags, **group)) for group in groups]
            try:
                yield runs
            finally:
                for run in runs:
                    run.process.kill()


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# --- a full disk ------------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0


@contextmanager
def small_disk(folder: Path, size: int):
    """How a full disk can be had here: "tmpfs", mounted at `folder` with `size` bytes; "RLIMIT_FSIZE"; or None."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if may_mount() and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield "tmpfs"
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        yield "RLIMIT_FSIZE" if sys.platform == "linux" else None


@contextmanager
def full(how: str, folder: Path, pid: int):
    """Until the block is left nothing more can be written: a ballast fills the disk, or files may not grow."""
    if how == "RLIMIT_FSIZE":
        import resource

        usual = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, usual[1]))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # it has ended meanwhile
                resource.prlimit(pid, resource.RLIMIT_FSIZE, usual)
        return
    ballast, enough = folder / "ballast", threading.Event()
    filler = threading.Thread(target=keep_full, args=(ballast, enough))
    filler.start()
    try:
        yield
    finally:
        enough.set()
        filler.join()
        ballast.unlink()


def keep_full(ballast: Path, enough: threading.Event) -> None:
    """Take every page of the disk, also those that the run frees when a save of its fails."""
    with open(ballast, "wb", buffering=0) as file:
        while not enough.wait(0.005):
            with suppress(OSError):  # the error is the aim
                while True:
                    file.write(bytes(1 << 12))


# --- the whole --------------------------------------------------------------------------------------------------------


def share(total: int, parts: int, number: int) -> int:
    """The part `number`, from 0, of a total that is dealt out evenly."""
    return (number + 1) * total // parts - number * total // parts


def run_cases(args, chaos: Chaos, number: int) -> dict:
    """All cases of the stage `number`: name of the case -> what came of it."""
    reference = chaos.reference
    times = f"{reference.start:.1f} s up to the first of {args.steps} updates, {reference.rest:.1f} s after it"
    print(f"{chaos.name}: undisturbed {times}", flush=True)
    counts = [share(total, len(args.stages), number) for total in (args.kills, 0 if WINDOWS else args.terms)]
    cases = {"kills": lambda: chaos.kills(*counts), "disk": chaos.disk, "torn": chaos.torn, "world": chaos.world}
    results = {"undisturbed": {"digests": reference.digests, "problems": []}}
    for name, digest in reference.digests.items():
        print(f"{chaos.name}: undisturbed, {name} {digest[:16]}", flush=True)
    for name in args.cases:
        print(f"{chaos.name}, {name}:", flush=True)
        results[name] = cases[name]()
        for line in told(results[name]):
            print(f"  {line}", flush=True)
    return results


def told(result: dict) -> list[str]:
    """A case's result in a few lines."""
    if "left_out" in result:
        return [f"left out: {result['left_out']}"]
    facts = {name: value for name, value in result.items() if name not in ("problems", "lost", "where")}
    lines = [", ".join(f"{name} {value}" for name, value in facts.items())]
    if "where" in result:
        lines.append("killed in: " + ", ".join(f"{name} {count}" for name, count in sorted(result["where"].items())))
        lines.append(f"updates made twice: {sum(result['lost'])}, at most {max(result['lost'], default=0)} at a time")
    equal = f"within {TOLERANCE} of" if "largest_difference" in result else "equal to"
    return lines + (result["problems"] or [f"final weights {equal} those of the undisturbed run"])


def empty(folder: Path) -> None:
    """Begin with an empty folder; one that holds anything but an earlier run of this script is left alone."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ValueError(f"{folder} holds other files, which would be deleted: name an empty or a new folder")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def main(args) -> int:
    empty(args.out_dir)
    rng, data, report = random.Random(args.seed), prepare_data(args), {}
    first = Chaos(args, "pretrain", data["pretrain"], None, rng)
    for number, name in enumerate(args.stages):
        chaos = first if name == "pretrain" else Chaos(args, name, data[name], first.reference.weights, rng)
        report[name] = run_cases(args, chaos, number)
    problems = [problem for cases in report.values() for result in cases.values() for problem in result["problems"]]
    about = {"seed": args.seed, "steps": args.steps, "platform": platform.platform(), **versions()}
    write_json(args.out_dir / "report.json", {**about, "stages": report, "problems": problems})
    print(
        f"{'FAILED: ' + str(len(problems)) + ' problem(s)' if problems else 'survived'}: {args.out_dir / 'report.json'}"
    )
    return int(bool(problems))


if __name__ == "__main__":
    with friendly_errors():
        sys.exit(main(parse_args()))

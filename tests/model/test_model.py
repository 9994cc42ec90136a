"""The protocol between machines, checked exhaustively by a model checker.

Each ``*.pml`` beside this file is a model of one part of the protocol; README.md says what each
property (M1, M2, ...) means and which broken rule shows that the check can fail.  spin turns a
model into C, gcc compiles it, and the result visits every reachable state:

- `test_rules_hold`: no reachable state of the protocol violates a property, with small bounds
  always and with larger ones in the long run;
- `test_every_step_is_taken`: no step of a model is dead, so that nothing holds vacuously;
- `test_broken_rule_is_caught`: with one rule broken (``-DBREAK_x``), the expected property fails;
- `test_every_broken_rule_is_tried`: no ``BREAK_x`` of the sources or of README.md is forgotten.

The numbers of states of rules that hold are among the figures at the end of the run.  pytest -rP
prints those of broken ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.figures import Figures
from tests.support.programs import find

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SOURCES = ("bells", "commit", "mark", "openlist", "slots", "twins")
MEMORY_MB = 6000
TIMEOUT_S = 3600
DEPTH = 100_000


@dataclass(frozen=True)
class Case:
    """One run of the checker: a model, its bounds, and what else is compiled in."""

    model: str
    bounds: str
    extra: str = ""
    progress: bool = False  # look for endless retries instead of violated assertions

    @property
    def defines(self) -> list[str]:
        return [f"-D{word}" for word in f"{self.bounds} {self.extra}".split()]

    @property
    def source(self) -> str:
        return f"{self.model}.pml"

    def __str__(self) -> str:
        what = self.extra or self.bounds.replace(" ", ",") or "default"
        return f"{self.model}:{what}{':progress' if self.progress else ''}"


@dataclass(frozen=True)
class Outcome:
    """What the checker said."""

    states: int
    seconds: float
    violated: str  # the property that failed, or ""
    steps: frozenset[int]  # lines with a step of this case
    untaken: frozenset[int]  # those with one that is never taken


# --- the cases ------------------------------------------------------------------------------------

ONE = "ONE_OBJECT NB=5 "  # one object only, and room for one transaction besides the tree
WRITE = Case("commit", "NB=7 TX1=2 TX2=1")
READ = Case("commit", "NB=5 TX1=1 TX2=1 READS=1 HALVES=1")
REREAD = Case("commit", ONE + "TX1=2 TX2=0 READS=1 HALVES=1 FENCES=1")
COLLECT = Case("commit", ONE + "TX1=2 TX2=1 COLLECTS=1")
DIE = Case("commit", ONE + "TX1=1 TX2=1 COLLECTS=1 DEATHS=1 EVICTS=1")
EVICT = Case("commit", ONE + "TX1=1 TX2=0 TX3=1 JOINS=2 COLLECTS=1 EVICTS=1 EVICT_BETWEEN")
EVICT_TWICE = Case("commit", ONE + "TX1=1 TX2=0 COLLECTS=1 COLLECTORS=2 EVICTS=2 EVICT_BETWEEN")
REWIND = Case("commit", ONE + "TX1=2 TX2=0 TX3=1 JOINS=1 REWINDS=1 COLLECTS=1")
MARK = Case("mark", "TXNS=2")
OPEN = Case("openlist", "PEERS=2 OPENS=2")
SLOT = Case("slots", "JOINS=2 DEATHS=0 JUDGEMENTS=0")
FREE = Case("slots", "FREERS JOINS=3 DEATHS=0 JUDGEMENTS=0")
JUDGE = Case("slots", "JOINS=2 OPENS=0")
TWINS = Case("twins", "STEPS=2")
RING = Case("bells", "COMMITS=2")
RING_SHARED = Case("bells", "COMMITS=3 SHARED")

SHORT = [
    WRITE,
    READ,
    Case("commit", READ.bounds, "ROOT_BY_BOUND_TAG"),
    REREAD,
    COLLECT,
    Case("commit", COLLECT.bounds, "RELEASE_BEFORE_IDLE"),
    Case("commit", COLLECT.bounds, progress=True),
    Case("commit", READ.bounds, progress=True),
    DIE,
    EVICT,
    EVICT_TWICE,
    REWIND,
    MARK,
    OPEN,
    SLOT,
    FREE,
    JUDGE,
    TWINS,
    RING,
    RING_SHARED,
]

LONG = [
    Case("commit", "TX1=2 TX2=2"),
    Case("commit", "TX1=1 TX2=1 TX3=1 NS=3 NB=7"),
    Case("commit", "TX1=1 TX2=1 TX3=1 JOINS=2"),
    Case("commit", "NB=5 TX1=2 TX2=1 READS=1 HALVES=1"),
    Case("commit", "NB=5 TX1=2 TX2=1 READS=1 HALVES=1", "ROOT_BY_BOUND_TAG"),
    Case("commit", "NB=6 TX1=2 TX2=1 COLLECTS=1"),
    Case("commit", ONE + "TX1=1 TX2=1 TX3=1 JOINS=1 COLLECTS=1 DEATHS=1 EVICTS=1"),
    Case("commit", ONE + "TX1=1 TX2=1 COLLECTS=1 COLLECTORS=2 EVICTS=2 EVICT_BETWEEN"),
    Case("commit", ONE + "TX1=2 TX2=1 JOINS=2 COLLECTS=1 EVICTS=1 EVICT_BETWEEN"),
    Case("commit", ONE + "TX1=2 TX2=0 TX3=2 JOINS=2 REWINDS=1 COLLECTS=1"),
    Case("mark", "TXNS=3"),
    Case("openlist", "PEERS=3"),
    Case("slots", "JOINS=3"),
    Case("slots", "FREERS JOINS=5 DEATHS=1"),
    Case("twins", "STEPS=4"),
    Case("bells", "COMMITS=3"),
]

# What is broken, where it shows, and which property then fails.
BROKEN = [
    (WRITE, "BREAK_CLAIM_BY_STORE", "M4"),
    (WRITE, "BREAK_IN_PLACE", "M1"),
    (WRITE, "BREAK_COMMIT_BY_STORE", "M2"),
    (WRITE, "BREAK_NO_SEQUENCE", "M2"),
    (WRITE, "BREAK_RELEASE_FIRST", "M5"),
    (COLLECT, "BREAK_RELEASE_BY_STORE", "M5"),
    (READ, "BREAK_STORE_UNFENCED", "M3"),
    (READ, "BREAK_ROOT_UNCHECKED", "M3"),
    (READ, "BREAK_ROOT_BY_OWN_TAG", "M3"),
    (READ, "BREAK_CHECK_BEFORE_COPY", "M3"),
    (READ, "BREAK_DATA_UNCHECKED", "M3"),
    (READ, "BREAK_TAG_NOT_FREE", "M3"),
    (REREAD, "BREAK_CACHE_UNCONFIRMED", "M3"),
    (Case("commit", ONE + "TX1=2 TX2=1 READS=1 HALVES=1"), "BREAK_COUNTER_STUCK", "M3"),
    (Case("commit", READ.bounds, progress=True), "BREAK_RETRY_OLD_ROOT", "M8"),
    (DIE, "BREAK_LOCK", "M8"),
    (COLLECT, "BREAK_NOT_ACTIVE", "M5"),
    (COLLECT, "BREAK_IDLE_FIRST", "M5"),
    (COLLECT, "BREAK_ACTIVE_SETTLED", "M5"),
    (COLLECT, "BREAK_IDLE_ALL_SETTLED", "M5"),
    (COLLECT, "BREAK_ROOT_BEFORE_LIMITS", "M5"),
    (COLLECT, "BREAK_COLLECT_BY_STORE", "M5"),
    (DIE, "BREAK_IDLE_UNSETTLED", "M6"),
    (DIE, "BREAK_EVICT_PAUSED", "M1"),
    (EVICT, "BREAK_NO_FENCE", "M4"),
    (EVICT, "BREAK_NO_STATE_CHECK", "M1"),
    (EVICT, "BREAK_CHECK_BEFORE_LOAD", "M1"),
    (EVICT, "BREAK_REJOIN_WITHIN", "M1"),
    (EVICT, "BREAK_OTHER_INCARNATION", "M5"),
    (EVICT, "BREAK_SAME_INCARNATION", "M5"),
    (EVICT, "BREAK_TAKE_OVER_ACTIVE", "M5"),
    (EVICT_TWICE, "BREAK_DEAD_SETTLED", "M4"),
    (EVICT_TWICE, "BREAK_FREE_BEFORE_FENCE", "M4"),
    (REWIND, "BREAK_BEGIN_BY_STORE", "M6"),
    (REWIND, "BREAK_NO_GUARD", "M1"),
    (REWIND, "BREAK_RELEASE_UNENDED", "M5"),
    (MARK, "BREAK_ROOT_UNCHECKED", "M5"),
    (MARK, "BREAK_NODE_UNCHECKED", "M5"),
    (MARK, "BREAK_PARENT_FIRST", "M5"),
    (MARK, "BREAK_MARKS_WITHOUT_TAG", "M5"),
    (MARK, "BREAK_SWEEP_UNFINISHED", "M5"),
    (OPEN, "BREAK_LIST_UNFENCED", "M7"),
    (OPEN, "BREAK_LIST_LAST", "M7"),
    (OPEN, "BREAK_CREATE_LISTS_LATER", "M7"),
    (OPEN, "BREAK_LOOK_BEFORE_INTENTS", "M7"),
    (OPEN, "BREAK_INTENTS_IGNORED", "M7"),
    (OPEN, "BREAK_OPEN_WITHOUT_FENCE", "M7"),
    (OPEN, "BREAK_INTENT_UNFENCED", "M7"),
    (OPEN, "BREAK_NO_INTENT", "M7"),
    (OPEN, "BREAK_INTENT_AFTER_SCAN", "M7"),
    (OPEN, "BREAK_WITHDRAW_EARLY", "M7"),
    (OPEN, "BREAK_NO_SCAN", "M7"),
    (OPEN, "BREAK_SCAN_FIRST", "M7"),
    (OPEN, "BREAK_NO_RESCAN", "M7"),
    (OPEN, "BREAK_NO_TICK", "M6"),
    (SLOT, "BREAK_WORD_BY_STORE", "M7"),
    (SLOT, "BREAK_WORD_UNSTAMPED", "M7"),
    (SLOT, "BREAK_CLEAR_BY_STORE", "M7"),
    (SLOT, "BREAK_LISTED_UNCHECKED", "M7"),
    (FREE, "BREAK_WORD_BY_STORE", "M7"),
    (FREE, "BREAK_WORD_UNSTAMPED", "M7"),
    (FREE, "BREAK_CLEAR_BY_STORE", "M7"),
    (JUDGE, "BREAK_IDENTITY_UNSTAMPED", "M9"),
    (JUDGE, "BREAK_JUDGE_ANY_INCARNATION", "M9"),
    (TWINS, "BREAK_STATE_BEFORE_NONCE", "M9"),
    (TWINS, "BREAK_NONCE_BEFORE_BEGIN", "M9"),
    (TWINS, "BREAK_BEGIN_IGNORES_NONCE", "M9"),
    (TWINS, "BREAK_LEAVE_UNSIGNED", "M9"),
    (TWINS, "BREAK_NO_MARK", "M9"),
    (TWINS, "BREAK_MARK_ONCE", "M9"),
    (TWINS, "BREAK_MARK_IGNORED", "M9"),
    (TWINS, "BREAK_MARK_BEFORE_PROCESS", "M9"),
    (RING, "BREAK_NO_SECOND_LOOK", "M10"),
    (RING, "BREAK_BELL_BEFORE_COMMIT", "M10"),
    (RING, "BREAK_TAKE_BY_STORE", "M10"),
    (RING, "BREAK_ANNOUNCE_BY_STORE", "M10"),
    (RING, "BREAK_FORGET_LAST", "M10"),
]


# --- running the checker --------------------------------------------------------------------------


def run(command: list[str], directory: Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        ["nice", "-n", "10", *command],
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}"
    return done.stdout


def property_violated(case: Case, directory: Path) -> str:
    """The property (`M1` ...) noted beside the assertion in which the run that was found ends."""
    if case.progress:
        return "M8"
    replay = run(["spin", "-t", *case.defines, case.source], directory)
    where = re.search(rf"{re.escape(case.source)}:(\d+), Error: assertion violated", replay)
    assert where, replay[-2000:]
    line = (directory / case.source).read_text().splitlines()[int(where[1]) - 1]
    noted = re.search(r"/\* (M\d+) \*/", line)
    assert noted, f"{case.source}:{where[1]} names no property: {line}"
    return noted[1]


def explore(case: Case, directory: Path, figures: Figures | None = None) -> Outcome:
    """Visit every state of a case, or stop at the first violation."""
    find("spin")
    find("gcc")
    shutil.copy(HERE / case.source, directory)
    run(["spin", "-a", *case.defines, case.source], directory)
    mode = "-DNP" if case.progress else "-DSAFETY"
    tuning = ["-DNOREDUCE", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MB}"]
    optimize = "-O0" if "BREAK_" in case.extra else "-O2"  # soon found: compiling takes longer
    run(["gcc", optimize, "-w", mode, *tuning, "-o", "pan", "pan.c"], directory)
    start = time.monotonic()
    # -E: a process that was killed ends anywhere; one that waits for it fails an assertion.
    output = run(["./pan", "-l" if case.progress else "-E", f"-m{DEPTH}"], directory)
    seconds = time.monotonic() - start
    counts = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    assert counts, output
    assert states, output
    failed = counts[1] != "0"
    if not failed:
        assert "Search not completed" not in output, output
        assert "max search depth too small" not in output, output
    name = re.escape(case.source)
    steps = re.findall(rf"{name}:(\d+) ", run(["./pan", "-d"], directory))
    untaken = re.findall(rf"^\t{name}:(\d+), state", output, re.MULTILINE)
    outcome = Outcome(
        states=int(states[1]),
        seconds=seconds,
        violated=property_violated(case, directory) if failed else "",
        steps=frozenset(map(int, steps)),
        untaken=frozenset(map(int, untaken)),
    )
    line = f"{case}: {outcome.states:,} states, {seconds:.1f} s, {outcome.violated or 'holds'}"
    print(line)
    if figures is not None:
        figures.add(f"model {line}")
    return outcome


# --- tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=str(case)) for case in SHORT),
        *(pytest.param(case, id=str(case), marks=pytest.mark.long) for case in LONG),
    ],
)
def test_rules_hold(case: Case, tmp_path: Path, figures: Figures) -> None:
    assert explore(case, tmp_path, figures).violated == ""


@pytest.mark.parametrize(
    ("case", "rule", "expected"),
    [pytest.param(*row, id=f"{row[0].model}:{row[1]}") for row in BROKEN if row[0] is not FREE]
    + [pytest.param(*row, id=f"slots,FREERS:{row[1]}") for row in BROKEN if row[0] is FREE],
)
def test_broken_rule_is_caught(case: Case, rule: str, expected: str, tmp_path: Path) -> None:
    broken = Case(case.model, case.bounds, rule, case.progress)
    assert explore(broken, tmp_path).violated == expected


# Together these take every step of their models.
COVERING = {
    "commit": [WRITE, REREAD, DIE, EVICT, EVICT_TWICE],
    "mark": [MARK],
    "openlist": [OPEN],
    "slots": [SLOT, FREE, JUDGE],
    "twins": [TWINS],
    "bells": [RING, RING_SHARED],
}


@pytest.mark.parametrize("model", SOURCES)
def test_every_step_is_taken(model: str, tmp_path: Path) -> None:
    steps: set[int] = set()
    taken: set[int] = set()
    for number, case in enumerate(COVERING[model]):
        directory = tmp_path / str(number)
        directory.mkdir()
        outcome = explore(case, directory)
        steps |= outcome.steps
        taken |= outcome.steps - outcome.untaken
    lines = [""] + (HERE / f"{model}.pml").read_text().splitlines()
    # But for what must never be reached, and the ends of processes that never end.
    missed = [n for n in sorted(steps - taken) if "M8" not in lines[n] and lines[n] != "}"]
    assert [f"{model}.pml:{n}: {lines[n]}" for n in missed] == []


def test_every_broken_rule_is_tried() -> None:
    tried = {(case.model, rule) for case, rule, _ in BROKEN}
    written = set()
    for model in SOURCES:
        source = (HERE / f"{model}.pml").read_text()
        written |= {(model, rule) for rule in re.findall(r"\bBREAK_[A-Z_]+[A-Z]\b", source)}
    assert tried == written
    rows = set(re.findall(r"^\| `(BREAK_\w+)` ", (HERE / "README.md").read_text(), re.MULTILINE))
    assert rows == {rule for _, rule in tried}

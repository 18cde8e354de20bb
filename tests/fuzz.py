"""What must hold of every input, however wrong: it is taken, or refused in one line that names what
is wrong; soon; and no file is harmed. What is given is in fuzz_*.py, the tests in test_fuzz.py.

The plain suite tries some fifty cases. A full run, the same ones each time, is

    NOISEFL_FUZZ=2000 .venv/bin/python -m pytest tests/test_fuzz.py

and ends with what became of the cases, by kind.
"""

import contextlib
import io
import os
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import hypothesis
from hypothesis.errors import StopTest

T = TypeVar("T")

CASES = int(os.environ.get("NOISEFL_FUZZ") or 0)  # of a full run, of all kinds together
LIMIT = 20  # seconds after which a case counts as a hang
# `name=value: allowed`, `--name …`, or what has no name.
NAMED = re.compile(r"[\w.\-]+(\[.*?\])?=|.*--\w|.*\bflag|unexpected argument |usage: ", re.DOTALL)

became: Counter[tuple[str, str]] = Counter()  # kind, and what became of a case


class Begun(BaseException):
    """The driver would now run rounds: it took everything."""


class Hang(BaseException):
    """A case took too long."""


def cases(share: float, few: int) -> Callable[[T], T]:
    """How often a test is tried: so many times, or its share of a full run."""
    checks = (hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large)
    return hypothesis.settings(  # pyright: ignore[reportReturnType]
        max_examples=round(CASES * share) or 1 if CASES else few, suppress_health_check=checks
    )


@contextlib.contextmanager
def bounded(seconds: float = LIMIT) -> Iterator[None]:
    """Raises `Hang` in the midst of what takes longer."""

    def stop(*_: Any) -> NoReturn:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def judged(kind: str) -> Iterator[None]:
    """Of a case: what is no end of it is counted, and raised."""
    try:
        with bounded():
            yield
    except BaseException as error:
        if not isinstance(error, StopTest):
            became[kind, "hang" if isinstance(error, Hang) else "traceback"] += 1
        raise


def taken(kind: str, make: Callable[[], T]) -> T | None:
    """What it makes; None where it refuses."""
    with judged(kind):
        try:
            found = make()
        except ValueError as error:
            line = str(error)
            assert NAMED.match(line), line
            assert len(line.splitlines()) == 1, line
            became[kind, "refused"] += 1
            return None
    became[kind, "taken"] += 1
    return found


class Said(NamedTuple):
    """What a driver came to: its exit code, None if it would have run rounds, and its words."""

    code: int | None
    out: str
    err: str


def said(program: str, main: Callable[[list[str]], int], args: list[str], kind: str) -> Said:
    """What a command line comes to; fails where that is neither taken nor refused in one line.

    It ends with 0 or, having said one line and nothing else, with 2.
    """
    code = None
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with judged(kind), streams[0], streams[1], contextlib.suppress(Begun):
        code = main([program, *args])
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    found = Said(code, *texts)
    assert code in (None, 0, 2), found
    if code == 2:
        assert found.out == "", found
        *progress, last = found.err.splitlines()
        assert last.startswith(f"{program}: "), found
        assert NAMED.match(last.removeprefix(f"{program}: ")), found
        assert all(re.match(r"\d+ of \d+ runs are done already$", line) for line in progress), found
    became[kind, "refused" if code else "taken"] += 1
    return found


# Files


def files(folder: Path) -> dict[str, Any]:
    """All that lies below: bytes of files, targets of links, None of folders and pipes."""

    def of(path: Path) -> Any:
        if path.is_symlink():
            return os.readlink(path)
        if not path.is_file():
            return None
        if (stat := path.stat()).st_size > 1 << 26:  # with holes
            return stat.st_size, stat.st_mtime_ns
        return path.read_bytes()

    return {str(path.relative_to(folder)): of(path) for path in sorted(folder.rglob("*"))}


@contextlib.contextmanager
def thrifty(memory: int = 1 << 30) -> Iterator[None]:
    """Whoever wants more bytes than that gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_unharmed(kind: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Every file of before is there as it was."""
    harmed = [name for name in before if name not in after or after[name] != before[name]]
    if harmed:
        became[kind, "harmed"] += 1
    assert not harmed, harmed


def table() -> list[str]:
    """What became of the cases, a line a kind."""
    ends = ("taken", "refused", "traceback", "hang", "harmed")
    lines = [f"{'':28}" + "".join(f"{end:>11}" for end in ends)]
    for kind in dict.fromkeys(kind for kind, _ in became):
        lines.append(f"{kind:28}" + "".join(f"{became[kind, end]:11}" for end in ends))
    total = sum(became[of] for of in became if of[1] in ends[:4])
    return [*lines, f"{total} cases"]

"""`grid`: what each spelling of an axis means, what is refused, and the order of combinations."""

import difflib
import itertools
import math
import re
import sys
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from experiments.flags import fields, grid
from experiments.flags.grid import MOST, Axis, combinations
from experiments.sweep.options import WHOLE_SWEEP, catalogue, preset_of
from noisefl.parts import LARGEST

KNOWN = catalogue(preset_of("quickstart"))
FLAGS = {name: flag for name, flag in KNOWN.items() if name not in WHOLE_SWEEP}
CHOSEN = [name for name, flag in FLAGS.items() if flag.choices]
OPTIONAL = [name for name, flag in FLAGS.items() if flag.spec.optional]
TYPES = {
    **{"switch": bool, "size": int, "count": int, "number": float},
    **dict.fromkeys(("text", "choice", "child"), str),
}

integers = st.integers(-LARGEST, LARGEST)
floats = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
words = st.text(min_size=1).filter(lambda text: "," not in text and text == text.strip())
spaces = st.text(" \t\n", max_size=2)


def parse_axis(text: str) -> Axis:
    return grid.parse_axis(text, KNOWN, WHOLE_SWEEP)


def parse_grid(texts: list[str]) -> tuple[Axis, ...]:
    return grid.parse_grid(texts, KNOWN, WHOLE_SWEEP)


def type_of(flag: str) -> type:
    return TYPES[FLAGS[flag].spec.kind]


def of_kind(kind: type) -> st.SearchStrategy[str]:
    return st.sampled_from([name for name in FLAGS if type_of(name) is kind])


def values_of(flag: str) -> st.SearchStrategy[Any]:
    if flag in CHOSEN:
        return st.sampled_from(FLAGS[flag].choices)
    kinds = {bool: st.booleans(), int: integers, float: floats, str: words}
    values = kinds[type_of(flag)]
    return st.none() | values if flag in OPTIONAL else values


@st.composite
def any_axis(draw: st.DrawFn) -> Axis:
    flag = draw(st.sampled_from(list(FLAGS)))
    return Axis(flag, tuple(draw(st.lists(values_of(flag), min_size=1, max_size=6, unique=True))))


@st.composite
def any_range(draw: st.DrawFn) -> tuple[int, int, int]:
    """Start, stop and step of at most a few values, empty ones among them."""
    start, count = draw(st.integers(-(10**9), 10**9)), draw(st.integers(-3, 20))
    step = draw(st.integers(-(10**6), 10**6).filter(bool))
    return start, start + count * step + draw(st.integers(-2, 2)), step


def refusal(text: str, parse=parse_axis) -> str:
    """What is said about `text` after the form of all complaints."""
    with pytest.raises(ValueError, match=r"^grid=") as caught:
        parse(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"grid={text!r}: ")
    return message.removeprefix(f"grid={text!r}: ")


def typos(word: str) -> set[str]:
    """`word` without one letter, or with two neighbours swapped."""
    ends = [(word[:at], word[at:]) for at in range(len(word))]
    deleted = {left + right[1:] for left, right in ends}
    swapped = {left + right[1::-1] + right[2:] for left, right in ends}
    return (deleted | swapped) - {word, ""}


def as_close(said: str, wanted: str, typo: str) -> bool:
    """The name is the wanted one, or another that `typo` is as close to: gap for cap's "ap"."""
    near = [difflib.SequenceMatcher(None, typo, name).ratio() for name in (said, wanted)]
    return said == wanted or (
        said in {*FLAGS, *(one for flag in FLAGS.values() for one in flag.choices)}
        and near[0] >= near[1]
    )


@pytest.mark.parametrize(
    ("text", "flag", "values"),
    [
        ("cap=0.4,0.5,0.6", "cap", (0.4, 0.5, 0.6)),
        ("learning_rate=1e-2,.5,1", "learning_rate", (0.01, 0.5, 1.0)),
        ("seed=0:4", "seed", (0, 1, 2, 3)),
        (" seed = 9:5:-2, 0 : 3,5 ", "seed", (9, 7, 0, 1, 2, 5)),
        ("calibrator=sequential,bisection", "calibrator", ("sequential", "bisection")),
        ("scheme.calibrator.cap=0.4,0.5", "cap", (0.4, 0.5)),
        ("data.num_clients=5:7", "num_clients", (5, 6)),
        ("owner=keep_best,feeds_back+keep_best", "owner", ("keep_best", "feeds_back+keep_best")),
        ("stratified=True,f", "stratified", (True, False)),
        ("eval_batch=auto,500", "eval_batch", (None, 500)),
        ("momentum=none,0,0.5", "momentum", (None, 0.0, 0.5)),
        ("clients_at_once=3,0:3", "clients_at_once", (3, 0, 1, 2)),
        ("server_clients=m/2,4m,3", "server_clients", ("m/2", "4m", "3")),
        (
            "noise_layers=last,dense.*/kernel,(?=a)b",
            "noise_layers",
            ("last", "dense.*/kernel", "(?=a)b"),
        ),
        ("dataset=/a folder/x.npz,mnist", "dataset", ("/a folder/x.npz", "mnist")),
    ],
)
def test_examples(text, flag, values):
    axis = parse_axis(text)
    assert axis == Axis(flag, values)
    assert {type(value) for value in axis.values} - {type(None)} == {type_of(flag)}


@given(any_axis(), st.data())
def test_what_is_written_is_read(axis, data):
    def written(value):
        return f"{data.draw(spaces)}{fields.shown(value)}{data.draw(spaces)}"

    name = data.draw(st.sampled_from([axis.flag, ".".join(FLAGS[axis.flag].path)]))
    listed = ",".join(map(written, axis.values))
    read = parse_axis(f"{written(name)}={listed}")
    assert read == axis
    assert [type(value) for value in read.values] == [type(value) for value in axis.values]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_run_reads_its_flag_as_the_grid_does(flag):
    others = {bool: ["T", "0"], int: ["31", "1_0"], float: ["3", "1_0e-1"], str: ["a b"]}
    for word in [*(FLAGS[flag].choices or others[type_of(flag)]), *["none"] * (flag in OPTIONAL)]:
        (value,) = parse_axis(f"{flag}={word}").values
        read = FLAGS[flag].parse(word)
        assert (value, type(value)) == (read, type(read))
        assert type(value) in (type_of(flag), type(None))


@given(of_kind(int), any_range(), st.booleans())
def test_ranges_are_those_of_python(flag, span, with_step):
    span = span if with_step else (span[0], span[0] + len(range(*span)))
    text = f"{flag}={':'.join(map(str, span))}"
    if range(*span):
        assert parse_axis(text).values == tuple(range(*span))
    else:
        assert "empty range" in refusal(text)


@given(of_kind(int), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_ranges_and_numbers_mix(flag, ends):
    """The numbers up to the last end, in pieces; then one of them again."""
    ends = sorted({0, *ends})
    pieces = [str(a) if b == a + 1 else f"{a}:{b}" for a, b in itertools.pairwise(ends)]
    assume(pieces)
    assert parse_axis(f"{flag}={','.join(pieces)}").values == tuple(range(ends[-1]))
    for extra in ("0", f"{ends[-1] - 1}:{ends[-1] + 5}"):
        assert f"{extra!r} repeats" in refusal(f"{flag}={','.join([*pieces, extra])}")


@given(of_kind(float), floats, st.integers(0, 5))
@example("cap_margin", 0.0, 1)
def test_spelling_of_a_float_does_not_matter(flag, value, zeros):
    exact = f"{Decimal(value):f}"
    longer = exact + ("" if "." in exact else ".") + "0" * zeros
    assert parse_axis(f"{flag}={longer}").values == (value,)
    assert f"{longer!r} repeats" in refusal(f"{flag}={value!r},{longer}")


@pytest.mark.parametrize(
    "text",
    [
        *("cap=0.5,0.50", "cap=.5,5e-1", "strength=0,-0.0", "seed=1,01", "seed=5,0:6", "seed=1,+1"),
        *("stratified=true,1", "stratified=false,true,F", "calibrator=snr,fixed, snr"),
        *("server_clients=m,m", "seed=3:0:-1,1:2", "eval_batch=none,auto", "eval_batch=7,07"),
    ],
)
def test_a_value_given_twice_is_refused(text):
    last = text.split(",")[-1].strip()
    assert refusal(text) == f"{last!r} repeats a value of {text.partition('=')[0]}"


def test_minus_zero_is_zero():
    assert math.copysign(1, parse_axis("cap_margin=-0").values[0]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "must be like cap=0.4,0.5 or seed=0:10") for text in ("cap", "=3", " =3", "")),
        *((text, "cap has an empty value") for text in ("cap=", "cap= ", "cap=0.4,,0.5", "cap=1,")),
        ("calibrator=", "calibrator has an empty value"),
        ("dataset=,mnist", "dataset has an empty value"),
        ("seed=a", "'a' must be a whole number, start:stop or start:stop:step"),
        ("seed=1.0", "'1.0' must be a whole number, start:stop or start:stop:step"),
        ("seed=nan", "'nan' must be a whole number, start:stop or start:stop:step"),
        *(
            (f"seed=7,{word}", f"'{word}' must be a whole number, start:stop or start:stop:step")
            for word in (":", "0:", ":3", "0:3:", "0::1", "0:6:2:1", "0:1e3", "a:b", "0:10**12")
        ),
        ("seed=0:9:0", "'0:9:0' has a step of 0"),
        *((f"seed={word}", f"{word!r} is an empty range") for word in ("3:3", "3:0", "0:3:-1")),
        *(
            (f"cap=0.1,{word}", f"{word!r} must be a finite number")
            for word in ("nan", "inf", "-Infinity", "1e999", "0:1", "half", "0x1", "0.1.2")
        ),
        *((f"stratified={word}", f"'{word}' must be true or false") for word in ("yes", "2")),
        ("scheme=noised+warmup", "'noised+warmup' noised goes around nothing: name it last"),
        ("seed=0:3,9999999999", "'9999999999' must be less than 2147483648"),
        ("seed=9999999998:9999999999", "'9999999998:9999999999' must be less than 2147483648"),
        ("eval_batch=x", f"'x' must be {grid.RANGE}, or none: the best of the target"),
        ("redraw=once", "'once' must be one of fresh, rescale"),
        ("redraw=Fresh", "'Fresh' must be one of fresh, rescale (did you mean fresh?)"),
        ("factory=adam", "'factory' is no flag of a run (see --helpshort)"),
        ("helpfull=1", "'helpfull' is no flag of a run (see --helpshort)"),
        ("--cap=0.5", "'--cap' is no flag of a run (did you mean cap?)"),
        (
            "scheme.calibrator.capp=1",
            "'scheme.calibrator.capp' is no flag of a run (did you mean scheme.calibrator.cap?)",
        ),
        ("cap\n=0.5\nx", "'0.5\\nx' must be a finite number"),
    ],
)
def test_refused(text, said):
    assert refusal(text) == said


def test_numbers_too_long_to_convert_are_refused_like_others():
    nines = "9" * 5000  # int() takes no such text
    assert f"{nines!r} must be a whole number" in refusal(f"seed={nines}")


@pytest.mark.parametrize("flag", sorted(WHOLE_SWEEP))
def test_flags_of_the_whole_sweep_are_refused_with_a_reason(flag):
    assert flag in KNOWN
    assert re.fullmatch(f"--{flag} is one for the whole sweep: .+", refusal(f"{flag}=1"))


@pytest.mark.parametrize("flag", [name for name in FLAGS if "." not in name])
def test_a_typo_of_a_flag_is_refused_with_that_flag(flag):
    for typo in typos(flag) - set(FLAGS):
        said = refusal(f"{typo}=1")
        start, end = f"{typo!r} is no flag of a run (did you mean ", "?)"
        assert as_close(said.removeprefix(start).removesuffix(end), flag, typo)


@pytest.mark.parametrize("flag", sorted(WHOLE_SWEEP))
def test_no_typo_is_answered_with_a_flag_that_is_refused(flag):
    for typo in typos(flag):
        assert f"did you mean {flag}?" not in refusal(f"{typo}=1")


@pytest.mark.parametrize("flag", CHOSEN)
def test_a_typo_of_a_choice_is_refused_with_that_choice(flag):
    allowed = [*FLAGS[flag].choices, *(["none"] if FLAGS[flag].spec.optional else [])]
    listed = f"must be one of {', '.join(allowed)}"
    for choice in FLAGS[flag].choices:
        for typo in typos(choice) - set(FLAGS[flag].choices):
            said = refusal(f"{flag}={choice},{typo}")
            start, end = f"{typo!r} {listed} (did you mean ", "?)"
            assert as_close(said.removeprefix(start).removesuffix(end), choice, typo)


def survives(text: str) -> None:
    """An axis of distinct values of one type, or one line about the text."""
    try:
        axis = parse_axis(text)
    except ValueError:
        refusal(text)
    else:
        assert axis.flag in FLAGS
        assert 0 < len(axis.values) == len(set(axis.values))
        assert {type(value) for value in axis.values} <= {type_of(axis.flag), type(None)}


@given(st.text())
def test_any_text_is_an_axis_or_one_line(text):
    survives(text)


@given(st.sampled_from(list(KNOWN)), st.text() | st.text("0123456789:,.-+ex_ infa"))
def test_any_text_of_values_is_an_axis_or_one_line(flag, listed):
    survives(f"{flag}={listed}")


def test_the_most_values_of_an_axis():
    values = parse_axis(f"seed=-1,0:{MOST - 1}").values
    assert values == tuple(range(-1, MOST - 1))
    for text in (f"seed=0:{MOST + 1}", f"seed=-1,0:{MOST}", f"seed=0:{MOST},-1"):
        assert refusal(text) == f"seed has more than {MOST} values"


@pytest.mark.parametrize(
    "text",
    [
        *("seed=0:1000000000000", f"seed=0:{10**40}", f"seed={10**40}:0:-3", "seed=0,1:9999999999"),
        f"seed=0:{sys.maxsize},{sys.maxsize}",
    ],
)
def test_a_huge_range_is_refused_at_once(text):
    start = time.perf_counter()
    assert refusal(text) == f"seed has more than {MOST} values"
    assert time.perf_counter() - start < 2


def test_a_grid_keeps_the_order_of_its_texts():
    assert parse_grid(["seed=2,1", "cap=0.5"]) == (Axis("seed", (2, 1)), Axis("cap", (0.5,)))
    assert parse_grid([]) == ()


@given(st.lists(any_axis(), min_size=1, max_size=4, unique_by=lambda axis: axis.flag), st.data())
def test_a_grid_has_one_axis_a_flag(axes, data):
    texts = [f"{axis.flag}={','.join(map(fields.shown, axis.values))}" for axis in axes]
    assert parse_grid(texts) == tuple(axes)
    flag = data.draw(st.sampled_from(axes)).flag
    again = f"{flag}={fields.shown(data.draw(values_of(flag)))}"
    said = refusal(again, lambda _: parse_grid([*texts, again]))
    assert said == f"{flag} has an axis already: list all values in one"


@given(st.lists(any_axis(), max_size=4, unique_by=lambda axis: axis.flag))
def test_combinations_are_the_product(axes):
    found = combinations(axes)
    assert len(found) == math.prod(len(axis.values) for axis in axes)
    assert all(list(one) == [axis.flag for axis in axes] for one in found)
    expected = itertools.product(*(axis.values for axis in axes))
    assert [tuple(one.values()) for one in found] == list(expected)


def test_the_last_axis_varies_fastest():
    assert combinations(parse_grid(["cap=0.5,0.4", "seed=0:2"])) == [
        {"cap": 0.5, "seed": 0},
        {"cap": 0.5, "seed": 1},
        {"cap": 0.4, "seed": 0},
        {"cap": 0.4, "seed": 1},
    ]
    assert combinations([]) == [{}]


def test_the_most_combinations():
    tries, seeds = Axis("max_tries", tuple(range(MOST // 100))), Axis("seed", tuple(range(100)))
    assert len(combinations([tries, seeds])) == MOST
    longer = Axis("seed", tuple(range(101)))
    start = time.perf_counter()
    for axes, sizes in (
        ([tries, longer], f"max_tries[{MOST // 100}] × seed[101]"),
        ([longer] * 300, " × ".join(["seed[101]"] * 300)),
    ):
        said = refusal(sizes, lambda _, axes=axes: combinations(axes))
        assert said == f"has more than {MOST} combinations"
    assert time.perf_counter() - start < 2

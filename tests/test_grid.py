"""`grid`: what each spelling of an axis means, what is refused, and the order of combinations."""

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

from experiments import helppage, options
from experiments.grid import MOST, Axis, combinations, parse_axis, parse_grid

WHOLE_SWEEP = {
    *("out", "resume", "compilation_cache", "checkpoint_every", "rounds_per_chunk"),
    *("data_dir", "rounds"),
}
FLAGS = {name: of for name, of in options.defaults().items() if name not in WHOLE_SWEEP}
CHOSEN = {name: choices for name, choices in helppage._CHOICES.items() if name in FLAGS}

integers = st.integers(-(10**30), 10**30)
floats = st.floats(allow_nan=False, allow_infinity=False).map(lambda value: value + 0.0)
words = st.text(min_size=1).filter(lambda text: "," not in text and text == text.strip())
spaces = st.text(" \t\n", max_size=2)


def of_kind(kind: type) -> st.SearchStrategy[str]:
    names = [name for name, default in FLAGS.items() if type(default) is kind]
    return st.sampled_from([name for name in names if name not in CHOSEN])


def values_of(flag: str) -> st.SearchStrategy[Any]:
    if flag in CHOSEN:
        return st.sampled_from(CHOSEN[flag])
    kinds = {bool: st.booleans(), int: integers, float: floats, str: words}
    return kinds[type(FLAGS[flag])]


@st.composite
def any_axis(draw: st.DrawFn) -> Axis:
    flag = draw(st.sampled_from(list(FLAGS)))
    return Axis(flag, tuple(draw(st.lists(values_of(flag), min_size=1, max_size=6, unique=True))))


@st.composite
def any_range(draw: st.DrawFn) -> tuple[int, int, int]:
    """Start, stop and step of at most a few values, empty ones among them."""
    start, count = draw(integers), draw(st.integers(-3, 20))
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


@pytest.mark.parametrize(
    ("text", "flag", "values"),
    [
        ("cap=0.4,0.5,0.6", "cap", (0.4, 0.5, 0.6)),
        ("learning_rate=1e-2,.5,1", "learning_rate", (0.01, 0.5, 1.0)),
        ("seed=0:4", "seed", (0, 1, 2, 3)),
        (" seed = 9:5:-2, 0 : 3,5 ", "seed", (9, 7, 0, 1, 2, 5)),
        ("calibrator=sequential,bisection", "calibrator", ("sequential", "bisection")),
        ("keep_best=True,f", "keep_best", (True, False)),
        ("eval_batch=auto,500", "eval_batch", ("auto", "500")),
        ("clients_at_once=0,0:3", "clients_at_once", ("0", "0:3")),  # the run will refuse 0:3
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
    assert {type(value) for value in axis.values} == {type(FLAGS[flag])}


@given(any_axis(), st.data())
def test_what_is_written_is_read(axis, data):
    def written(value):
        return f"{data.draw(spaces)}{value}{data.draw(spaces)}"

    listed = ",".join(map(written, axis.values))
    read = parse_axis(f"{written(axis.flag)}={listed}")
    assert read == axis
    assert [type(value) for value in read.values] == [type(value) for value in axis.values]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_run_reads_its_flag_as_the_grid_does(flag):
    default = FLAGS[flag]
    others = {bool: ["T", "0"], int: ["0x1F", "1_0"], float: ["3", "1_0e-1"], str: ["a b"]}
    for word in [str(default), *CHOSEN.get(flag, others[type(default)])]:
        values = options.define()
        values(["run", f"--{flag}={word}"])
        (value,) = parse_axis(f"{flag}={word}").values
        assert (value, type(value)) == (values[flag].value, type(default))


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
@example("momentum", 0.0, 1)
def test_spelling_of_a_float_does_not_matter(flag, value, zeros):
    exact = f"{Decimal(value):f}"
    longer = exact + ("" if "." in exact else ".") + "0" * zeros
    assert parse_axis(f"{flag}={longer}").values == (value,)
    assert f"{longer!r} repeats" in refusal(f"{flag}={value!r},{longer}")


@pytest.mark.parametrize(
    "text",
    [
        *("cap=0.5,0.50", "cap=.5,5e-1", "strength=0,-0.0", "seed=1,01", "seed=5,0:6", "seed=1,+1"),
        *("keep_best=true,1", "keep_best=false,true,F", "calibrator=snr,fixed, snr"),
        *("server_clients=m,m", "seed=3:0:-1,1:2"),
    ],
)
def test_a_value_given_twice_is_refused(text):
    last = text.split(",")[-1].strip()
    assert refusal(text) == f"{last!r} repeats a value of {text.partition('=')[0]}"


def test_minus_zero_is_zero():
    assert math.copysign(1, parse_axis("momentum=-0").values[0]) == 1


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
        *((f"keep_best={word}", f"'{word}' must be true or false") for word in ("yes", "2", "0:2")),
        ("redraw=once", "'once' must be one of fresh, rescale"),
        ("redraw=Fresh", "'Fresh' must be one of fresh, rescale (did you mean fresh?)"),
        ("image_shape=8", "'image_shape' is no flag of a run (see --helpshort)"),
        ("help=1", "'help' is no flag of a run (see --helpshort)"),
        ("--cap=0.5", "'--cap' is no flag of a run (did you mean cap?)"),
        ("cap\n=0.5\nx", "'0.5\\nx' must be a finite number"),
    ],
)
def test_refused(text, said):
    assert refusal(text) == said


def test_numbers_too_long_to_convert_are_refused_like_others():
    nines, large = "9" * 5000, "0x" + "f" * 5000  # int() takes no such decimal, str() gives none
    assert f"{nines!r} must be a whole number" in refusal(f"seed={nines}")
    assert f"{large!r} repeats" in refusal(f"seed={large},{large}")
    assert "more than" in refusal(f"seed=0:{large}")


@pytest.mark.parametrize("flag", sorted(WHOLE_SWEEP))
def test_flags_of_the_whole_sweep_are_refused_with_a_reason(flag):
    assert flag in options.defaults()
    assert re.fullmatch(f"--{flag} is one for the whole sweep: .+", refusal(f"{flag}=1"))


@pytest.mark.parametrize("flag", FLAGS)
def test_a_typo_of_a_flag_is_refused_with_that_flag(flag):
    for typo in typos(flag) - set(FLAGS):
        assert refusal(f"{typo}=1") == f"{typo!r} is no flag of a run (did you mean {flag}?)"


@pytest.mark.parametrize("flag", sorted(WHOLE_SWEEP))
def test_no_typo_is_answered_with_a_flag_that_is_refused(flag):
    for typo in typos(flag):
        assert f"did you mean {flag}?" not in refusal(f"{typo}=1")


@pytest.mark.parametrize("flag", CHOSEN)
def test_a_typo_of_a_choice_is_refused_with_that_choice(flag):
    listed = f"must be one of {', '.join(CHOSEN[flag])}"
    for choice in CHOSEN[flag]:
        for typo in typos(choice) - set(CHOSEN[flag]):
            said = refusal(f"{flag}={choice},{typo}")
            meant = ("ship", "skip") if choice == "ship" else (choice,)  # sip is as close to both
            assert said in [f"{typo!r} {listed} (did you mean {one}?)" for one in meant]


def survives(text: str) -> None:
    """An axis of distinct values of one type, or one line about the text."""
    try:
        axis = parse_axis(text)
    except ValueError:
        refusal(text)
    else:
        assert axis.flag in FLAGS
        assert 0 < len(axis.values) == len(set(axis.values))
        assert {type(value) for value in axis.values} == {type(FLAGS[axis.flag])}


@given(st.text())
def test_any_text_is_an_axis_or_one_line(text):
    survives(text)


@given(st.sampled_from(list(options.defaults())), st.text() | st.text("0123456789:,.-+ex_ infa"))
def test_any_text_of_values_is_an_axis_or_one_line(flag, listed):
    survives(f"{flag}={listed}")


def test_the_most_values_of_an_axis():
    values = parse_axis(f"seed=-1,0:{MOST - 1}").values
    assert values == tuple(range(-1, MOST - 1))
    for text in (f"seed=0:{MOST + 1}", f"seed=-1,0:{MOST}", f"seed=0:{MOST},-1"):
        assert refusal(text) == "seed has more than 1000000 values"


@pytest.mark.parametrize(
    "text",
    [
        *("seed=0:1000000000000", f"seed=0:{10**40}", f"seed={10**40}:0:-3", "seed=0,1:9999999999"),
        f"seed=0:{sys.maxsize},{sys.maxsize}",
    ],
)
def test_a_huge_range_is_refused_at_once(text):
    start = time.perf_counter()
    assert refusal(text) == "seed has more than 1000000 values"
    assert time.perf_counter() - start < 2


def test_a_grid_keeps_the_order_of_its_texts():
    assert parse_grid(["seed=2,1", "cap=0.5"]) == (Axis("seed", (2, 1)), Axis("cap", (0.5,)))
    assert parse_grid([]) == ()


@given(st.lists(any_axis(), min_size=1, max_size=4, unique_by=lambda axis: axis.flag), st.data())
def test_a_grid_has_one_axis_a_flag(axes, data):
    texts = [f"{axis.flag}={','.join(map(str, axis.values))}" for axis in axes]
    assert parse_grid(texts) == tuple(axes)
    flag = data.draw(st.sampled_from(axes)).flag
    again = f"{flag}={data.draw(values_of(flag))}"
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
    tries, seeds = Axis("max_tries", tuple(range(1000))), Axis("seed", tuple(range(1000)))
    assert len(combinations([tries, seeds])) == MOST
    longer = Axis("seed", tuple(range(1001)))
    start = time.perf_counter()
    for axes, sizes in (
        ([tries, longer], "max_tries[1000] × seed[1001]"),
        ([longer] * 300, " × ".join(["seed[1001]"] * 300)),
    ):
        said = refusal(sizes, lambda _, axes=axes: combinations(axes))
        assert said == "has more than 1000000 combinations"
    assert time.perf_counter() - start < 2


def test_a_combination_completes_the_flags_of_a_run():
    axes = parse_grid(["cap=0.4", "clients_at_once=auto,3", "server_clients=m", "seed=7"])
    for one in combinations(axes):
        parsed = options.from_flags({**options.defaults(), **one})
        assert (parsed.cap, parsed.driver.seed, parsed.config.server_clients) == (0.4, 7, 10)

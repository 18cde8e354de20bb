"""What a folder of protected runs is worth: rows, tables and pictures of the frontier."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.report import owners, shares
from experiments.report.results import DAMAGED
from noisefl import protection
from noisefl.errors import refuse

Row = dict[str, Any]
Frame = Any

CONTROLS = ("scratch", "server_alone", "owner")
SETTING = ["dataset", "model", "partition", "num_clients", "server_images"]
VIEW = ["view", "members"]
READ = [  # of a row, by tables and pictures
    "owner", "fedavg", "server_alone", "thief_accuracy", "thief_accuracy_best", "scratch", "copy",
    "fidelity", "lambda", "images_needed", "copy_bytes", "calibration_ratio", "rounds_over_cap",
    "failed",
]  # fmt: skip
RUN, THIEF = ["scheme", "strength", *SETTING, "seed"], ["thief", *VIEW, "which"]
# What a larger view has of a smaller one: a coalition may do what one of its members does.
INSIDE = {
    "V1": ["V1"], "V2": ["V1", "V2"], "V3": ["V1", "V3"], "V4": ["V1", "V2", "V3", "V4"],
    "V5": ["V1", "V2", "V3", "V4", "V5"],
}  # fmt: skip
NOTE = (
    "Owner O, best thief T of a view and scratch S on test, in %. λ = (T − S) / (O − S): 0 is "
    "nothing stolen, 1 all of it; – where O is not above S, so that there is nothing to steal, "
    "and where a run broke down, so that there is no O. "
    "Intervals are 95 %, bootstrapped over paired seeds; of one seed there is none. Thieves "
    "choose their numbers on held-out data of their own."
)
BY_THIEF = "λ of each thief in the smallest view that it needs"


class Setting(NamedTuple):
    """The tables of one data set, model, partition, population and split of the server's.

    Attributes:
      name: of it all, but for the server's images.
      controls: a sentence about FedAvg and the server alone.
      by_view: the cells of a table, its headings first: a line a scheme and strength.
      by_thief: likewise, a line a thief and view.
    """

    name: str
    controls: str
    by_view: list[list[str]]
    by_thief: list[list[str]]


# What makes a page of a folder, all rows, the tables, and the pictures by the name of their file.
Page = Callable[[Path, Frame, Sequence[Setting], Mapping[str, Figure]], str]


def write(
    folder: Path, curves: Mapping[str, tuple[str, Any]], strengths: dict[str, str],
    page: Page | None = None,
) -> list:  # fmt: skip
    """Writes frontier.csv, .parquet, .md and pictures; returns all rows as JSON values.

    Args:
      folder: of a sweep whose runs are complete.
      curves: the name of a curve and its strength, by the path of a run.
      strengths: the flag of each curve.
      page: of frontier.html, if there is to be one.

    Raises:
      ValueError: no run of the folder has anything about thieves.
    """
    found = rows(folder, curves, strengths)
    if not found:
        raise refuse("out", str(folder), "holds no run with thieves")
    publish(folder, pd.DataFrame(found), page)
    return found


def publish(folder: Path, frame: Frame, page: Page | None = None) -> None:
    """Writes the files of `write`."""
    frame.to_csv(folder / "frontier.csv", index=False)
    frame.to_parquet(folder / "frontier.parquet", index=False)
    best = best_thieves(frame)
    found, drawn = settings(frame, best), pictures(best)
    (folder / "frontier.md").write_text(_text(found), "utf-8")
    for name, figure in drawn.items():
        figure.savefig(folder / name, format="png")
    if page is not None:
        (folder / "frontier.html").write_text(page(folder, frame, found, drawn), "utf-8")


def merged(files: Sequence[str]) -> Frame:
    """The rows of several frontier.csv, of one machine or of many.

    Of FedAvg, which each of them may have run, the first file's rows count.

    Raises:
      ValueError: one is no such file; two have the same thief of the same run.
    """
    frames = []
    for file in files:
        try:
            frame = pd.read_csv(file)
        except (OSError, ValueError, OverflowError) as error:
            raise refuse("merge", file, f"cannot be read ({error})") from None
        if missing := [name for name in (*RUN, *THIEF, *READ) if name not in frame]:
            raise refuse("merge", file, f"is no frontier.csv: it has no column {missing[0]!r}")
        frames.append(frame)
        try:
            sound(frame.astype(object).where(frame.notna(), None).to_dict("records"))
        except (ValueError, TypeError) as error:
            raise refuse("merge", file, f"is damaged ({error})") from None
    both = pd.concat(frames, ignore_index=True)
    again = both.duplicated([*RUN, *THIEF])
    if twice := sorted(set(both[again & (both["scheme"] != "none")]["scheme"])):
        raise refuse("merge", ",".join(files), f"two have the same runs of {', '.join(twice)}")
    return both[~again]


def rows(folder: Path, curves: Mapping[str, tuple[str, Any]], strengths: dict[str, str]) -> list:
    """One object for each thief in each view of each run, controls beside it.

    Raises:
      ValueError: the folder is of no sweep, or a run in it is damaged.
    """
    try:
        planned = json.loads((folder / "sweep.json").read_text())["runs"]
        planned = {path: entry["baseline"] or path for path, entry in planned.items()}
        if not all(isinstance(baseline, str) for baseline in planned.values()):
            raise TypeError("a baseline is no path")
    except DAMAGED as error:
        raise refuse("out", str(folder), f"holds no sweep ({error!r})") from None
    found: list[Row] = []
    read: dict[str, list[Row]] = {}

    def stolen(path: str) -> list[Row]:
        if path not in read:
            file = folder / path / "thieves.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            read[path] = [json.loads(line) for line in lines]
        return read[path]

    seen: set[str] = set()
    order, late = [path for path in planned if path in curves], []
    for path in order:
        scheme, strength = curves[path]
        of = {"scheme": scheme, "strength": strength, "strength_name": strengths[scheme]}
        baseline = planned[path]
        try:
            tried = stolen(path)
            if tried and baseline != path and _broke_at_once(tried):
                if path not in late:  # once more when the others are known
                    late.append(path)
                    order.append(path)
                    continue
                tried = [*tried, *_like_others(found, of)]
            found += sound(of_run(folder, path, tried, stolen(baseline), of))
            if baseline != path and baseline not in seen:
                seen.add(baseline)
                of = {"scheme": "none", "strength": None, "strength_name": ""}
                found += sound(of_run(folder, baseline, stolen(baseline), stolen(baseline), of))
        except (*DAMAGED, RuntimeError) as error:
            allowed = f"is a damaged run, or the one beside it is ({error!r})"
            raise refuse("out", str(folder / path), allowed) from None
    return found


def _broke_at_once(stolen: Sequence[Row]) -> bool:
    """Whether the owner broke, before any thief had a copy."""
    owners = [row["accuracy"] for row in stolen if row["thief"] == "owner"]
    return owners == [None] and all(row["thief"] in CONTROLS for row in stolen)


def _like_others(found: Sequence[Row], of: Row) -> list[Row]:
    """Thieves without a figure, for such a run, which would else be missing in silence: those of
    another run, of its curve if there is one."""
    protected = [row for row in found if row["scheme"] != "none"]
    alike = [row for row in protected if of.items() <= row.items()] or protected
    names = ("thief", "view", "members", "which")
    each = dict.fromkeys(tuple(row[name] for name in names) for row in alike)
    nothing = {"accuracy": None, "accuracy_best": None, "fidelity": None, "copies": 0}
    every = each or [("bare_copy", "V1", 1, 0)]
    return [{**dict(zip(names, one, strict=True)), **nothing} for one in every]


def sound(rows: list[Row]) -> list[Row]:
    """The rows, whose columns are what tables and pictures take them for.

    Raises:
      ValueError, TypeError: a word where there should be a number, or the other way round.
    """
    words = ("scheme", "thief", "view", "dataset", "model", "partition")
    for row in rows:
        if not all(isinstance(row[name], str) for name in words) or row["view"] not in INSIDE:
            raise TypeError(f"of a thief: {[row[name] for name in words]}")
        for name in ("members", "which", "seed", "num_clients", "server_images"):
            if type(row[name]) is not int or not 0 <= row[name] < 2**31:
                raise ValueError(f"{name} is {row[name]!r}")
        for name in READ:
            if row[name] is not None and not math.isfinite(row[name]):
                raise ValueError(f"{name} is {row[name]!r}")
    return rows


def of_run(
    folder: Path, path: str, stolen: Sequence[Row], controls: Sequence[Row], of: Row
) -> list[Row]:
    """Of one run; `controls` are the rows of its FedAvg run."""
    if not stolen:
        return []
    options = json.loads((folder / path / "config.json").read_text())["options"]
    summary = json.loads((folder / path / "summary.json").read_text())
    setting = {
        "dataset": options["dataset"], "model": options["model"],
        "partition": options["data.partition"] if "data.partition" in options
        else options["partition"],
        "num_clients": options["num_clients"], "server_images": options["validation_size"],
        "seed": options["seed"],
    }  # fmt: skip
    owner, fedavg = (
        next(r["accuracy"] for r in rows if r["thief"] == "owner") for rows in (stolen, controls)
    )
    server = [r["accuracy"] for r in controls if r["thief"] == "server_alone"]
    scratch = {(r["members"], r["which"]): r for r in controls if r["thief"] == "scratch"}
    curve = sorted(
        (r["images"], r["accuracy"]) for r in scratch.values() if r["accuracy"] is not None
    )
    bare = {r["which"]: r["accuracy"] for r in stolen if r["thief"] == "bare_copy"}
    found = []
    for row in stolen:
        if row["thief"] in CONTROLS:
            continue
        alone = scratch.get((row["members"], row["which"]), {}).get("accuracy")
        accuracy = row["accuracy"]
        images, exact = needed(accuracy, curve)
        found.append({
            **of, **setting, "thief": row["thief"], "view": row["view"],
            "members": row["members"], "which": row["which"], "copies": row["copies"],
            "owner": owner, "fedavg": fedavg, "server_alone": server[0] if server else None,
            "thief_accuracy": accuracy, "thief_accuracy_best": row["accuracy_best"],
            "scratch": alone, "copy": bare.get(row["which"]), "fidelity": row["fidelity"],
            "lambda": None if None in (alone, accuracy, owner) or not owner > alone
            else round((accuracy - alone) / (owner - alone), 6),
            "over_scratch": round(accuracy / alone, 6) if alone and accuracy is not None else None,
            "images_needed": images, "images_exact": exact,
            "cap": summary["cap"], "highest_copy": summary["shared_accuracy_max_test"],
            "rounds_over_cap": summary["rounds_over_cap_test"],
            "infeasible_rounds": summary["infeasible_rounds"],
            "copy_bytes": summary["copy_bytes"], "calibration_ratio": summary["calibration_ratio"],
            "failed": summary["failed"] is not None,
        })  # fmt: skip
    return found


def needed(accuracy: float | None, curve: Sequence[tuple[int, float]]) -> tuple[Any, Any]:
    """Data-equivalent of a thief, from what scratch comes to with one client's images and with
    those of coalitions; see `protection.images_needed`."""
    if accuracy is None or len(curve) < 2:
        return None, None
    images, exact = protection.images_needed(accuracy, *zip(*curve, strict=True))
    return round(images, 1), exact


def best_thieves(frame: Frame) -> Frame:
    """For each scheme, strength, setting and view the best thief over seeds, of those that the view
    allows, by its mean over single thieves of the same kind; T, S, O and λ of it. A figure of which
    some seed has none, since its model broke, is NaN."""
    found = []
    keys = ["scheme", "strength", *SETTING]
    for of, group in frame.groupby(keys, sort=False, dropna=False):
        for (view, members), _ in group.groupby(VIEW, sort=True):
            allowed = group[group["view"].isin(INSIDE[view]) & group["members"].isin({1, members})]
            ranked = []
            for (thief, *_), tried in allowed.groupby(["thief", *VIEW], sort=False):
                both = _of_seeds(tried, ["thief_accuracy", "thief_accuracy_best"])
                ranked.append((*map(np.mean, both.to_numpy().T), thief, tried))
            _, _, thief, tried = max(ranked, key=lambda x: _key(x[0]))
            own = group[(group["view"] == view) & (group["members"] == members)]
            of_seed = _of_seeds(tried, ["thief_accuracy", "owner", "fedavg", "server_alone"])
            of_seed = of_seed.assign(
                scratch=_of_seeds(own, ["scratch"])["scratch"],
                worst=tried.groupby("seed")["thief_accuracy"].max(),
            )
            means = {name: np.mean(column) for name, column in of_seed.to_dict("list").items()}
            copies = group.drop_duplicates(["seed", "which"])
            stolen = protection.share_stolen(
                of_seed["owner"], of_seed["thief_accuracy"], of_seed["scratch"]
            )
            worst = protection.share_stolen(of_seed["owner"], of_seed["worst"], of_seed["scratch"])
            found.append({
                **dict(zip(keys, of, strict=True)), "view": view, "members": members,
                "thief": thief, "seeds": len(of_seed), **means,
                "scratch_low": of_seed["scratch"].min(), "scratch_high": of_seed["scratch"].max(),
                "owner_of_rest": of_seed["owner"].mean(),  # of runs that did not break down
                "copy": np.mean(_of_seeds(copies, ["copy"])["copy"]),
                "thief_best": max((x[1] for x in ranked), key=_key),
                "lambda": stolen.value, "lambda_low": stolen.low, "lambda_high": stolen.high,
                "lambda_worst": worst.value, "fidelity": tried["fidelity"].mean(),
                "over_scratch": protection.over_scratch(
                    of_seed["thief_accuracy"], of_seed["scratch"]
                ),
                "images_needed": tried["images_needed"].mean(),
                **{
                    name: group.groupby("seed")[name].first().mean()
                    for name in ("copy_bytes", "calibration_ratio")
                },
                "rounds_over_cap": group.groupby("seed")["rounds_over_cap"].first().sum(),
                "failed": int(group.groupby("seed")["failed"].first().sum()),
            })  # fmt: skip
    return pd.DataFrame(found)


def _of_seeds(rows: Frame, names: list[str]) -> Frame:
    """Means of each seed's rows; NaN if one of them is."""
    return rows.groupby("seed")[names].agg(lambda column: np.mean(column.to_numpy(float)))


def _key(accuracy: float) -> float:
    return -1.0 if math.isnan(accuracy) else accuracy


def markdown(frame: Frame, best: Frame) -> str:
    """Both tables, setting by setting."""
    return _text(settings(frame, best))


def _text(found: Sequence[Setting]) -> str:
    lines = ["# The frontier", "", NOTE, ""]
    for one in found:
        lines += [
            f"## {one.name}", "", one.controls, "", *_lines(one.by_view), "", f"{BY_THIEF}:", "",
            *_lines(one.by_thief), "",
        ]  # fmt: skip
    return "\n".join(lines)


def settings(frame: Frame, best: Frame) -> list[Setting]:
    """Both tables of each setting."""
    found = []
    for setting, group in best.groupby(SETTING, sort=False):
        most = owners.of_most_seeds(group)
        of = (frame[SETTING] == list(setting)).all(axis=1)
        dataset, model, partition, clients, images = setting
        found.append(Setting(
            f"{dataset}, {model}, {partition}, K = {clients}, {_counted(most['seeds'], 'seed')}",
            f"FedAvg {_percent(most['fedavg'])}; the server alone, on its {images} images, "
            f"{_percent(most['server_alone'])}.",
            _by_view(group), _by_thief(frame[of]),
        ))  # fmt: skip
    return found


def _by_view(group: Frame) -> list[list[str]]:
    views = list(dict.fromkeys(zip(group["view"], group["members"], strict=True)))
    most = group["seeds"].max()
    heads = ["scheme", "strength", "O", "copy", "kB a copy", "calibration / training"]
    heads += [f"{view}{f', {c}' if c > 1 else ''}: S, T, λ" for view, c in views]
    lines = [heads]
    for (scheme, strength), some in group.groupby(["scheme", "strength"], sort=False, dropna=False):
        first = some.iloc[0]
        broke = f" ({first['failed']} of {first['seeds']} broke down)" if first["failed"] else ""
        fewer = f" ({_counted(first['seeds'], 'seed')})" if first["seeds"] < most else ""
        cells = [scheme + fewer, _shown(strength), _percent(first["owner"]) + broke]
        cells.append(_percent(first["copy"]))
        cells += [_number(first["copy_bytes"], 1e-3, 0), _number(first["calibration_ratio"], 1, 2)]
        for view, members in views:
            of = some[(some["view"] == view) & (some["members"] == members)]
            if not len(of):
                cells.append("")
                continue
            one = of.iloc[0]
            cells.append(
                f"{_percent(one['scratch'])}, {_percent(one['thief_accuracy'])} "
                f"({one['thief'].replace('_', ' ')}), {_ratio(one)}"
            )
        lines.append(cells)
    return lines


def _by_thief(frame: Frame) -> list[list[str]]:
    """Thieves in rows, schemes in columns; of each scheme its middle strength."""
    schemes = list(dict.fromkeys(frame["scheme"]))
    middle = {}
    for scheme in schemes:
        strengths = list(dict.fromkeys(frame[frame["scheme"] == scheme]["strength"]))
        middle[scheme] = strengths[len(strengths) // 2]
    lines = [["thief", "view", *(f"{s} {_shown(middle[s])}".strip() for s in schemes)]]
    for (view, members, thief), some in frame.groupby([*VIEW, "thief"], sort=True):
        cells = [thief.replace("_", " "), view + (f", {members}" if members > 1 else "")]
        for scheme in schemes:
            same = (
                some["strength"].isna()
                if _missing(middle[scheme])
                else (some["strength"] == middle[scheme])
            )
            of = some[(some["scheme"] == scheme) & same]
            seeds = _of_seeds(of, ["owner", "thief_accuracy", "scratch"])
            stolen = protection.share_stolen(*(seeds[name] for name in seeds)) if len(of) else None
            cells.append("" if stolen is None else _ratio({
                "lambda": stolen.value, "lambda_low": stolen.low, "lambda_high": stolen.high
            }))  # fmt: skip
        lines.append(cells)
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(strength: Any) -> str:
    return "" if _missing(strength) else f"{strength:g}"


def _percent(value: Any) -> str:
    return "–" if _missing(value) else f"{100 * value:.1f}"


def _number(value: Any, times: float, digits: int) -> str:
    return "–" if _missing(value) else f"{times * value:.{digits}f}"


def _ratio(one: Any) -> str:
    if _missing(one["lambda"]):
        return "–"
    if _missing(one["lambda_low"]):
        return f"{one['lambda']:.2f}"
    return f"{one['lambda']:.2f} [{one['lambda_low']:.2f}, {one['lambda_high']:.2f}]"


def _lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """Of Markdown's table, from its headings and cells."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return ["| " + " | ".join(line) + " |" for line in lines]


def pictures(best: Frame) -> dict[str, Figure]:
    """Two for each data set, model and population: `owners.picture` and `shares.picture`."""
    found = {}
    schemes = [name for name in dict.fromkeys(best["scheme"]) if name != "none"]
    of_picture = [name for name in SETTING if name != "partition"]
    told = [n for n in of_picture if n == "num_clients" or best[n].nunique() > 1]
    for setting, of in best.groupby(of_picture, sort=True):
        said = dict(zip(of_picture, setting, strict=True))
        text = (
            f"{said['dataset']}, {said['model']}, K = {said['num_clients']}, "
            f"{said['server_images']} images at the server"
        )
        name = "-".join(str(said[n]).replace("/", "_") for n in told)
        found[f"frontier-{name}.png"] = owners.picture(of, schemes, text)
        found[f"shares-{name}.png"] = shares.picture(of, f"λ of {text}")
    return found

"""The picture of `experiments.bench_calibration`: cost against violations, one mark each."""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

MARKERS = "osD^v<>P*X"


def picture(results: list[dict[str, Any]], path: str) -> None:
    """Images forwarded a calibration against the rate of violations, with its upper 95 % bound.

    The legend gives the owner's accuracy in whole runs: a dead model would hold every cap. A
    calibrator that called no round feasible has no rate, and no mark.
    """
    drawn = [result for result in results if result["claimed"]]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for result, marker in zip(drawn, MARKERS, strict=False):
        cost = max(result["images_per_round"], 1)  # a logarithmic axis has no 0
        rate, upper = result["violation_rate"], result["violation_rate_upper95"]
        owner = 100 * float(np.mean(result["run_owner_accuracy"]))
        axes.errorbar(
            cost,
            100 * rate,
            yerr=[[0], [100 * (upper - rate)]],
            fmt=marker,
            capsize=3,
            markersize=7,
            label=f"{result['calibrator']}, owner {owner:.1f} %{vouched(result)}",
        )
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("δ = 1 %", (0.01, 1), xytext=(0, 3), color="0.4", **place)
    axes.set(
        xscale="log",
        yscale="symlog",
        xlabel="images forwarded per calibration (unverified: none)",
        ylabel="pairs over the cap on 10,000 test images, %",
        title="What a calibration costs, how often it breaks the cap (to 95 % bounds)",
        ylim=(-0.2, 100),
    )
    axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], [f"{t}" for t in (0, 1, 2, 5, 10, 20, 50, 100)])
    axes.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def vouched(result: dict[str, Any]) -> str:
    """Where some rounds were infeasible, the share that counts."""
    if result["claimed"] == result["calibrations"]:
        return ""
    return f"\n(of {result['claimed'] / result['calibrations']:.0%} of the rounds)"

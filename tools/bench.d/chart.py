"""Draws ours / peer of every workload: chart.py bench.json NAME makes NAME.svg and NAME.png."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

import systems  # noqa: E402
import workloads  # noqa: E402
from report import COUNTERPARTS, number  # noqa: E402
from results import Results  # noqa: E402
from workloads import Workload  # noqa: E402

# Distinct for readers who do not tell red from green.
COLOURS = {
    systems.RUBLK.name: "#0072b2",
    systems.RUBLK_ZC.name: "#56b4e9",
    systems.LOOP.name: "#999999",
    systems.QEMU_NATIVE.name: "#d55e00",
    systems.QEMU_URING.name: "#e69f00",
    systems.RUBLK_2Q.name: "#009e73",
}
BAR = 1.0
GAP = 1.2  # between workloads
PEER_NAMES = {
    systems.RUBLK.name: "rublk, raw file",
    systems.RUBLK_ZC.name: "rublk zero copy, raw file (ours zero copy)",
    systems.LOOP.name: "kernel loop device, raw file",
    systems.QEMU_NATIVE.name: "qemu-nbd, VHDX, aio=native",
    systems.QEMU_URING.name: "qemu-nbd, VHDX, aio=io_uring",
    systems.RUBLK_2Q.name: "rublk two queues, raw file (ours two queues)",
}


def draw_workload(axes: Axes, results: Results, workload: Workload, top: float) -> float:
    """Draws the bars of one workload from `top` downwards; returns where they end."""
    y = top
    for peer, colour in COLOURS.items():
        ratio = results.ratio(workload.name, COUNTERPARTS[peer], [peer])
        if not ratio:
            continue
        # A bar starts at 1, where both are equal, so that faster and slower point apart.
        axes.barh(y, ratio.median - 1, left=1, height=BAR * 0.9, color=colour, zorder=2)
        if ratio.least < ratio.most:
            spread = [[ratio.median - ratio.least], [ratio.most - ratio.median]]
            axes.errorbar(ratio.median, y, xerr=spread, color="black", linewidth=0.8, capsize=1.5, zorder=3)
        place = (max(ratio.most, 1), y)
        axes.annotate(number(ratio.median), place, (4, 0), textcoords="offset points", va="center", fontsize=7)
        y += BAR
    return y


def heading(results: Results) -> str:
    facts, rounds = results.facts, len(results.rounds)
    what = "a single round" if rounds == 1 else f"median of {rounds} rounds, whiskers from least to most"
    return f"{facts['kernel']}, {facts['CPUs']} CPUs, {facts['file system']}; {what}"


def label_axes(axes: Axes) -> None:
    axes.axvline(1, color="black", linewidth=1, zorder=4)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    least, most = axes.get_xlim()
    axes.set_xlim(min(least, 0.5), max(most * 1.3, 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="#dddddd", linewidth=0.5, zorder=0)
    axes.set_xlabel("throughput of vhdx-ublk / throughput of the peer (log scale; right of 1: vhdx-ublk is faster)")


def draw(results: Results, name: str) -> None:
    measured = [one for one in workloads.COMPARED if any(one.name in found for found in results.rounds)]
    figure, axes = plt.subplots(figsize=(11, 0.75 * len(measured) + 2.2), layout="constrained")
    axes.set_xscale("log")
    y, centres, labels = 0.0, [], []
    for workload in measured:
        end = draw_workload(axes, results, workload, y)
        if end > y:
            centres.append((y + end - BAR) / 2)
            labels.append(workload.title)
            y = end + GAP
    axes.set_yticks(centres, labels, fontsize=8)
    label_axes(axes)
    figure.suptitle(f"vhdx-ublk on a dynamic VHDX beside its peers\n{heading(results)}", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = [PEER_NAMES[peer] for peer in COLOURS]
    axes.legend(handles, names, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(f"{name}.svg")
    figure.savefig(f"{name}.png", dpi=150)


if __name__ == "__main__":
    draw(Results.load(Path(sys.argv[1])), sys.argv[2])

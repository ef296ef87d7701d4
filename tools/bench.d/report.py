"""The results as Markdown."""

import systems
import targets
import tasks
import workloads
from results import Results, Spread
from tasks import Serving, Task
from workloads import Workload

METRICS = {
    "value": "throughput",
    "p50_us": "p50 latency",
    "p99_us": "p99 latency",
    "cpu_s_per_m": "server CPU per request",
}
# What the tables have of each workload beside its throughput.
FIGURES = {
    "p50_us": "p50 µs",
    "p99_us": "p99 µs",
    "p999_us": "p99.9 µs",
    "cpu_s_per_m": "CPU s / 10⁶",
    "wakes": "wakes",
}
# Whose ratio a peer's row gives: the one that moves the data in the same way.
COUNTERPARTS = {
    systems.OLD.name: systems.OURS.name,
    systems.RUBLK.name: systems.OURS.name,
    systems.LOOP.name: systems.OURS.name,
    systems.QEMU_NATIVE.name: systems.OURS.name,
    systems.QEMU_URING.name: systems.OURS.name,
    systems.RUBLK_ZC.name: systems.OURS_ZC.name,
    systems.RUBLK_2Q.name: systems.OURS_2Q.name,
}
NOTES = """\
* Figures are medians over the rounds, with the least and the most where there were several rounds. A ratio is computed
  in each round, from runs that follow one another, and the median is taken of the ratios; above 1, ours does more.
* Latency is that of completion; where every write is synced, it is the sync's. Its resolution is 1.6 %.
* CPU is what the serving process computed, user and system, per million of fio's requests; the work of kernel threads
  (the loop device, the NBD client) is not in it. The clock has 100 ticks a second: runs of less than a second of
  computing say little. The user-mode kernel counts the wait for a disk's sync as computing, whoever asked for it.
* wakes: how often our threads have woken each other, per request; it does not depend on the kernel.
* A command's throughput is how often a second has time for it; its latency is the time it took, and its wakes are all
  of its. A full disk has 4 KiB in every block. The time of `add` ends with the first read, that of `del` when nothing
  has the file open.
* With two CPUs and more the first one is the requests' and the others are the server's, but with two queues.
* Where blocks are written first and in the fill, the final sync is in the time. qemu-nbd is stopped there, and counted
  as far as it came, when a time limit ends.
* ours: a dynamic image; rublk and the kernel's loop device: a raw file, as sparse as the image is empty; all on the
  same file system, with direct I/O, logical blocks of 512 bytes and no scheduler. The two ublk servers have the same
  queues, depth and request size. zc: zero copy; 2q: two queues. old: another vhdx-ublk, which ours is compared with.
"""
CHAIN_NOTES = """\
* chain N: a child of which every read passes through N images, the last of which has all content; chain 1 has it
  itself, over an empty parent.
* half, child half: a dynamic image and a child over an empty parent, of which every other 4 KiB was written; the child
  has its blocks in part only. Every 4 KiB is written once, and the final sync is in the time.
* this / first: the ratio to the workload's first system; below 1, it does less.
"""


def markdown(results: Results) -> str:
    parts = [
        "# Benchmark",
        facts(results),
        "## Beside the others",
        NOTES,
        big_table(results),
    ]
    if systems.OLD.name not in results.facts:
        parts += peers_only(results)
    if results.failures:
        parts += ["## Failed", "\n".join(f"* {failure}" for failure in results.failures)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def peers_only(results: Results) -> list[str]:
    """What is of no use where two programs of ours are compared."""
    return [
        "## Growth",
        "4 KiB requests to written blocks of images of three sizes; in parentheses the ratio to 1 GiB.",
        growth_table(results),
        "## Chains",
        CHAIN_NOTES,
        chain_table(results),
        "## Block layer settings",
        settings_table(results),
        "## Targets",
        target_table(results),
    ]


def facts(results: Results) -> str:
    lines = [f"* {name}: {value}" for name, value in results.facts.items()]
    lines += [f"* **not measured**: {name} ({reason})" for name, reason in results.skipped.items()]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not measured."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def target_table(results: Results) -> str:
    rows = []
    for target in targets.ALL:
        if not any(target.workload in measured for measured in results.rounds):
            continue
        ratio, verdict = target.judge(results)
        peers = " or ".join(target.peers)
        title = title_of(target.workload)
        rows.append(
            [title, METRICS[target.metric], f"{target.system} / {peers}", target.bound(), spread(ratio), verdict.value]
        )
    return table(["workload", "of", "ratio", "target", "found", ""], rows)


def title_of(name: str) -> str:
    return next(one.title for one in [*workloads.ALL, *tasks.ALL] if one.name == name)


def big_table(results: Results) -> str:
    head = ["workload", "system", "throughput", *FIGURES.values(), "ours / this"]
    rows = []
    for workload in [*workloads.COMPARED, *tasks.ALL]:
        if any(workload.name in measured for measured in results.rounds):
            rows += workload_rows(results, workload)
    return table(head, rows)


def workload_rows(results: Results, workload: Workload | Task | Serving) -> list[list[str]]:
    """A row of every system; one that does not do this, or failed in it, has dashes."""
    rows = []
    chosen = results.facts["systems"].split(", ")
    for system in workload.measured:
        if system.name not in chosen:
            continue
        title = f"**{workload.title}**" if not rows else ""
        if not results.has(workload.name, system.name):
            rows.append([title, system.name, *["—"] * (len(FIGURES) + 2)])
            continue
        throughput = results.spread(workload.name, system.name, "value")
        rows.append(
            [
                title,
                system.name,
                f"{spread(throughput)} {workload.unit}",
                *(middle(results.spread(workload.name, system.name, metric)) for metric in FIGURES),
                peer_ratio(results, workload, system.name),
            ]
        )
    return rows


def peer_ratio(results: Results, workload: Workload | Task | Serving, peer: str) -> str:
    if peer not in COUNTERPARTS:
        return ""
    return spread(results.ratio(workload.name, COUNTERPARTS[peer], [peer]))


def growth_table(results: Results) -> str:
    names = [system.name for system in systems.GROWTH]
    rows = []
    for workload in workloads.GROWING:
        if any(workload.name in measured for measured in results.rounds):
            cells = [growth_cell(results, workload.name, name) for name in names]
            rows.append([workload.title, *cells])
    return table(["workload (IOPS, p50 µs)", *names], rows)


def growth_cell(results: Results, workload: str, name: str) -> str:
    found = results.spread(workload, name, "value")
    if not found:
        return "—"
    text = f"{spread(found)}, {middle(results.spread(workload, name, 'p50_us'))} µs"
    ratio = results.ratio(workload, name, [systems.OURS_1G.name])
    if ratio and name != systems.OURS_1G.name:
        text += f" ({number(ratio.median)})"
    return text


def chain_table(results: Results) -> str:
    rows = []
    for workload in workloads.CHAINED:
        first = workload.measured[0].name
        for system in workload.measured:
            if not results.has(workload.name, system.name):
                continue
            ratio = results.ratio(workload.name, system.name, [first]) if system.name != first else None
            rows.append(
                [
                    f"**{workload.title}**" if system.name == first else "",
                    system.name,
                    f"{spread(results.spread(workload.name, system.name, 'value'))} {workload.unit}",
                    *(middle(results.spread(workload.name, system.name, metric)) for metric in FIGURES),
                    spread(ratio) if ratio else "",
                ]
            )
    return table(["workload", "system", "throughput", *FIGURES.values(), "this / first"], rows)


def settings_table(results: Results) -> str:
    head = ["system", *systems.QUEUE_SETTINGS]
    return table(
        head,
        [[name, *(found[one] for one in systems.QUEUE_SETTINGS)] for name, found in results.settings.items()],
    )


def spread(found: Spread | None) -> str:
    if not found:
        return "—"
    if found.least == found.most:
        return number(found.median)
    return f"{number(found.median)} ({number(found.least)}–{number(found.most)})"


def middle(found: Spread | None) -> str:
    return number(found.median) if found else "—"


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"

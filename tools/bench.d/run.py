"""Measures, beside a kernel with ublk; tools/bench starts it there. Exits with 1 if anything failed."""

import argparse
import os
import platform
import signal
import sys
import time
from pathlib import Path

import systems
import tasks
import workloads
from bench import Bench, Measured
from commands import CommandError, run
from measure import Duration
from report import markdown
from results import Results
from scratch import laboratory_disk, memory_disk, mounted
from systems import System, Tools


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench", allow_abbrev=False)
    parser.add_argument("--vhdx-ublk", type=Path, required=True)
    parser.add_argument("--rublk", type=Path, required=True)
    parser.add_argument("--old", type=Path)
    parser.add_argument("--load", required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=positive, default=4)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--systems", action="append", default=[])
    parser.add_argument("--xfs", action="store_true")
    parser.add_argument("--fast-disk", action="store_true")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def chosen_workloads(parts: list[str]) -> list[Measured]:
    known: list[Measured] = [*workloads.ALL, *tasks.ALL]
    found = [one for one in known if not parts or any(part in one.name for part in parts)]
    if not found:
        raise CommandError(f"no such workload; there are: {', '.join(one.name for one in known)}")
    return found


def chosen_systems(lists: list[str]) -> list[System]:
    names = [name.strip() for text in lists for name in text.split(",")]
    known = {system.name: system for system in systems.ALL}
    if unknown := [name for name in names if name not in known]:
        raise CommandError(f"no such system: {', '.join(unknown)}; there are: {', '.join(known)}")
    return [system for system in systems.ALL if not names or system.name in names]


def gather_facts(options: argparse.Namespace, tools: Tools, measured: list[System]) -> dict[str, str]:
    disk = "a disk in memory (null_blk)" if options.fast_disk else "a disk in a file"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": f"{os.environ.get('VHDX_LAB_KERNEL', 'unknown')} ({platform.release()}, {platform.machine()})",
        "CPUs": str(os.cpu_count()),
        "file system": f"{'xfs' if options.xfs else 'ext4'} on {disk}",
        "ours": f"{run([tools.vhdx_ublk, '--version']).strip()}, {options.revision}",
        **programs_beside(tools),
        "fio": first_line("fio"),
        "load of the machine before": options.load,
        "rounds": str(options.rounds),
        "seconds": f"{options.seconds} after a warm-up of 1",
        "systems": ", ".join(system.name for system in measured),
    }


def programs_beside(tools: Tools) -> dict[str, str]:
    if tools.old:
        return {"old": first_line(tools.old)}
    return {"rublk": first_line(tools.rublk), "qemu-nbd": first_line("qemu-nbd")}


def first_line(program: str | Path) -> str:
    return run([program, "--version"]).splitlines()[0]


def write_report(results: Results, folder: Path) -> None:
    results.save(folder / "bench.json")
    (folder / "bench.md").write_text(markdown(results))


def measure_all(options: argparse.Namespace) -> Results:
    tools = Tools(options.vhdx_ublk, options.rublk, options.old)
    wanted = chosen_workloads(options.only)
    if options.old:
        wanted = [workload for workload in wanted if systems.OLD in workload.measured]
    measured = list(systems.COMPARED) if options.old else chosen_systems(options.systems)
    results = Results(gather_facts(options, tools, measured))
    for system in measured:
        if reason := system.missing(tools):
            results.skipped[system.name] = reason
            print(f"NOT MEASURED: {system.name}: {reason}", file=sys.stderr)
    measured = [system for system in measured if system.name not in results.skipped]
    provided = memory_disk() if options.fast_disk else laboratory_disk()
    with provided as disk, mounted(disk, "xfs" if options.xfs else "ext4") as folder:
        bench = Bench(tools, folder, results, Duration(options.seconds))
        try:
            for number in range(options.rounds):
                bench.run_round(number, wanted, measured)
                write_report(results, options.out)
        finally:
            bench.close(measured)
            write_report(results, options.out)
    return results


def main() -> int:
    # Being told to end is no reason to leave devices behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = parse()
    try:
        results = measure_all(options)
    except CommandError as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    for failure in results.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""The order of things: rounds of workloads of systems, one measurement at a time."""

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from commands import CommandError, Stuck
from measure import Duration, Region, Sample, fill, measure, touch
from results import Results
from scratch import GIB, MIB, free_bytes, set_no_scheduler
from systems import Device, System, Tools
from tasks import Serving, Task, perform, serve
from workloads import GROWING, GROWTH_SHAPES, STANDING, Workload

Measured = Workload | Task | Serving

REGION_LIMIT = GIB
# The standing images and one new one at a time use less than 16 regions' space together.
REGIONS_PER_DISK = 17


@dataclass
class Bench:
    """A run on one file system.

    Systems that are measured on written blocks keep their device for the whole run, so that all are
    in the same state in every round; for workloads that need an empty image, a device is made and
    taken away again around each measurement.
    """

    tools: Tools
    folder: Path
    results: Results
    duration: Duration
    standing: dict[str, Device] = field(default_factory=dict)
    served: set[Path] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        share = min(REGION_LIMIT, free_bytes(self.folder) // REGIONS_PER_DISK)
        self.length = max(share // (64 * MIB), 1) * 64 * MIB
        written = f"{self.length // MIB} MiB; in the growth table {self.small // MIB} MiB at each end"
        self.results.facts["written region"] = written

    @property
    def small(self) -> int:
        return self.length // 4

    def run_round(self, number: int, workloads: list[Measured], systems: list[System]) -> None:
        """Measures every workload on every system; each round another system is the first."""
        self.results.rounds.append({})
        for workload in workloads:
            chosen = [system for system in workload.measured if system in systems]
            turn = number % len(chosen) if chosen else 0
            for system in chosen[turn:] + chosen[:turn]:
                self.run_cell(number, workload, system)

    def run_cell(self, number: int, workload: Measured, system: System) -> None:
        started = time.monotonic()
        label = f"round {number + 1}  {workload.name:34} {system.name:18}"
        try:
            if system.name in self.stuck:
                raise CommandError("its device hung before")
            sample = self.sample(workload, system)
        except Stuck as error:
            self.stuck.add(system.name)
            self.note_failure(label, workload, system, error)
        except (CommandError, OSError, KeyError, ValueError) as error:
            self.note_failure(label, workload, system, error)
        else:
            self.results.add(workload.name, system.name, sample)
            figures = f"{sample.value:10.0f} {workload.unit:4}  p50 {sample.p50_us:9.0f} µs"
            print(f"{label} {figures}  {time.monotonic() - started:5.1f} s", flush=True)

    def sample(self, workload: Measured, system: System) -> Sample:
        if isinstance(workload, Serving):
            return self.sample_serving(workload, system)
        with self.device(workload, system) as device, tempfile.TemporaryDirectory(dir="/run") as own:
            if isinstance(workload, Task):
                return perform(workload, device, Path(own))
            set_no_scheduler(device.path)  # again: a rule of udev may have come after us
            return measure(workload, device, self.region(workload, device), self.duration, Path(own))

    def sample_serving(self, serving: Serving, system: System) -> Sample:
        """Its file is made once: to write into every block takes longer than to serve it."""
        file = self.folder / f"{serving.name}-{system.name}"
        if file not in self.served:
            system.remove(file)
            system.create(self.tools, file, serving.fresh.shape)
            self.served.add(file)
            if serving.fresh.touched:
                device = system.attach(self.tools, file)
                try:
                    touch(device, serving.fresh.shape)
                finally:
                    system.stop(self.tools, device)
        return serve(self.tools, system, file, serving)

    def note_failure(self, label: str, workload: Measured, system: System, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, CommandError) else str(error)
        self.results.fail(workload.name, system.name, reason)
        print(f"{label} FAILED: {reason}", flush=True)

    def region(self, workload: Measured, device: Device) -> Region:
        if workload in GROWING:
            size = int((device.sysfs / "size").read_text()) * 512
            return Region(0 if workload.region == "start" else size - self.small, self.small)
        return Region(0, self.small if workload.small else self.length)

    @contextmanager
    def device(self, workload: Measured, system: System) -> Iterator[Device]:
        if workload.fresh:
            with self.new_device(workload, system) as device:
                yield device
        else:
            yield self.standing_device(system)

    @contextmanager
    def new_device(self, workload: Measured, system: System) -> Iterator[Device]:
        assert workload.fresh
        file = self.folder / "new"
        system.remove(file)
        system.create(self.tools, file, workload.fresh.shape)
        try:
            device = system.attach(self.tools, file)
            try:
                if workload.fresh.touched:
                    touch(device, workload.fresh.shape)
                if workload.fresh.filled:
                    fill(device, self.region(workload, device), system.filled)
                    device = system.settle(self.tools, device)
                yield device
            finally:
                system.stop(self.tools, device)
        finally:
            system.remove(file)

    def standing_device(self, system: System) -> Device:
        """The system's device, made and filled when it is first needed, or when its server has died."""
        device = self.standing.get(system.name)
        if device and device.is_alive():
            return device
        if device:
            self.drop(system)
        file = self.folder / system.name.replace(" ", "-")
        system.remove(file)
        shape = GROWTH_SHAPES.get(system.name, STANDING)
        system.create(self.tools, file, shape)
        device = self.standing[system.name] = system.attach(self.tools, file)
        if system.name in GROWTH_SHAPES:
            regions = [Region(0, self.small), Region(shape.size - self.small, self.small)]
        else:
            regions = [Region(0, self.length)]
        try:
            for region in regions:
                fill(device, region, system.filled)
            device = self.standing[system.name] = system.settle(self.tools, device)
        except CommandError:
            self.drop(system)
            raise
        self.results.settings[system.name] = device.settings()
        return device

    def drop(self, system: System) -> None:
        device = self.standing.pop(system.name)
        try:
            system.stop(self.tools, device)
        finally:
            system.remove(device.file)

    def close(self, systems: list[System]) -> None:
        """Takes every device and file away, whatever fails on the way."""
        for file in self.served:
            file.unlink(missing_ok=True)
        for system in systems:
            if system.name in self.standing:
                try:
                    self.drop(system)
                except CommandError as error:
                    self.results.failures.append(f"taking away {system.name}: {error}")
                    print(f"taking away {system.name}: {error}", file=sys.stderr)

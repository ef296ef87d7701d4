//! Running a task on a simulated disk, every moment of it seen.

use std::future::Future;

use super::disk::SimDisk;
use super::tasks::SimTasks;

/// Runs `task` to its end, and whatever it starts on `tasks`, in order; `look` sees every moment at which
/// something on `disk` has changed.
pub fn run_watched<T: 'static>(
    tasks: &SimTasks,
    disk: &SimDisk,
    task: impl Future<Output = T> + 'static,
    mut look: impl FnMut(&SimDisk),
) -> T {
    let result = tasks.start(task);
    let (mut known, mut rounds) = (None, 0);
    while result.borrow().is_none() {
        while tasks.ready() > 0 {
            tasks.run(0);
            if known != Some(disk.versions().0) {
                known = Some(disk.versions().0);
                look(disk);
            }
        }
        if let Some(place) = disk.places(false, true).first() {
            disk.complete(*place);
            look(disk);
        }
        rounds += 1;
        assert!(rounds < 100_000, "the task does not end");
    }
    result.take().expect("it has ended")
}

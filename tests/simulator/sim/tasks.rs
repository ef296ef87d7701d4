//! A scheduler for the engine's tasks in which the test chooses who runs next.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use vhdx_ublk::engine::waiting::Spawn;

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
pub struct SimTasks {
    tasks: RefCell<BTreeMap<u64, Option<Task>>>,
    ready: Arc<Mutex<BTreeSet<u64>>>,
    next: RefCell<u64>,
}

/// The tasks of one world, which end with it: the engine's loop would otherwise keep the engine, which keeps
/// its tasks.
#[derive(Default)]
pub struct OwnedTasks(Rc<SimTasks>);

impl Deref for OwnedTasks {
    type Target = Rc<SimTasks>;

    fn deref(&self) -> &Rc<SimTasks> {
        &self.0
    }
}

impl Drop for OwnedTasks {
    fn drop(&mut self) {
        self.0.die();
    }
}

struct TaskWaker {
    id: u64,
    ready: Arc<Mutex<BTreeSet<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.lock().expect("one thread").insert(self.id);
    }
}

impl Spawn for SimTasks {
    fn spawn(&self, task: Task) {
        let id = self.next.replace_with(|next| *next + 1);
        self.tasks.borrow_mut().insert(id, Some(task));
        self.ready.lock().expect("one thread").insert(id);
    }
}

impl SimTasks {
    /// How many tasks can run.
    pub fn ready(&self) -> usize {
        self.ready.lock().expect("one thread").len()
    }

    /// Runs the `index`-th ready task until it waits.
    pub fn run(&self, index: usize) {
        let id = {
            let mut ready = self.ready.lock().expect("one thread");
            let id = *ready.iter().nth(index).expect("below ready()");
            ready.remove(&id);
            id
        };
        let Some(mut task) = self.tasks.borrow_mut().get_mut(&id).and_then(Option::take) else { return };
        let waker = Waker::from(Arc::new(TaskWaker { id, ready: self.ready.clone() }));
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => drop(self.tasks.borrow_mut().remove(&id)),
            Poll::Pending => *self.tasks.borrow_mut().get_mut(&id).expect("still there") = Some(task),
        }
    }

    /// The process has died: no task continues.
    pub fn die(&self) {
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        self.ready.lock().expect("one thread").clear();
    }

    /// Starts a task whose result can be taken when it has ended.
    pub fn start<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> Rc<RefCell<Option<T>>> {
        let result = Rc::new(RefCell::new(None));
        let place = result.clone();
        self.spawn(Box::pin(async move { *place.borrow_mut() = Some(task.await) }));
        result
    }
}

/// Runs a future whose operations all end at once.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = Box::pin(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing waits on an immediate disk"),
    }
}

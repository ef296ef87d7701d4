//! Orders to the engine's thread from the threads that it has started.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use nix::sys::eventfd::EventFd;

use super::mailbox::wake_up;
use super::order::Order;

/// See the module's head.
#[derive(Clone)]
pub(super) struct Caller {
    orders: Sender<Order>,
    called: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl Caller {
    /// For a thread that takes `orders`, and that looks at `called` when `wake` was written.
    pub(super) fn new(orders: Sender<Order>, called: Arc<AtomicBool>, wake: Arc<EventFd>) -> Self {
        Self { orders, called, wake }
    }

    /// A thread that has ended, or that takes no more orders, drops it.
    pub(super) fn order(&self, order: Order) {
        let _ = self.orders.send(order);
        self.called.store(true, Ordering::Release);
        wake_up(&self.wake);
    }
}

//! Messages from one thread to another, in order and without loss: what `mailbox` shows of the program's own.

use std::collections::VecDeque;

use loom::sync::{Condvar, Mutex};

pub struct Post<T> {
    messages: Mutex<VecDeque<T>>,
    came: Condvar,
}

impl<T> Post<T> {
    pub fn new() -> Self {
        Self { messages: Mutex::new(VecDeque::new()), came: Condvar::new() }
    }

    pub fn send(&self, message: T) {
        self.messages.lock().expect("no panic holds it").push_back(message);
        self.came.notify_one();
    }

    /// Waits for the oldest message.
    pub fn receive(&self) -> T {
        let mut messages = self.messages.lock().expect("no panic holds it");
        loop {
            if let Some(message) = messages.pop_front() {
                return message;
            }
            messages = self.came.wait(messages).expect("no panic holds it");
        }
    }

    /// The oldest message, if one is here.
    pub fn look(&self) -> Option<T> {
        self.messages.lock().expect("no panic holds it").pop_front()
    }
}

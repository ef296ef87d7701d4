//! How a broken promise ends a run: by a panic of its own kind, told apart from every other panic, and
//! without a backtrace, which would name the harness.

use std::any::Any;

/// What was promised and not kept.
#[derive(Debug)]
pub struct Violation(pub String);

/// Ends the run.
pub fn violated(why: String) -> ! {
    eprintln!("broken promise: {why}");
    std::panic::resume_unwind(Box::new(Violation(why)))
}

/// The broken promise that ended a run, if one did.
pub fn broken_promise(panic: &(dyn Any + Send)) -> Option<&str> {
    panic.downcast_ref::<Violation>().map(|violation| violation.0.as_str())
}

/// What any panic says.
pub fn message(panic: &(dyn Any + Send)) -> &str {
    broken_promise(panic)
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words")
}

//! Promises defended here: what the threads of a device share without a lock holds in every order of their
//! steps, and with every value that a load may find under the memory model of Rust, which lets more happen
//! than the machine at hand. The code under test is the program's own; loom replaces its atomic words.
//!
//! What is left out: loom gives every `SeqCst` access but a fence the strength of an acquire and a release,
//! and has a read-modify-write find the newest value, as the hardware does. What one thread does by itself,
//! from one of its steps to the next, is for the simulator.

mod claim;
mod explore;
mod flush;
mod front;
mod mailbox;
mod map;
mod marks;
mod moves;
mod poison;
mod post;
mod sector;

use std::panic::{AssertUnwindSafe, catch_unwind};

use vhdx_ublk::simulation::{Plant, plant};

use explore::{Model, message};

/// Nothing breaks in any interleaving, and what may come about does.
fn holds(model: &Model) {
    let found = model.explore();
    println!("{}: {} interleavings, {}", model.name, found.interleavings, model.bounds());
    assert_eq!(found.outcomes, model.outcomes.iter().copied().collect());
}

#[test]
fn no_message_waits_for_a_thread_that_sleeps() {
    holds(&mailbox::MODEL);
}

#[test]
fn a_sector_that_was_written_is_in_the_next_copy() {
    holds(&marks::ONE_SECTOR);
    holds(&marks::TWO_SECTORS);
}

#[test]
fn a_block_that_a_front_gives_space_keeps_it_and_is_logged() {
    holds(&claim::MODEL);
}

#[test]
fn a_flush_is_a_sync_only_where_everything_is_logged() {
    holds(&flush::MODEL);
}

#[test]
fn what_was_seen_of_the_map_is_there_and_what_is_durable_was_logged() {
    holds(&map::MODEL);
}

#[test]
fn a_block_that_moves_takes_every_write_along() {
    holds(&moves::MODEL);
}

#[test]
fn a_sector_is_read_where_it_was_written() {
    holds(&sector::MODEL);
}

#[test]
fn poison_is_seen_and_stays() {
    holds(&poison::SYNC);
    holds(&poison::OPEN);
}

/// The model that catches `planted`, and what it says then.
fn catch_for(planted: Plant) -> (&'static Model, &'static str) {
    match planted {
        Plant::SkipSleepFence | Plant::SkipSendFence | Plant::LookFirst => (&mailbox::MODEL, "deadlock"),
        Plant::RelaxedMark | Plant::RelaxedTake => (&marks::TWO_SECTORS, marks::LOST),
        Plant::TrustFoundBits
        | Plant::MarkBeforeChange
        | Plant::GroupBeforePage
        | Plant::RelaxedFind
        | Plant::RelaxedBits => (&marks::ONE_SECTOR, marks::LOST),
        Plant::TrustFoundMapping | Plant::StayOutside => (&claim::MODEL, claim::NOT_LOGGED),
        Plant::StoreDurable => (&claim::MODEL, claim::GONE),
        Plant::RelaxedCount | Plant::RelaxedUncount => (&flush::MODEL, flush::NOT_LOGGED),
        Plant::RelaxedPublish | Plant::RelaxedLookup => (&map::MODEL, map::PASSED_OVER),
        Plant::IgnoreChange => (&map::MODEL, map::NOT_LOGGED),
        Plant::EarlyAnswer | Plant::IgnoreMove => (&moves::MODEL, moves::LEFT_BEHIND),
        Plant::TrustFoundPlace => (&sector::MODEL, sector::STALE),
        Plant::RelaxedEnd | Plant::RelaxedLook | Plant::EndBeforePoison => (&poison::SYNC, poison::UNSEEN),
        Plant::OpenOverPoison => (&poison::OPEN, poison::REVIVED),
        other => unreachable!("{other:?} shows without threads"),
    }
}

/// Whether `model` breaks while `planted` is, and says so with `says`; otherwise what it came to.
fn catches(planted: Option<Plant>, model: &Model, says: &str) -> Result<(), String> {
    plant(planted);
    let outcome = catch_unwind(AssertUnwindSafe(|| model.explore()));
    plant(None);
    match outcome {
        Err(panic) if message(&*panic).contains(says) => Ok(()),
        Err(panic) => Err(message(&*panic).to_owned()),
        Ok(found) => Err(format!("{} interleavings", found.interleavings)),
    }
}

#[test]
fn every_planted_order_is_caught() {
    let mut missed = Vec::new();
    for planted in Plant::OF_THREADS.into_iter().chain([Plant::IgnoreMove]) {
        let (model, says) = catch_for(planted);
        match catches(Some(planted), model, says) {
            Ok(()) => println!("{planted:?}: {}: {says}", model.name),
            Err(found) => missed.push((planted, found)),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:#?}");
}

/// The engine takes the marks before it copies the pages, and sets its flag before it takes them: each of
/// these orders is one thread's own.
#[test]
fn a_cycle_that_copies_or_takes_first_is_caught() {
    assert_eq!(catches(None, &marks::COPY_FIRST, marks::LOST), Ok(()));
    assert_eq!(catches(None, &flush::TAKE_FIRST, flush::NOT_LOGGED), Ok(()));
}

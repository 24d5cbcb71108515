use std::sync::{Mutex, PoisonError};

use cubecl::server::Handle;

/// Room for what a step computes, one buffer after the other in one. Open while a step is queued: then it counts what is
/// asked for, and gives of its buffer, if it has one.
#[derive(Debug, Default)]
pub(crate) struct Arena(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    open: bool,
    all: Option<Handle>,
    taken: u64,
}

impl Arena {
    /// A part of the buffer while it is open, if it has so much left.
    pub(crate) fn take(&self, bytes: u64, alignment: u64) -> Option<Handle> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.open {
            return None;
        }
        let start = state.taken.next_multiple_of(alignment);
        state.taken = start + bytes;
        let all = state.all.as_ref()?;
        let rest = all.size_in_used().checked_sub(state.taken)?;
        Some(all.clone().offset_start(start).offset_end(rest))
    }

    /// Opens it for what `queue` asks for, of which it gives from `all`. Returns bytes that were asked for, too.
    pub(crate) fn during<T>(&self, all: Option<Handle>, queue: impl FnOnce() -> T) -> (T, u64) {
        let set = |state: State| {
            let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *own, state).taken
        };
        set(State { open: true, all, taken: 0 });
        let done = queue();
        (done, set(State::default()))
    }
}

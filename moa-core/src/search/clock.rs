//! The search's clock: the system's, except on bare WebAssembly, which has none.

#[cfg(not(all(target_family = "wasm", target_os = "unknown")))]
pub(super) use std::time::Instant;
#[cfg(all(target_family = "wasm", target_os = "unknown"))]
pub(super) use stopped::Instant;

/// A clock that stands still: no time limit is ever reached, and effort in operations ends the search.
#[cfg(all(target_family = "wasm", target_os = "unknown"))]
mod stopped {
    use std::ops::Add;
    use std::time::Duration;

    /// A moment; all of one search's readings are the same one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) struct Instant(Duration);

    impl Instant {
        pub(crate) fn now() -> Self {
            Self(Duration::ZERO)
        }

        pub(crate) fn elapsed(&self) -> Duration {
            Duration::ZERO
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;

        fn add(self, time: Duration) -> Self {
            Self(self.0 + time)
        }
    }
}

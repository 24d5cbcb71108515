use std::fmt;

/// A named check that passes, fails by a panic or an error, or says why it could not show anything.
pub struct Trial {
    pub(crate) name: String,
    pub(crate) run: Box<dyn FnOnce() -> Verdict + Send>,
}

impl Trial {
    /// A trial of this name, which filters of the command line are compared with.
    pub fn new<V: IntoVerdict>(
        name: impl Into<String>,
        check: impl FnOnce() -> V + Send + 'static,
    ) -> Self {
        Self { name: name.into(), run: Box::new(|| check().into_verdict()) }
    }

    /// A trial of a function, named as `cargo test` would name it: by its module's path without the
    /// crate. This is what [`trials!`](crate::trials) calls.
    pub fn of_function<V: IntoVerdict>(
        module_path: &str,
        function: &str,
        check: impl FnOnce() -> V + Send + 'static,
    ) -> Self {
        match module_path.split_once("::") {
            Some((_, module)) => Self::new(format!("{module}::{function}"), check),
            None => Self::new(function, check),
        }
    }

    /// The whole name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does the check, on this thread and apart from any [`run`](crate::run).
    ///
    /// # Errors
    /// The [`Stop`] with which the check ended: why it is ignored, or how it failed.
    ///
    /// # Panics
    /// Panics where the check does.
    pub fn check(self) -> Verdict {
        (self.run)()
    }
}

impl fmt::Debug for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trial").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The trials of functions of the module that this is written in, as a `Vec<Trial>`.
///
/// A function takes nothing and returns nothing, a [`Verdict`], or a `Result` of any error. One that
/// is left out is unused code, of which the compiler warns.
///
/// ```
/// use moa_conformance::{Stop, Verdict, trials};
///
/// fn one_and_one_are_two() {
///     assert_eq!(1 + 1, 2);
/// }
///
/// fn the_gpu_agrees() -> Verdict {
///     Err(Stop::ignored("no GPU"))
/// }
///
/// let trials = trials![one_and_one_are_two, the_gpu_agrees];
/// assert!(trials[0].name().ends_with("one_and_one_are_two"));
/// ```
#[macro_export]
macro_rules! trials {
    ($($check:ident),+ $(,)?) => {
        ::std::vec![$($crate::Trial::of_function(
            ::core::module_path!(),
            ::core::stringify!($check),
            $check,
        )),+]
    };
}

/// How a check ends that did not panic.
pub type Verdict = Result<(), Stop>;

/// Why a check ended early: it cannot show anything here, or it failed.
///
/// Every error becomes a failure by `?`.
#[derive(Clone, Debug)]
pub struct Stop(pub(crate) Reason);

#[derive(Clone, Debug)]
pub(crate) enum Reason {
    Ignored(String),
    Failed(String),
}

impl Stop {
    /// The check cannot show anything here, for this reason. Trials with equal reasons are counted
    /// together at the end.
    pub fn ignored(reason: impl fmt::Display) -> Self {
        Self(Reason::Ignored(reason.to_string()))
    }

    /// Whether the check showed nothing, and did not fail.
    pub fn is_ignored(&self) -> bool {
        matches!(self.0, Reason::Ignored(_))
    }

    /// The same as [`ignored`](Self::ignored) for something that a machine may lack; a failure where the environment `variable` is
    /// `1`, as it is on machines that have it.
    pub fn unless_required(variable: &str, reason: impl fmt::Display) -> Self {
        match std::env::var_os(variable).is_some_and(|value| value == "1") {
            true => Self(Reason::Failed(format!("{variable} is set, but: {reason}"))),
            false => Self::ignored(reason),
        }
    }
}

// `Stop` is no `Error` itself: it could not be made of all errors then.
impl<E: std::error::Error> From<E> for Stop {
    fn from(error: E) -> Self {
        Self(Reason::Failed(error.to_string()))
    }
}

/// A type that a check may return.
pub trait IntoVerdict {
    /// How the check ended.
    fn into_verdict(self) -> Verdict;
}

impl IntoVerdict for () {
    fn into_verdict(self) -> Verdict {
        Ok(())
    }
}

impl<E: Into<Stop>> IntoVerdict for Result<(), E> {
    fn into_verdict(self) -> Verdict {
        self.map_err(Into::into)
    }
}

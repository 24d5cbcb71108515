//! Answers that must be JSON of a schema, where the build has the feature `grammar`.

#[cfg(feature = "grammar")]
mod with;
#[cfg(not(feature = "grammar"))]
mod without;

#[cfg(feature = "grammar")]
pub(crate) use with::{Grammar, Vocabulary};
#[cfg(not(feature = "grammar"))]
pub(crate) use without::{Grammar, Vocabulary};

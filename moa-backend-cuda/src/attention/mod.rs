//! Attention of new tokens over cached and new keys: how a batch is cut, and what is launched for it.

mod check;
pub(crate) mod schedule;
pub(crate) mod step;
pub(crate) mod steps;
pub(crate) mod timing;

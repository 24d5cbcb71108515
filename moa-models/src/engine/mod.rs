//! Generation: one loop of steps, which requests join and leave.
//!
//! [`serve`] is the engine, to which a request ([`request`]) is given and which tells what becomes of
//! it; [`step`] is the loop's body; [`choice`] decides whether the device or the host chooses tokens,
//! [`sampling`] chooses on the host, among what a [`constraint`] allows, [`logprobs`] tells how likely the
//! choice was, [`stop`] looks for stop strings, [`speculate`] and
//! [`draft_model`] guess tokens that a step then checks, as many as [`pace`] says; [`chat_session`] is a conversation on
//! top.

pub(crate) mod batch;
pub(crate) mod chat_session;
pub(crate) mod choice;
pub(crate) mod constraint;
pub(crate) mod draft_model;
pub(crate) mod logprobs;
pub(crate) mod pace;
pub(crate) mod prefill;
pub(crate) mod request;
pub(crate) mod running;
pub(crate) mod sampling;
pub(crate) mod serve;
pub(crate) mod speculate;
pub(crate) mod step;
pub(crate) mod stop;

//! Generation: steps of a batch, sampling, stop strings, conversations.

pub(crate) mod chat_session;
pub(crate) mod decode;
pub(crate) mod generate;
pub(crate) mod running;
pub(crate) mod sampling;
pub(crate) mod serve;
pub(crate) mod stop;

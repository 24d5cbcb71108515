use crate::Result;

/// What a request may be continued with, such as the texts of a grammar. It is also what other libraries call a logits
/// processor: it is given the model's logits before penalties, bias and temperature, and may change any of them.
///
/// [`Engine::constrain`](crate::Engine::constrain) gives one to a request.
pub trait Constraint: std::fmt::Debug + Send {
    /// Sets the logits of all tokens that may not come next to minus infinity, and others to what it likes. End tokens
    /// are among those that may come where the text may end. [`TokenLogprobs`](crate::TokenLogprobs) tell of the logits
    /// before.
    ///
    /// # Errors
    /// Any; the request fails with it.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<()>;

    /// Takes the token that came next, which is no end token; returns whether nothing may follow, so
    /// that the request has ended.
    ///
    /// # Errors
    /// Any; the request fails with it.
    fn accept(&mut self, token: u32) -> Result<bool>;
}

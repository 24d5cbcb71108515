//! Cache geometry: where each head keeps which position, and how far a cache is filled. Pure integer
//! arithmetic, usable alone by an engine that brings its own kernels.

mod head_row;
mod layout;
mod state;

pub use head_row::HeadRow;
pub use layout::{HeadLayout, LayerLayout, Run, Slot};
pub use state::{CacheState, Extent};

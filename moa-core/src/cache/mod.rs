//! Cache geometry: where each head keeps which position, and how far a cache is filled. Pure integer
//! arithmetic, usable alone by an engine that brings its own kernels.

mod cache_type;
mod feedback;
mod head_row;
mod layout;
mod paged;
mod rounding;
mod serial;
mod state;

pub use cache_type::CacheType;
pub use feedback::key_feedback;
pub use head_row::HeadRow;
pub use layout::{HeadLayout, LayerLayout, Run, Slot};
pub use rounding::{RowType, e4m3_to_f32, rotate, rotation, widen_scale};
pub use state::{CacheState, Extent};

use moa_core::{CacheType, SparseAttentionBackend};

/// The cache type of a subject's backend.
pub type Cache<S> = <<S as Subject>::Backend as SparseAttentionBackend>::Cache;

/// The error type of a subject's backend.
pub type Error<S> = <<S as Subject>::Backend as SparseAttentionBackend>::Error;

/// A backend under test, with what the suite cannot know of it: how numbers come in and out, how they
/// are rounded, and how exact the arithmetic is.
///
/// Four functions are all that an exact f32 backend on the host needs.
pub trait Subject: Sized + 'static {
    /// The backend's type.
    type Backend: SparseAttentionBackend<Tensor = Self::Tensor>;
    /// The type of its tensors.
    type Tensor;

    /// The backend.
    fn backend(&self) -> &Self::Backend;

    /// A tensor of this shape, row-major.
    fn tensor(&self, data: &[f32], shape: &[usize]) -> Self::Tensor;

    /// A tensor that holds log-sum-exps, sinks or feedback, where these are of another type than others.
    fn lse(&self, data: &[f32], shape: &[usize]) -> Self::Tensor {
        self.tensor(data, shape)
    }

    /// A tensor's numbers, row-major.
    fn host(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// A key's or value's element as a cache of the backend's own type holds it. A backend whose own type rounds
    /// whole rows overrides [`round_key`](Self::round_key) and [`round_value`](Self::round_value) instead.
    fn round(&self, x: f32) -> f32 {
        x
    }

    /// A key's row as a cache of the backend's own type holds it.
    fn round_key(&self, row: &[f32]) -> Vec<f64> {
        row.iter().map(|&x| f64::from(self.round(x))).collect()
    }

    /// A value's row as a cache of the backend's own type holds it.
    fn round_value(&self, row: &[f32]) -> Vec<f64> {
        row.iter().map(|&x| f64::from(self.round(x))).collect()
    }

    /// Types that a layout may choose for each head
    /// ([`has_cache_type`](SparseAttentionBackend::has_cache_type)); all others must be refused.
    fn cache_types(&self) -> &'static [CacheType] {
        &[]
    }

    /// An element of any other tensor as the backend holds it.
    fn round_tensor(&self, x: f32) -> f32 {
        x
    }

    /// Most that the type of tensors changes an element of the output, as a share of it.
    fn output_rounding(&self) -> f64 {
        0.0
    }

    /// Head dimensions to draw from.
    fn dims(&self) -> &'static [usize] {
        &[1, 7, 8, 20, 64, 72]
    }

    /// The head dimension to use where a check would take `wanted`.
    fn dim(&self, wanted: usize) -> usize {
        wanted
    }

    /// Largest [`error`](crate::error) against the f64 reference on rounded inputs of unit
    /// size.
    fn tolerance(&self) -> f64 {
        1e-4
    }

    /// Largest [`error`](crate::error) between two ways to compute the same numbers on the backend.
    fn same(&self) -> f64 {
        1e-5
    }

    /// Largest [`error`](crate::error) of either kind where heads have types of their own, if the backend computes with
    /// some of them less exactly than with its caches' type.
    fn typed_tolerance(&self) -> Option<f64> {
        None
    }

    /// Largest difference of a sum of influence from the f64 reference's, as a share of 1 plus
    /// that; a third of it for gradients.
    fn influence_tolerance(&self) -> f64 {
        3e-4
    }

    /// Sizes of influence blocks to draw from.
    fn influence_blocks(&self) -> &'static [usize] {
        &[1, 7, 16, 64, 500]
    }

    /// The core's error inside of one of the backend's. To be overridden where it is not found
    /// along [`source`](std::error::Error::source), as in a variant that is `#[error(transparent)]`.
    fn core_error<'e>(&self, error: &'e Error<Self>) -> Option<&'e moa_core::Error> {
        let mut error: &(dyn std::error::Error + 'static) = error;
        loop {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            error = error.source()?;
        }
    }
}

//! What every backend must do, written once over [`SparseAttentionBackend`]. A backend's test file
//! implements [`TestBackend`] and calls [`conformance!`].

pub(crate) mod backward;
pub(crate) mod errors;
pub(crate) mod influence;
pub(crate) mod laws;
pub(crate) mod traps;
pub(crate) mod world;

use moa_core::SparseAttentionBackend;

/// Moves numbers between the host and a backend.
pub(crate) trait TestBackend {
    type Backend: SparseAttentionBackend<Tensor = Self::Tensor>;
    type Tensor;

    fn backend(&self) -> &Self::Backend;
    fn tensor(&self, data: &[f32], shape: &[usize]) -> Self::Tensor;
    /// A tensor that holds log-sum-exps.
    fn lse(&self, data: &[f32], shape: &[usize]) -> Self::Tensor {
        self.tensor(data, shape)
    }

    fn host(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// A key or value as the cache holds it.
    fn round(&self, x: f32) -> f32;

    /// An element of any other tensor as the backend holds it.
    fn round_tensor(&self, x: f32) -> f32 {
        x
    }

    /// Head dimensions to draw from.
    fn dims(&self) -> &'static [usize] {
        &[1, 7, 8, 20, 64, 72]
    }

    /// The head dimension to use where a test would take this one.
    fn dim(&self, wanted: usize) -> usize {
        wanted
    }

    /// Largest [`world::error`] against the f64 reference on rounded inputs of unit size.
    fn tolerance(&self) -> f64 {
        1e-4
    }

    /// The same between two ways to compute the same numbers.
    fn same(&self) -> f64 {
        1e-5
    }

    /// The same for sums of influence; a third of it for gradients.
    fn influence_tolerance(&self) -> f64 {
        3e-4
    }

    /// Sizes of influence blocks to draw from.
    fn influence_blocks(&self) -> &'static [usize] {
        &[1, 7, 16, 64, 500]
    }

    /// Whether influence comes with gradients.
    fn has_gradients(&self) -> bool {
        true
    }
}

/// One `#[test]` per check, for the backend that the expression makes; `None` skips it.
macro_rules! conformance {
    ($name:ident, $backend:expr) => {
        mod $name {
            use super::*;
            conformance!(@tests $backend; laws:
                output_equals_the_reference chunking_does_not_change_output
                batch_composition_does_not_change_output spare_capacity_does_not_change_output
                a_group_equals_repeated_heads truncate_then_extend_equals_never_having_extended
                fork_is_independent failed_call_leaves_state_unchanged
                truncate_to_nothing_equals_a_new_cache
            );
            conformance!(@tests $backend; traps:
                trap_01_window_counts_the_query_itself
                trap_02_chunk_sees_keys_that_it_pushes_out
                trap_03_prefix_reuse_of_a_wrapped_ring
                trap_04_speculative_rollback_of_a_wrapped_ring
                trap_05_decode_respects_the_window
                trap_06_memory_is_as_small_as_the_spans
                trap_07_length_equal_to_window
                trap_08_no_state_leaks_into_the_next_sequence
                trap_11_every_row_of_a_batch_has_its_own_length
                trap_12_result_does_not_depend_on_the_batch
            );
            conformance!(@tests $backend; influence:
                influence_equals_the_reference gradients_equal_the_reference
                influence_is_what_masking_one_entry_changes zero_gradient_rows_contribute_nothing
            );
            conformance!(@tests $backend; errors:
                wrong_shapes_are_refused capacity_is_an_error_and_changes_nothing
                rollback_of_evicted_keys_is_an_error
            );
        }
    };
    (@tests $backend:expr; $module:ident: $($test:ident)+) => {
        $(#[test]
        fn $test() {
            if let Some(backend) = $backend {
                conformance::$module::$test(&backend);
            }
        })+
    };
}
pub(crate) use conformance;

use crate::{
    IntoVerdict, Stop, Subject, Trial, Verdict, errors, feedback, influence, laws, scores, traps,
};

/// A check of the suite, by its name.
type Check<S> = (&'static str, fn(&S) -> Verdict);

macro_rules! checks {
    ($($module:ident: $($check:ident)+;)+) => {
        [$($((stringify!($check), |subject| $module::$check(subject).into_verdict())),+),+]
    };
}

/// Everything that a backend must do: 39 trials, named `{name}::{check}`.
///
/// `open` makes the backend anew for each trial; where it cannot, it says [why](Stop::ignored).
pub fn suite<S: Subject>(
    name: &str,
    open: impl Fn() -> Result<S, Stop> + Clone + Send + 'static,
) -> Vec<Trial> {
    all().into_iter().map(|check| trial(name, check, open.clone())).collect()
}

/// The trials of these checks alone, for what differs little from a backend that has been through
/// the whole [`suite`].
///
/// # Panics
/// Panics if there is no check of such a name.
pub fn part<S: Subject>(
    name: &str,
    checks: &[&str],
    open: impl Fn() -> Result<S, Stop> + Clone + Send + 'static,
) -> Vec<Trial> {
    let all = all();
    let named = |wanted: &&str| {
        let found = all.iter().find(|(check, _)| check == wanted);
        *found.unwrap_or_else(|| panic!("the suite has no check {wanted:?}"))
    };
    checks.iter().map(|check| trial(name, named(check), open.clone())).collect()
}

fn trial<S: Subject>(
    name: &str,
    (check, run): Check<S>,
    open: impl Fn() -> Result<S, Stop> + Send + 'static,
) -> Trial {
    Trial::new(format!("{name}::{check}"), move || run(&open()?))
}

fn all<S: Subject>() -> [Check<S>; 39] {
    checks! {
        laws:
            output_equals_the_reference
            chunking_does_not_change_output
            batch_composition_does_not_change_output
            spare_capacity_does_not_change_output
            a_group_equals_repeated_heads
            truncate_then_extend_equals_never_having_extended
            fork_is_independent
            failed_call_leaves_state_unchanged
            truncate_to_nothing_equals_a_new_cache
            heads_of_other_types_equal_the_reference
            rounding_is_within_its_bound
            rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them;
        traps:
            trap_01_window_counts_the_query_itself
            trap_02_chunk_sees_keys_that_it_pushes_out
            trap_03_prefix_reuse_of_a_wrapped_ring
            trap_04_speculative_rollback_of_a_wrapped_ring
            trap_05_decode_respects_the_window
            trap_06_memory_is_as_small_as_the_spans
            trap_07_length_equal_to_window
            trap_08_no_state_leaks_into_the_next_sequence
            trap_11_every_row_of_a_batch_has_its_own_length
            trap_12_result_does_not_depend_on_the_batch;
        scores:
            softcap_equals_the_reference
            sinks_equal_the_reference
            softcap_and_sinks_equal_the_reference
            sinks_at_the_ends
            wrong_softcaps_and_sinks_are_refused;
        feedback:
            keys_with_feedback_equal_the_reference
            wrong_feedback_is_refused;
        influence:
            influence_equals_the_reference
            gradients_equal_the_reference
            influence_is_what_masking_one_entry_changes
            zero_gradient_rows_contribute_nothing
            hidden_pairs_have_no_influence
            hidden_pairs_have_no_gradients;
        errors:
            wrong_shapes_are_refused
            capacity_is_an_error_and_changes_nothing
            rollback_of_evicted_keys_is_an_error
            types_that_are_lacked_are_refused;
    }
}

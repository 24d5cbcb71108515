//! The suite on the specification itself, which passes, and on backends that are wrong in known ways: a
//! suite is worth what it finds.

mod backend;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use backend::{Defect, Reference};
use moa_conformance::{Trial, Verdict, part, run, suite};

/// A defect, and checks that find it.
const FOUND: [(Defect, &[&str]); 21] = [
    (
        Defect::WindowBesideTheQuery,
        &["trap_01_window_counts_the_query_itself", "output_equals_the_reference"],
    ),
    (
        Defect::AppendsBeforeItAttends,
        &["trap_02_chunk_sees_keys_that_it_pushes_out", "chunking_does_not_change_output"],
    ),
    (
        Defect::StaysWhenTruncated,
        &[
            "trap_04_speculative_rollback_of_a_wrapped_ring",
            "trap_08_no_state_leaks_into_the_next_sequence",
            "truncate_to_nothing_equals_a_new_cache",
            "rollback_of_evicted_keys_is_an_error",
        ],
    ),
    (Defect::DenseMemory, &["trap_06_memory_is_as_small_as_the_spans"]),
    (Defect::LengthOfTheLast, &["trap_11_every_row_of_a_batch_has_its_own_length"]),
    (Defect::DependsOnTheBatch, &["batch_composition_does_not_change_output"]),
    (Defect::ChecksTooLate, &["failed_call_leaves_state_unchanged"]),
    (
        Defect::ChecksNothing,
        &[
            "wrong_shapes_are_refused",
            "types_that_are_lacked_are_refused",
            "wrong_softcaps_and_sinks_are_refused",
        ],
    ),
    (Defect::RoundsAfterItAttends, &["heads_of_other_types_equal_the_reference"]),
    (Defect::TypeOfTheFirst, &["heads_of_other_types_equal_the_reference"]),
    (
        Defect::CoarseScale,
        &["heads_of_other_types_equal_the_reference", "rounding_is_within_its_bound"],
    ),
    (Defect::NoFeedback, &["keys_with_feedback_equal_the_reference"]),
    (Defect::NoSoftcap, &["softcap_equals_the_reference", "softcap_and_sinks_equal_the_reference"]),
    (
        Defect::NoSinks,
        &[
            "sinks_equal_the_reference",
            "softcap_and_sinks_equal_the_reference",
            "sinks_at_the_ends",
        ],
    ),
    (Defect::LseWithoutSinks, &["sinks_equal_the_reference", "sinks_at_the_ends"]),
    (
        Defect::MultipliesByZero,
        &[
            "rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them",
            "hidden_pairs_have_no_influence",
            "hidden_pairs_have_no_gradients",
        ],
    ),
    (Defect::PassesOverNone, &["rows_that_hold_no_numbers_reach_no_query_that_does_not_see_them"]),
    (
        Defect::InfluenceOfWeights,
        &["influence_equals_the_reference", "influence_is_what_masking_one_entry_changes"],
    ),
    (Defect::AlwaysSigned, &["zero_gradient_rows_contribute_nothing"]),
    (
        Defect::InfluenceOfHiddenKeys,
        &["influence_equals_the_reference", "gradients_equal_the_reference"],
    ),
    (Defect::GradientsWithoutScale, &["gradients_equal_the_reference"]),
];

fn main() -> ExitCode {
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !EXPECTED.get() {
            loud(info);
        }
    }));
    let find = |(defect, checks): (Defect, &'static [&'static str])| {
        let trials = part(&format!("{defect:?}"), checks, move || Ok(Reference(defect)));
        trials.into_iter().map(|trial| Trial::new(trial.name().to_owned(), || fails(trial)))
    };
    let passes = suite("reference", || Ok(Reference(Defect::None)));
    run(passes.into_iter().chain(FOUND.into_iter().flat_map(find)))
}

thread_local! {
    /// Whether a panic of this thread is what a trial is for.
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

fn fails(trial: Trial) -> Verdict {
    EXPECTED.set(true);
    let result = catch_unwind(AssertUnwindSafe(|| trial.check()));
    EXPECTED.set(false);
    match result {
        Ok(Ok(())) => panic!("the check passes"),
        Ok(Err(stop)) if stop.is_ignored() => panic!("the check shows nothing"),
        Ok(Err(_)) | Err(_) => Ok(()),
    }
}

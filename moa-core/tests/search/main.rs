//! Plan search against exhaustive search, against a MILP solver, and its laws.

mod errors;
mod exhaustive;
mod instances;
mod laws;
mod milp;

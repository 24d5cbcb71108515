//! Search for plans: one candidate rule per KV head, least loss, sizes within bounds.
//!
//! Losses add up over heads (MoA, arXiv 2406.14909, section 4), so a plan is a choice of one
//! candidate per head that minimises a sum under a few sums that are bounded: a multiple-choice
//! knapsack. Several objective lengths give a Pareto set, found by the epsilon-constraint method.
//! Every plan comes with a proven lower bound of what could be reached; plans themselves are near it, not
//! proven to be the best.
//!
//! ```
//! use moa_core::ElasticRule;
//! use moa_core::search::{Bound, Options, Problem, density_sizes, solve};
//!
//! let candidates = vec![ElasticRule::new(0.0, 0.25)?, ElasticRule::new(0.0, 0.5)?, ElasticRule::FULL];
//! let bounds = vec![Bound { length: 4096, max: 0.625, min: None }];
//! let sizes = density_sizes(&candidates, &bounds, 128);
//! // One length, one layer, two heads, three candidates: the second head matters more.
//! let losses = vec![0.3, 0.2, 0.0, 9.0, 4.0, 0.0];
//! let problem = Problem::new(1, 2, candidates, vec![4096], losses, bounds, sizes)?;
//! let found = solve(&problem, &Options::default())?;
//! assert_eq!(found.solutions[0].choice, [0, 2]);
//! # Ok::<(), moa_core::Error>(())
//! ```
//!
//! How it works, one file each: `reduce` drops candidates that can never be chosen, `lagrangian`
//! evaluates the dual function (exact sets of rules per layer in `rule_sets`), `bundle` maximises
//! it, `pool` and `exchange` turn its points into good plans, `epsilon` walks the Pareto front.

mod bundle;
mod clock;
mod epsilon;
mod exchange;
mod grid;
mod lagrangian;
mod options;
mod pareto;
mod pool;
mod problem;
mod quadratic;
mod reduce;
mod rule_sets;
mod solver;
mod subproblem;

pub use epsilon::solve;
pub use grid::{code_grid, fixed_grid, grid, paper_grid, scaled_grid};
pub use options::Options;
pub use pareto::{Gap, ParetoSet, Solution};
pub use problem::{Bound, Problem, density_sizes};

//! Pictures and pages of mixture-of-spans plans: plain SVG, one HTML page that fetches nothing, and text for
//! a terminal.
//!
//! A [`Report`] is the whole page; its [`Figure`]s can be had one by one from [`figure`]. A [`PlanSummary`]
//! is one plan at some context lengths, as text or as JSON.
//!
//! ```
//! use moa_core::{ElasticRule, ModelShape, Plan};
//! use moa_report::{NamedPlan, PlanSummary, Report};
//!
//! let shape = ModelShape { layers: 4, query_heads: 8, kv_heads: 2, head_dim: 64 };
//! let plan = Plan::uniform(shape, 64, ElasticRule::new(0.0, 0.25)?)?;
//! println!("{}", PlanSummary::new(&plan, &[4096], 2));
//!
//! let plans = vec![NamedPlan { name: "quarter".to_string(), plan }];
//! let page = Report { title: "A quarter".to_string(), plans, ..Report::default() }.page()?;
//! assert_eq!(page.figures[0].id, "heads");
//! assert!(page.html().starts_with("<!DOCTYPE html>"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![forbid(unsafe_code)]

pub mod figure;

mod answers;
mod error;
mod head_map;
mod page;
mod report;
mod summary;
mod text;

pub use answers::{Answer, Answers};
pub use error::{Error, Result};
pub use figure::Figure;
pub use head_map::HeadMap;
pub use page::{Page, Table};
pub use report::{NamedPlan, Report};
pub use summary::{PlanSize, PlanSummary, at_lengths, lengths_of};
pub use text::{bytes, percent, table};
